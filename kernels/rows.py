"""Batches whose rows have lengths of their own: each row is a batch of one. Plain torch and C++ kernels take one after
the other, Triton kernels all in one launch.

Nothing but shapes tells such a call: ``quantize_store`` is given positions [B, q], lengths [B, 2] and faults [B], loads
and attention tokens before the step [B]. Every tensor has a row in its first dimension, but for those of ``SHARED``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TypeVar

from torch import Tensor

from xquant_fx.kernels.arguments import Arguments

A = TypeVar("A", bound=Arguments)

#: What all rows have in common.
SHARED = frozenset({"sink_logits", "first"})
#: What a batch that has one length has without its first dimension.
PER_ROW = frozenset({"pos", "length"})


def row_of(a: A, row: int) -> A:
    """The arguments of ``row`` alone, views of those of the batch."""

    def part(name: str, tensor: Tensor) -> Tensor:
        if name in SHARED or (name == "mask" and tensor.shape[0] == 1):
            return tensor
        one = tensor.narrow(0, row, 1)
        return one[0] if name in PER_ROW else one

    return a.replace(**{name: part(name, tensor) for name, tensor in a.tensors.items()})


def row_loop(rows: int, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
    """How a C++ kernel of one row is called for each: their number, and how many elements lie between a row and the
    next in each of the contiguous tensors of these shapes, in order."""

    def pitch(name: str, shape: tuple[int, ...]) -> int:
        shared = name in SHARED or (name == "mask" and shape[0] == 1)
        return 0 if shared else math.prod(shape) // rows

    return rows, *(pitch(name, shape) for name, shape in shapes.items())


def write_rows_(buffer: Tensor, pos: Tensor, x: Tensor) -> Tensor:
    """Write tokens ``x`` [B, H, q, D] to ``buffer`` [B, H, N, D] at positions ``pos`` int64 [B, q], each row's own.

    What ``passes/row_writes.py`` makes of all spellings of this.
    """
    return buffer.scatter_(2, pos[:, None, :, None].expand(x.shape), x)
