"""The CPU kernel behind ``xquant::linear_rows``: where there is one, and its call."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from xquant_fx.kernels.cpu.source import dtype_of, sizes_of
from xquant_fx.kernels.linear_rows.arguments import LinearArguments
from xquant_fx.kernels.linear_rows.cpu_source import FASTER, Problem, source

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def is_faster_here() -> bool:
    """Whether this processor has vectors that the kernel is written for."""
    # Imported here and below: it brings in Inductor's compiler.
    from xquant_fx.kernels.cpu import build as cpu_build

    return cpu_build.isa().name in FASTER


def problem_of(a: LinearArguments, sizes: Any = sizes_of, dtype: Any = dtype_of) -> Problem:
    """The kernel for these arguments; ``sizes`` and ``dtype`` read a tensor's shape and dtype."""
    return Problem(dtype=dtype(a.x), rows=math.prod(sizes(a.x)[:-1]), bias=a.bias is not None)


def empty_output(*args: Any, **kwargs: Any) -> Tensor:
    """An uninitialised result [..., out]."""
    a = LinearArguments(*args, **kwargs)
    return a.x.new_empty((*a.x.shape[:-1], a.weight.shape[0]))


def run_cpu(*args: Any, **kwargs: Any) -> Tensor:
    """Compile the kernel for this problem, or take it from the cache, and run it."""
    from xquant_fx.kernels.cpu import build as cpu_build

    a = LinearArguments(*args, **kwargs).mapped(Tensor.contiguous)
    types, code = source(problem_of(a), cpu_build.isa())
    out = empty_output(a.x, a.weight)
    cpu_build.load(types, code)(*a.tensors.values(), out, a.weight.shape[1], a.weight.shape[0])
    return out
