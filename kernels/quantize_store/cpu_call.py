"""The CPU kernel behind ``xquant::quantize_store`` for steps of up to STEP_TOKENS tokens: its call."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from xquant_fx.kernels.cpu.source import dtype_of, sizes_of
from xquant_fx.kernels.quantize_store.cpu_source import Append, source


class Arguments(NamedTuple):
    """Arguments of ``xquant::quantize_store``."""

    x: Tensor
    pos: Tensor
    codes: Tensor
    scale: Tensor
    zero: Tensor
    ring: Tensor
    sink: Tensor | None
    start: Tensor
    length: Tensor
    fault: Tensor
    side: str
    bits: int
    group_size: int
    residual_length: int
    eta: float
    sink_tokens: int
    max_len: int
    fit: str | None = None

    @property
    def tensors(self) -> list[Tensor]:
        """The tensors that are there, in order."""
        return [value for value in self[:10] if value is not None]


def no_output(*args: Any, **kwargs: Any) -> None:
    """What tracing sees: the stored tensors change, nothing is returned."""


def problem_of(a: Arguments, sizes: Any = sizes_of, dtype: Any = dtype_of) -> Append:
    """The kernel for these arguments; ``sizes`` and ``dtype`` read a tensor's shape and dtype."""
    tokens = sizes(a.codes)[3] if a.side == "key" else sizes(a.scale)[3]
    return Append(
        dtype=dtype(a.ring), scale_dtype=dtype(a.scale), shape=sizes(a.x), side=a.side, bits=a.bits, group=a.group_size,
        residual=a.residual_length, ring=sizes(a.ring)[2], tokens=tokens, eta=a.eta, sinks=a.sink_tokens,
        max_len=a.max_len, fit=a.fit,
    )  # fmt: skip


def run_cpu(*args: Any, **kwargs: Any) -> None:
    """Compile the kernel for this problem, or take it from the cache, and run it."""
    # Imported here: it brings in Inductor's compiler.
    from xquant_fx.kernels.cpu import build as cpu_build

    a = Arguments(*args, **kwargs)
    a = a._replace(x=a.x.contiguous(), pos=a.pos.contiguous())
    types, code = source(problem_of(a), cpu_build.isa())
    cpu_build.load(types, code)(*a.tensors)
