"""Source of the CPU kernel that appends tokens: constants in front of ``cpu.cpp``.

One kernel serves steps and chunks of all lengths, and caches of all sizes: it is told these.
"""

from __future__ import annotations

import dataclasses
import functools

from xquant_fx.kernels.cpu.isa import Isa
from xquant_fx.kernels.cpu.side import Side
from xquant_fx.kernels.cpu.source import assemble, definitions, pointers
from xquant_fx.kernels.faults import Fault
from xquant_fx.kernels.layout import STEP_TOKENS
from xquant_fx.kernels.quantize_store.arguments import BORROWED, OWN, StoreArguments
from xquant_fx.kernels.rotation import rotated_size
from xquant_fx.kernels.schemes.per_token_rotated import GAUSSIAN_STEP

#: What the kernel is told besides tensors, in order: new tokens, sequences, their longest length, tokens that the codes
#: have room for.
SIZES = ("count", "batch", "max_len", "tokens")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Append(Side):
    """What is fixed when the kernel is compiled; see ``xquant::quantize_store``."""

    eta: float
    fit: str | None
    by_row: bool
    """Whether the rows of a batch have lengths of their own: each is a batch of one."""


def constants(a: Append) -> str:
    """The constants that the C++ relies on."""
    numbers = {
        **a.numbers, "ROTATED": rotated_size(a.dim) if a.append == "rotated" else 0,
        "RING_SLACK": a.ring - a.residual, "STEP_TOKENS": STEP_TOKENS,
        **{fault.name: int(fault) for fault in Fault},
    }  # fmt: skip
    flags = {"BORROWED": a.fit is not None, "LEAST_SQUARES": a.fit == "least_squares", "NORMS": a.norms}
    floats = {"RELAXED_SCALE": 1 - 2 * a.eta, "RELAXED_ZERO": a.eta * (2**a.bits - 1)}
    floats["GAUSSIAN_STEP"] = GAUSSIAN_STEP.get(a.bits, 0.0)
    append = "rotated" if a.append == "folded" else a.append  # ROTATED says which of the two
    return f"#define XQ_APPEND_{append.upper()}\n" + definitions(numbers, floats, flags, a.types) + a.tables


@functools.cache
def source(a: Append, isa: Isa) -> tuple[tuple[str, ...], str]:
    """(argument types, C++ source of ``kernel``).

    The arguments are the tensors that are present, in order, and what ``cpu_call.sizes_given`` says.
    """
    tensors = pointers(StoreArguments, BORROWED if a.fit else OWN)
    function, file = "append_row" if a.by_row else "append", "quantize_store/cpu.cpp"
    return assemble(isa, constants(a), file, function, tensors, a.absent, {}, SIZES, by_row=a.by_row)
