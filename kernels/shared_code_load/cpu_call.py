"""The CPU kernel behind ``xquant::shared_code_load`` in uncompiled code: its call."""

from __future__ import annotations

import torch
from torch import Tensor

from xquant_fx.kernels.cpu.at_hand import are_wanted, built, why_none
from xquant_fx.kernels.cpu.side import Side, fields_of_side, tokens_of
from xquant_fx.kernels.shared_code_load.arguments import LoadArguments
from xquant_fx.kernels.shared_code_load.cpu_source import SIZES, source
from xquant_fx.tracing import is_transformed, shown

#: Numbers from which on plain torch takes so long to dequantize them that the kernel is worth waiting for, everywhere.
MANY = 65_536


def problem_of(a: LoadArguments) -> Side:
    """The kernel for these arguments."""
    return Side(**fields_of_side(a, 0 if a.sink is None else a.sink.shape[2] - 1))


def dequantized(a: LoadArguments) -> Tensor | None:
    """What the op gives, [B, H, n, D], by the kernel; None where plain torch is to do it: few numbers in a model that
    is not compiled, or no compiler."""
    if a.bits == 16 or a.codes.device.type != "cpu" or is_transformed(*a.tensors.values()):
        return None
    if not are_wanted() and _numbers(a) < MANY:
        return None
    return None if why_none(source, problem_of(a)) else run(a)


def _numbers(a: LoadArguments) -> int:
    assert a.ring is not None
    batch, heads, _, dim = a.ring.shape
    return batch * heads * a.n * dim


def run(a: LoadArguments) -> Tensor:
    """The same; the kernel is built where it was not yet."""
    tensors = tensors_given(a)
    kernel = built(source, problem_of(a))
    with shown("xquant::shared_code_load"):
        kernel(*tensors, *sizes_given(a))
    return tensors[-1]


def tensors_given(a: LoadArguments) -> list[Tensor]:
    """The tensors that the kernel takes, the last of them for what it gives back."""
    assert a.ring is not None
    batch, heads, _, dim = a.ring.shape
    given = a.replace(first=None, x=a.ring if a.x is None else a.x).mapped(Tensor.contiguous).tensors.values()
    return [*given, torch.empty((batch, heads, a.n, dim), dtype=a.ring.dtype)]


def sizes_given(a: LoadArguments) -> list[int]:
    """What it takes behind them: ``SIZES``."""
    given = {
        "n": a.n, "batch": a.codes.shape[0], "new_tokens": a.new_tokens, "tokens": tokens_of(a),
        "first": 0 if a.first is None else int(a.first), "own": int(a.x is not None),
    }  # fmt: skip
    return [given[name] for name in SIZES]
