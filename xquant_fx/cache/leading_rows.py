"""``LeadingRowsKV``: a buffer with room for more rows than a program's batch has, of which the first are quantized.

Hand-written models allocate for the largest batch and take what a batch needs: ``keys[:batch, :, pos] = k``. These rows
are a buffer of their own to kernels, passes and reports; the others stay an ordinary tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from xquant_fx.cache.reads import wrapper
from xquant_fx.cache.stacked import HANDLERS, StackedKV, dense_of, part_of

aten = torch.ops.aten


class LeadingRowsKV(StackedKV):
    """``parts``: the first rows [b, ...], and those behind them, one buffer [B, ...] together."""

    @staticmethod
    def __new__(cls, parts: Sequence[Any], at: int = 0) -> LeadingRowsKV:
        shape = [sum(part.shape[0] for part in parts), *parts[0].shape[1:]]
        made: LeadingRowsKV = wrapper(cls, shape, parts[0].dtype, parts[0].device)
        return made

    def __init__(self, parts: Sequence[Any], at: int = 0) -> None:
        super().__init__(parts, 0)

    @staticmethod
    def __tensor_unflatten__(
        inner: dict[str, Tensor], context: Any, outer_size: Any, outer_stride: Any
    ) -> LeadingRowsKV:
        return LeadingRowsKV([part_of(inner, *each) for each in context[1]])

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"LeadingRowsKV({self.origin}, shape={tuple(self.shape)}, rows={self.rows})"

    @property
    def rows(self) -> int:
        """How many rows are quantized."""
        return int(self.parts[0].shape[0])

    def dense(self) -> Tensor:
        """Dequantized copy; a tensor of the right shape only, while Dynamo traces."""
        return torch.cat([dense_of(part) for part in self.parts])

    def part_dim(self, dim: int) -> int | None:
        """``dim``, but None of the rows."""
        return dim % self.dim() or None

    def shares(self, x: Tensor, at: int) -> Sequence[Tensor]:
        """What each part gets of ``x``."""
        return x.split([part.shape[0] for part in self.parts])

    def some_parts(self, start: Any, end: Any, step: int) -> Any:
        """Rows that one part has; NotImplemented of others."""
        begin, stop, _ = slice(start, end).indices(self.shape[0])
        if step != 1 or (begin < self.rows < stop and (begin, stop) != (0, self.shape[0])):
            return NotImplemented
        if (begin, stop) == (0, self.shape[0]):
            return self.mapped(aten.alias.default, 0)
        offset = self.rows if begin >= self.rows else 0
        return aten.slice.Tensor(self.parts[bool(offset)], 0, begin - offset, stop - offset)

    def rest_of(self, indices: list[Any]) -> list[Any]:
        """An index of all as one of a part."""
        return indices


def _select(kv: LeadingRowsKV, dim: int, index: int) -> Any:
    inner = kv.part_dim(dim)
    if inner is not None:
        return kv.mapped(lambda part: aten.select.int(part, inner, index), 0)
    row = index % kv.shape[0]
    return aten.select.int(kv.parts[row >= kv.rows], 0, row - kv.rows if row >= kv.rows else row)


def _unbind(kv: LeadingRowsKV, dim: int = 0) -> Any:
    return NotImplemented


LeadingRowsKV.handlers = {**HANDLERS, aten.select.int: _select, aten.unbind.int: _unbind}
