"""Source of the CPU kernel that appends a step's tokens: constants in front of ``cpu.cpp``."""

from __future__ import annotations

import dataclasses
import functools

import torch

from xquant_fx.kernels.cpu.isa import Isa
from xquant_fx.kernels.cpu.source import assemble, definitions, pointers
from xquant_fx.kernels.faults import Fault
from xquant_fx.kernels.layout import STEP_TOKENS
from xquant_fx.kernels.quantize_store.arguments import BORROWED, OWN, StoreArguments


@dataclasses.dataclass(frozen=True, kw_only=True)
class Append:
    """What is fixed when the kernel is compiled; see ``xquant::quantize_store``."""

    dtype: torch.dtype
    scale_dtype: torch.dtype
    shape: tuple[int, int, int, int]
    """Shape of the new tokens [B, H, q, D]."""
    append: str
    """Which step quantizes what is due: ``APPEND`` of the scheme."""
    bits: int
    group: int
    residual: int
    ring: int
    tokens: int
    """Tokens that the codes have room for."""
    eta: float
    sinks: int
    max_len: int
    fit: str | None


def constants(a: Append) -> str:
    """The constants that the C++ relies on."""
    batch, heads, new, dim = a.shape
    numbers = {
        "B": batch, "H": heads, "Q": new, "D": dim, "N": a.max_len, "BITS": a.bits, "GROUP": a.group,
        "TOKENS": a.tokens, "RESIDUAL": a.residual, "RING_SLACK": a.ring - a.residual, "SINKS": a.sinks,
        "STEP_TOKENS": STEP_TOKENS, **{fault.name: int(fault) for fault in Fault},
    }  # fmt: skip
    flags = {"BLOCKS": a.append == "blocks", "BORROWED": a.fit is not None, "LEAST_SQUARES": a.fit == "least_squares"}
    relaxed = {"RELAXED_SCALE": 1 - 2 * a.eta, "RELAXED_ZERO": a.eta * (2**a.bits - 1)}
    return definitions(numbers, relaxed, flags, {"T": a.dtype, "S": a.scale_dtype})


@functools.cache
def source(a: Append, isa: Isa) -> tuple[tuple[str, ...], str]:
    """(argument types, C++ source of ``kernel``); the arguments are the tensors that are present, in order."""
    tensors = pointers(StoreArguments, BORROWED if a.fit else OWN)
    absent = () if a.sinks else ("sink",)
    return assemble(isa, constants(a), "quantize_store/cpu.cpp", "append", tensors, absent, outputs={})
