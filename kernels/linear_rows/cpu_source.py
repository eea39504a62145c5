"""Source of the CPU kernel of ``xquant::linear_rows``: for a dtype, a number of rows and of layers, of any sizes."""

from __future__ import annotations

import dataclasses
import functools

import torch

from xquant_fx.kernels.cpu.isa import Isa
from xquant_fx.kernels.cpu.source import definitions, whole_source
from xquant_fx.kernels.linear_rows.arguments import MOST_ROWS

#: The instruction sets that it is written for: where it was measured to be faster than torch's products.
FASTER = ("avx512", "avx2")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
    """What is fixed when the kernel is compiled."""

    dtype: torch.dtype
    rows: int
    biased: tuple[bool, ...]
    """Of each layer, whether it has a bias."""
    in_first: bool = False
    """Whether the weights of the layer, which is the only one, are [in, out]."""


def constants(p: Problem) -> str:
    """The constants that the C++ relies on."""
    assert 1 <= p.rows <= MOST_ROWS and (len(p.biased) == 1 or not p.in_first)
    return definitions({"ROWS": p.rows, "LAYERS": len(p.biased)}, {}, {}, {"T": p.dtype})


@functools.cache
def source(p: Problem, isa: Isa) -> tuple[tuple[str, ...], str]:
    """(argument types, C++ source of ``kernel``): x, weights, the biases that are there, the output, in, outs."""
    numbers = range(len(p.biased))
    given = {"x": "const xq::T*", **{f"weight{i}": "const xq::T*" for i in numbers}}
    given |= {f"bias{i}": "const xq::T*" for i in numbers if p.biased[i]}
    given |= {"out": "xq::T*", "in_size": "int64_t", **{f"size{i}": "int64_t" for i in numbers}}
    if p.in_first:
        entry = f"xq::product(x, weight0, {'bias0' if p.biased[0] else 'nullptr'}, out, in_size, size0);"
        return whole_source(isa, constants(p), "linear_rows/columns.cpp", given, entry)
    layers = ", ".join(f"{{weight{i}, {f'bias{i}' if p.biased[i] else 'nullptr'}, size{i}}}" for i in numbers)
    entry = f"xq::linear(x, {{{layers}}}, out, in_size);"
    return whole_source(isa, constants(p), "linear_rows/cpu.cpp", given, entry)
