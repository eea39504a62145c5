"""The CPU kernel behind ``xquant::quantize_store``: one for a step's tokens and for chunks."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from xquant_fx.kernels.cpu.source import dtype_of, sizes_of
from xquant_fx.kernels.quantize_store.arguments import StoreArguments
from xquant_fx.kernels.quantize_store.cpu_source import Append, source
from xquant_fx.kernels.rows import RowLoop
from xquant_fx.kernels.schemes import SCHEMES, wrap_of


def no_output(*args: Any, **kwargs: Any) -> None:
    """What tracing sees: the stored tensors change, nothing is returned."""


def problem_of(a: StoreArguments, sizes: Any = sizes_of, dtype: Any = dtype_of) -> Append:
    """The kernel for these arguments; ``sizes`` and ``dtype`` read a tensor's shape and dtype."""
    scheme = SCHEMES[a.scheme]
    tokens = scheme.tokens_of(sizes(a.codes), sizes(a.scale))
    (batch, heads, _new, dim), loop = sizes(a.x), None
    if len(sizes(a.length)) == 2:
        loop = RowLoop.of(batch, {name: sizes(tensor) for name, tensor in a.tensors.items()})
        batch = 1
    return Append(
        dtype=dtype(a.ring),
        scale_dtype=dtype(a.scale),
        shape=(batch, heads, dim),
        append=scheme.APPEND,
        bits=a.bits,
        group=a.group_size,
        residual=a.residual_length,
        ring=sizes(a.ring)[2],
        tokens=tokens,
        wrap=wrap_of(a.scheme, tokens, a.max_len, dim, a.bits, a.group_size, a.residual_length),
        eta=a.eta,
        sinks=a.sink_tokens,
        max_len=a.max_len,
        fit=a.fit,
        norms=a.norm is not None,
        loop=loop,
    )


def tokens_given(a: StoreArguments, sizes: Any = sizes_of) -> int:
    """What the kernel is told besides tensors: how many tokens are appended."""
    count: int = sizes(a.x)[2]
    return count


def run_cpu(*args: Any, **kwargs: Any) -> None:
    """Compile the kernel for this problem, or take it from the cache, and run it."""
    run(StoreArguments(*args, **kwargs))


def run(a: StoreArguments) -> None:
    """The same."""
    # Imported here: it brings in Inductor's compiler.
    from xquant_fx.kernels.cpu import build as cpu_build

    a = a.mapped(Tensor.contiguous, ("x", "pos"))
    types, code = source(problem_of(a), cpu_build.isa())
    cpu_build.load(types, code)(*a.tensors.values(), tokens_given(a))


def why_no_chunk(a: StoreArguments) -> str:
    """Why chunks are not appended by the kernel, in words; "" if they are. Uncompiled code works without a compiler."""
    from xquant_fx.kernels.cpu import build as cpu_build

    if problem_of(a).wrap:
        return "a chunk may overwrite its own codes where those of a sliding window start over"
    return "" if cpu_build.has_compiler() else "no C++ compiler"
