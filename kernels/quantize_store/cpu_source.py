"""Source of the CPU kernel that appends tokens: constants in front of ``cpu.cpp``.

One kernel serves steps and chunks of all lengths, and caches of all sizes: it is told these.
"""

from __future__ import annotations

import dataclasses
import functools

import torch

from xquant_fx.kernels.cpu.isa import Isa
from xquant_fx.kernels.cpu.planes import tables
from xquant_fx.kernels.cpu.source import assemble, definitions, pointers
from xquant_fx.kernels.faults import Fault
from xquant_fx.kernels.layout import STEP_TOKENS
from xquant_fx.kernels.packing import word_count
from xquant_fx.kernels.quantize_store.arguments import BORROWED, OWN, StoreArguments
from xquant_fx.kernels.rotation import rotated_size
from xquant_fx.kernels.schemes.per_token_rotated import GAUSSIAN_STEP
from xquant_fx.kernels.widths import words_of

#: What the kernel is told besides tensors, in order: new tokens, sequences, their longest length, tokens that the codes
#: have room for.
SIZES = ("count", "batch", "max_len", "tokens")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Append:
    """What is fixed when the kernel is compiled; see ``xquant::quantize_store``."""

    dtype: torch.dtype
    scale_dtype: torch.dtype
    heads: int
    dim: int
    append: str
    """Which step quantizes what is due: ``APPEND`` of the scheme."""
    bits: float
    group: int
    residual: int
    ring: int
    wrap: int
    """After how many tokens codes start over; 0: they do not."""
    eta: float
    sinks: int
    fit: str | None
    norms: bool
    """Whether tokens are divided by their norms."""
    by_row: bool
    """Whether the rows of a batch have lengths of their own: each is a batch of one."""


def is_ranked(a: Append) -> bool:
    """Whether channels have widths by rank."""
    return a.append == "ranked"


def constants(a: Append) -> str:
    """The constants that the C++ relies on."""
    dim = a.dim
    numbers = {
        "H": a.heads, "D": dim, "BITS": 8 if is_ranked(a) else int(a.bits), "GROUP": a.group,
        "WORDS": words_of(a.bits, dim) if is_ranked(a) else word_count(a.bits, dim),
        "ROTATED": rotated_size(dim) if a.append == "rotated" else 0,
        "WRAP": a.wrap, "RESIDUAL": a.residual, "RING_SLACK": a.ring - a.residual, "SINKS": a.sinks,
        "STEP_TOKENS": STEP_TOKENS, **{fault.name: int(fault) for fault in Fault},
    }  # fmt: skip
    flags = {"BORROWED": a.fit is not None, "LEAST_SQUARES": a.fit == "least_squares", "NORMS": a.norms}
    floats = {"RELAXED_SCALE": 1 - 2 * a.eta, "RELAXED_ZERO": a.eta * (2**a.bits - 1)}
    floats["GAUSSIAN_STEP"] = GAUSSIAN_STEP.get(a.bits, 0.0)
    fixed = definitions(numbers, floats, flags, {"T": a.dtype, "S": a.scale_dtype})
    append = "rotated" if a.append == "folded" else a.append  # ROTATED says which of the two
    return f"#define XQ_APPEND_{append.upper()}\n" + fixed + tables(a.append, a.bits, dim)


@functools.cache
def source(a: Append, isa: Isa) -> tuple[tuple[str, ...], str]:
    """(argument types, C++ source of ``kernel``).

    The arguments are the tensors that are present, in order, and what ``cpu_call.sizes_given`` says.
    """
    tensors = pointers(StoreArguments, BORROWED if a.fit else OWN)
    absent = set() if a.sinks else {"sink"}
    absent |= set() if is_ranked(a) else {"order", "center", "energy"}
    absent |= set() if a.norms else {"norm"}
    absent |= {"zero"} if a.append in ("rotated", "folded") else set()
    function, file = "append_row" if a.by_row else "append", "quantize_store/cpu.cpp"
    return assemble(isa, constants(a), file, function, tensors, absent, {}, SIZES, by_row=a.by_row)
