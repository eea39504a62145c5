"""The CPU kernel behind ``xquant::quantize_store``: one for a step's tokens and for chunks."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from xquant_fx.kernels.cpu.at_hand import built, why_none
from xquant_fx.kernels.cpu.side import fields_of_side, tokens_of
from xquant_fx.kernels.cpu.source import dtype_of, sizes_of
from xquant_fx.kernels.quantize_store.arguments import StoreArguments
from xquant_fx.kernels.quantize_store.cpu_source import SIZES, Append, source
from xquant_fx.kernels.rows import row_loop


def no_output(*args: Any, **kwargs: Any) -> None:
    """What tracing sees: the stored tensors change, nothing is returned."""


def problem_of(a: StoreArguments, sizes: Any = sizes_of, dtype: Any = dtype_of) -> Append:
    """The kernel for these arguments; ``sizes`` and ``dtype`` read a tensor's shape and dtype."""
    fields = fields_of_side(a, a.sink_tokens, sizes, dtype)
    return Append(**fields, eta=a.eta, fit=a.fit, by_row=_by_row(a, sizes))


def _by_row(a: StoreArguments, sizes: Any) -> bool:
    return len(sizes(a.length)) == 2


def sizes_given(a: StoreArguments, sizes: Any = sizes_of) -> list[int]:
    """What the kernel takes behind the tensors: ``SIZES``, and those of a loop over rows."""
    (batch, _, count, _), by_row = sizes(a.x), _by_row(a, sizes)
    given = {"count": count, "batch": 1 if by_row else batch, "max_len": a.max_len, "tokens": tokens_of(a, sizes)}
    loop = row_loop(batch, {name: sizes(tensor) for name, tensor in a.tensors.items()}) if by_row else ()
    return [*(given[name] for name in SIZES), *loop]


def run_cpu(*args: Any, **kwargs: Any) -> None:
    """Compile the kernel for this problem, or take it from the cache, and run it."""
    run(StoreArguments(*args, **kwargs))


def run(a: StoreArguments) -> None:
    """The same."""
    a = a.mapped(Tensor.contiguous, ("x", "pos"))
    built(source, problem_of(a))(*a.tensors.values(), *sizes_given(a))


def why_no_chunk(a: StoreArguments) -> str:
    """Why chunks are not appended by the kernel, in words; "" if they are. Uncompiled code works without a compiler."""
    problem = problem_of(a)
    if problem.wrap:
        return "a chunk may overwrite its own codes where those of a sliding window start over"
    return why_none(source, problem)
