"""Source of the CPU kernel that dequantizes: constants in front of ``cpu.cpp``.

One kernel serves all lengths, steps and chunks, and caches of all sizes: it is told these.
"""

from __future__ import annotations

import dataclasses
import functools

import torch

from xquant_fx.kernels.arguments import Overload
from xquant_fx.kernels.cpu.isa import Isa
from xquant_fx.kernels.cpu.planes import tables
from xquant_fx.kernels.cpu.source import assemble, definitions, pointers
from xquant_fx.kernels.layout import WORD_TOKENS
from xquant_fx.kernels.packing import word_count
from xquant_fx.kernels.rotation import rotated_size
from xquant_fx.kernels.shared_code_load.arguments import LoadArguments
from xquant_fx.kernels.widths import words_of

#: What the kernel is told besides tensors, in order: tokens to give back, sequences, tokens that the step brings,
#: tokens that the codes have room for, the first token to give back, whether the step's tokens are those of ``x``.
SIZES = ("n", "batch", "new_tokens", "tokens", "first", "own")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Load:
    """What is fixed when the kernel is compiled; see ``xquant::shared_code_load``."""

    dtype: torch.dtype
    scale_dtype: torch.dtype
    heads: int
    dim: int
    append: str
    """How it was quantized: ``APPEND`` of the scheme."""
    bits: float
    group: int
    residual: int
    ring: int
    wrap: int
    """After how many tokens codes start over; 0: they do not."""
    sinks: int
    norms: bool
    """Whether tokens were divided by their norms."""


def constants(a: Load) -> str:
    """The constants that the C++ relies on."""
    ranked, about_zero = a.append == "ranked", a.append in ("rotated", "folded")
    numbers = {
        "H": a.heads, "D": a.dim, "BITS": 8 if ranked else int(a.bits), "GROUP": a.group,
        "WORDS": words_of(a.bits, a.dim) if ranked else word_count(a.bits, a.dim), "WRAP": a.wrap,
        "RESIDUAL": a.residual, "RING": a.ring, "SINKS": a.sinks, "WORD_TOKENS": WORD_TOKENS,
        "ROTATED": rotated_size(a.dim) if about_zero else 0,
    }  # fmt: skip
    flags = {
        "KEYS": a.append in ("blocks", "ranked"), "RANKED": ranked, "ABOUT_ZERO": about_zero,
        "FOLDED": a.append == "folded", "NORMS": a.norms,
    }  # fmt: skip
    fixed = definitions(numbers, {}, flags, {"T": a.dtype, "S": a.scale_dtype})
    return fixed + tables(a.append, a.bits, a.dim)


@functools.cache
def source(a: Load, isa: Isa) -> tuple[tuple[str, ...], str]:
    """(argument types, C++ source of ``kernel``).

    The arguments are the tensors that are present, in order, what is given back, and ``SIZES``.
    """
    tensors = pointers(LoadArguments, Overload(omit=frozenset({"first"})))
    absent = set() if a.sinks else {"sink"}
    absent |= set() if a.append == "ranked" else {"order", "center"}
    absent |= set() if a.norms else {"norm"}
    absent |= {"zero"} if a.append in ("rotated", "folded") else set()
    file, outputs = "shared_code_load/cpu.cpp", {"out": "xq::T*"}
    return assemble(isa, constants(a), file, "load_all", tensors, absent, outputs, SIZES, by_row=False)
