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
    """Whether this processor has vectors that the kernel is written for, as torch names them.

    Inductor would have to try its compiler first (``isa``), which goes on in the background meanwhile.
    """
    return torch.backends.cpu.get_cpu_capability().lower() in FASTER


def problem_of(a: LinearArguments, sizes: Any = sizes_of, dtype: Any = dtype_of) -> Problem:
    """The kernel for these arguments; ``sizes`` and ``dtype`` read a tensor's shape and dtype."""
    biased = tuple(bias is not None for bias in a.biases)
    rows = math.prod(sizes(a.x)[:-1])
    return Problem(dtype=dtype(a.x), rows=rows, biased=biased, in_first=a.in_first)


def sizes_given(a: LinearArguments, sizes: Any = sizes_of) -> list[int]:
    """What the kernel takes behind the tensors and the output: in, and out of each layer."""
    return [sizes(a.x)[-1], *(sizes(weight)[int(a.in_first)] for weight in a.weights)]


def empty_output(*args: Any, **kwargs: Any) -> Tensor:
    """An uninitialised result: rows times all layers' out."""
    a = LinearArguments(*args, **kwargs)
    return a.x.new_empty(problem_of(a).rows * sum(sizes_given(a)[1:]))


def run_cpu(*args: Any, **kwargs: Any) -> Tensor:
    """Compile the kernel for this problem, or take it from the cache, and run it."""
    from xquant_fx.kernels.cpu import build as cpu_build  # brings in Inductor's compiler

    a = LinearArguments(*args, **kwargs).mapped(Tensor.contiguous)
    out = empty_output(a.x, a.weights, a.biases, a.in_first)
    cpu_build.load(*source(problem_of(a), cpu_build.isa()))(*a.tensors, out, *sizes_given(a))
    return out
