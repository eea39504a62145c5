"""Source of the CPU kernel of ``xquant::linear_rows``: one for a dtype and a number of rows, whatever the sizes."""

from __future__ import annotations

import dataclasses
import functools

import torch

from xquant_fx.kernels.arguments import Overload
from xquant_fx.kernels.cpu.isa import Isa
from xquant_fx.kernels.cpu.source import assemble, definitions, pointers
from xquant_fx.kernels.linear_rows.arguments import LinearArguments

#: The instruction sets that it is written for: where it was measured to be faster than torch's products.
FASTER = ("avx512", "avx2")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
    """What is fixed when the kernel is compiled."""

    dtype: torch.dtype
    rows: int
    bias: bool


def constants(p: Problem) -> str:
    """The constants that the C++ relies on."""
    return definitions({"ROWS": p.rows}, {}, {"HAS_BIAS": p.bias}, {"T": p.dtype})


@functools.cache
def source(p: Problem, isa: Isa) -> tuple[tuple[str, ...], str]:
    """(argument types, C++ source of ``kernel``): the tensors that are present, the output, and both sizes."""
    outputs = {"out": "xq::T*", "in_size": "int64_t", "out_size": "int64_t"}
    absent = set() if p.bias else {"bias"}
    tensors = pointers(LinearArguments, Overload())
    return assemble(isa, constants(p), "linear_rows/cpu.cpp", "linear", tensors, absent, outputs)
