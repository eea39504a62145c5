"""The CPU kernel behind ``xquant::shared_code_load`` in uncompiled code: its call."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor

from xquant_fx.kernels.cpu.at_hand import Kernel, at_hand, begin, built
from xquant_fx.kernels.schemes import SCHEMES, wrap_of
from xquant_fx.kernels.shared_code_load.arguments import LoadArguments
from xquant_fx.kernels.shared_code_load.cpu_source import Load, source
from xquant_fx.tracing import is_transformed, shown
from xquant_fx.warn_once import warn_once

#: Numbers that plain torch dequantizes in about the time that the compiler takes.
WORTH_BUILDING = 100_000_000
_by_torch = Counter[Load]()
_failed: list[bool] = []


def problem_of(a: LoadArguments) -> Load:
    """The kernel for these arguments."""
    assert a.ring is not None and a.scale is not None
    dim = a.ring.shape[3]
    return Load(
        dtype=a.ring.dtype,
        scale_dtype=a.scale.dtype,
        heads=a.ring.shape[1],
        dim=dim,
        append=SCHEMES[a.scheme].APPEND,
        bits=a.bits,
        group=a.group_size,
        residual=a.residual_length,
        ring=a.ring.shape[2],
        wrap=wrap_of(a.scheme, _tokens(a), a.max_len, dim, a.bits, a.group_size, a.residual_length),
        sinks=0 if a.sink is None else a.sink.shape[2] - 1,
        norms=a.norm is not None,
    )


def _tokens(a: LoadArguments) -> int:
    assert a.scale is not None
    return SCHEMES[a.scheme].tokens_of(a.codes.shape, a.scale.shape)


def dequantized(a: LoadArguments) -> Tensor | None:
    """What the op gives, [B, H, n, D], by the kernel: where it was built before, or where plain torch has done so much
    that building it pays. None: plain torch is to do it."""
    if a.bits == 16 or a.codes.device.type != "cpu" or is_transformed(*a.tensors.values()):
        return None
    problem = problem_of(a)
    kernel = at_hand(source, problem)
    if kernel is None and _pays(a, problem):
        kernel = _built(problem)
    return None if kernel is None else _run(kernel, a)


def run(a: LoadArguments) -> Tensor:
    """The same; the kernel is built where it was not yet."""
    return _run(built(source, problem_of(a)), a)


def begin_kernel(a: LoadArguments) -> None:
    """Build the kernel in the background, for loads that are going to come."""
    if a.bits < 16 and a.codes.device.type == "cpu":
        begin(source, problem_of(a))


def _pays(a: LoadArguments, problem: Load) -> bool:
    assert a.ring is not None
    _by_torch[problem] += a.n * a.ring.numel() // a.ring.shape[2]
    return _by_torch[problem] >= WORTH_BUILDING and not _failed


def _built(problem: Load) -> Kernel | None:
    from xquant_fx.kernels.cpu import build  # brings in Inductor's compiler

    if not build.has_compiler():
        return None
    try:
        return built(source, problem)
    except build.CompileError as error:
        _failed.append(True)
        warn_once(f"uncompiled code stays slow with quantized caches, as the C++ compiler fails: {error}", key="load")
        return None


def _run(kernel: Kernel, a: LoadArguments) -> Tensor:
    assert a.ring is not None
    (batch, heads, _, dim), own = a.ring.shape, a.x is not None
    given: dict[str, Any] = {
        "n": a.n, "batch": batch, "new_tokens": a.new_tokens, "tokens": _tokens(a),
        "first": 0 if a.first is None else int(a.first), "own": int(own),
    }  # fmt: skip
    tensors = a.replace(first=None, x=a.x if own else a.ring).mapped(Tensor.contiguous).tensors.values()
    out = torch.empty((batch, heads, a.n, dim), dtype=a.ring.dtype)
    with shown("xquant::shared_code_load"):
        kernel(*tensors, out, *given.values())
    return out
