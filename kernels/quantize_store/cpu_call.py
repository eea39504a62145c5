"""The CPU kernel behind ``xquant::quantize_store`` for steps of up to STEP_TOKENS tokens: its call."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from xquant_fx.kernels.cpu.source import dtype_of, sizes_of
from xquant_fx.kernels.quantize_store.arguments import StoreArguments
from xquant_fx.kernels.quantize_store.cpu_source import Append, source
from xquant_fx.kernels.schemes import SCHEMES, wrap_of


def no_output(*args: Any, **kwargs: Any) -> None:
    """What tracing sees: the stored tensors change, nothing is returned."""


def problem_of(a: StoreArguments, sizes: Any = sizes_of, dtype: Any = dtype_of) -> Append:
    """The kernel for these arguments; ``sizes`` and ``dtype`` read a tensor's shape and dtype."""
    scheme = SCHEMES[a.scheme]
    tokens = scheme.tokens_of(sizes(a.codes), sizes(a.scale))
    return Append(
        dtype=dtype(a.ring),
        scale_dtype=dtype(a.scale),
        shape=sizes(a.x),
        append=scheme.APPEND,
        bits=a.bits,
        group=a.group_size,
        residual=a.residual_length,
        ring=sizes(a.ring)[2],
        tokens=tokens,
        wrap=wrap_of(a.scheme, tokens, a.max_len, sizes(a.x)[3], a.bits, a.group_size, a.residual_length),
        eta=a.eta,
        sinks=a.sink_tokens,
        max_len=a.max_len,
        fit=a.fit,
    )


def run_cpu(*args: Any, **kwargs: Any) -> None:
    """Compile the kernel for this problem, or take it from the cache, and run it."""
    # Imported here: it brings in Inductor's compiler.
    from xquant_fx.kernels.cpu import build as cpu_build

    a = StoreArguments(*args, **kwargs).mapped(Tensor.contiguous, ("x", "pos"))
    types, code = source(problem_of(a), cpu_build.isa())
    cpu_build.load(types, code)(*a.tensors.values())
