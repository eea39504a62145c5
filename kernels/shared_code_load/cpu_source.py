"""Source of the CPU kernel that dequantizes: constants in front of ``cpu.cpp``.

One kernel serves all lengths, steps and chunks, and caches of all sizes: it is told these.
"""

from __future__ import annotations

import functools

from xquant_fx.kernels.arguments import Overload
from xquant_fx.kernels.cpu.isa import Isa
from xquant_fx.kernels.cpu.side import Side
from xquant_fx.kernels.cpu.source import assemble, definitions, pointers
from xquant_fx.kernels.layout import WORD_TOKENS
from xquant_fx.kernels.rotation import rotated_size
from xquant_fx.kernels.shared_code_load.arguments import LoadArguments

#: What the kernel is told besides tensors, in order: tokens to give back, sequences, tokens that the step brings,
#: tokens that the codes have room for, the first token to give back, whether the step's tokens are those of ``x``.
SIZES = ("n", "batch", "new_tokens", "tokens", "first", "own")


def constants(a: Side) -> str:
    """The constants that the C++ relies on."""
    numbers = {
        **a.numbers, "ROTATED": rotated_size(a.dim) if a.is_about_zero else 0, "RING": a.ring,
        "WORD_TOKENS": WORD_TOKENS,
    }  # fmt: skip
    flags = {
        "KEYS": a.append in ("blocks", "ranked"), "RANKED": a.is_ranked, "ABOUT_ZERO": a.is_about_zero,
        "FOLDED": a.append == "folded", "NORMS": a.norms,
    }  # fmt: skip
    return definitions(numbers, {}, flags, a.types) + a.tables


@functools.cache
def source(a: Side, isa: Isa) -> tuple[tuple[str, ...], str]:
    """(argument types, C++ source of ``kernel``).

    The arguments are the tensors that are present, in order, what is given back, and ``SIZES``.
    """
    tensors = pointers(LoadArguments, Overload(omit=frozenset({"first"})))
    file, outputs = "shared_code_load/cpu.cpp", {"out": "xq::T*"}
    return assemble(isa, constants(a), file, "load_all", tensors, a.absent, outputs, SIZES, by_row=False)
