"""Eager appends at a position per row, and views of one row: how :class:`QuantizedKV` takes them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from xquant_fx.cache.kv_tensor import QuantizedKV
from xquant_fx.cache.ragged import RaggedState

aten = torch.ops.aten
_index_put, _slice = (QuantizedKV.handlers[op] for op in (aten.index_put_.default, aten.slice.Tensor))


def _put(kv: QuantizedKV, indices: Any, x: Tensor, accumulate: bool = False) -> Any:
    if accumulate or len(indices) != 3 or indices[0] is None or indices[1] is not None:
        return _index_put(kv, indices, x, accumulate)
    return _put_rows(kv, indices[0], indices[2], x)


def _put_rows(kv: QuantizedKV, rows: Tensor, pos: Tensor, x: Tensor) -> Any:
    """``buffer[rows, :, pos] = x``: one token [n, H, D] of n rows, or some [n, q, H, D] at ``pos`` [n, q]."""
    rows, pos = torch.broadcast_tensors(rows, pos)
    if pos.dim() not in (1, 2) or torch.bool in (rows.dtype, pos.dtype):
        return NotImplemented
    x = x.expand(*pos.shape, kv.shape[1], kv.shape[3])
    if pos.dim() == 1:
        rows, pos, x = rows[:, None], pos[:, None], x[:, None]
    x = x.transpose(1, 2)
    if kv.state is None:
        return _append_rows(kv, pos, x) if pos.shape[0] == kv.shape[0] else kv
    chosen = [row % kv.shape[0] for row in rows[:, 0].tolist()]
    if not bool((rows == rows[:, :1]).all()) or len(set(chosen)) < len(chosen):
        return NotImplemented
    if chosen == list(range(kv.shape[0])):
        return _append_rows(kv, pos, x)
    if not isinstance(kv.state, RaggedState):
        return NotImplemented
    kv.state.store_rows(chosen, kv.numbers_of(x), pos)
    return kv


def _scatter(kv: QuantizedKV, dim: int, index: Tensor, x: Tensor) -> Any:
    """``buffer.scatter_(2, index, x)`` with one position [B, H, q, D] for all heads and channels of a token."""
    tokens = (*kv.shape[:2], index.shape[-2], kv.shape[3])
    if dim not in (2, -2) or tuple(index.shape) != tokens or tuple(x.shape) != tokens:
        return NotImplemented
    pos = index[:, 0, :, 0]
    if kv.state is not None and not torch.equal(index, pos[:, None, :, None].expand(tokens)):
        return NotImplemented
    return _append_rows(kv, pos, x)


def _append_rows(kv: QuantizedKV, pos: Tensor, x: Tensor) -> Any:
    """All rows at positions of their own [B, q]; of a buffer whose rows have one length these must be the same."""
    if kv.state is not None and not kv.spec.ragged:
        if not torch.equal(pos, pos[:1].expand(pos.shape)):
            return NotImplemented
        pos = pos[0]
    kv.append_at(pos, x)
    return kv


def _part(kv: QuantizedKV, dim: int = 0, start: Any = None, end: Any = None, step: int = 1) -> Any:
    """``buffer[r : r + 1]`` is a buffer of its own, to which a prompt may be written, where rows have own lengths."""
    if dim not in (0, -4) or not isinstance(kv.state, RaggedState):
        return _slice(kv, dim, start, end, step)
    begin, stop, _ = slice(start, end).indices(kv.shape[0])
    if not step == stop - begin == 1 < kv.shape[0]:
        return _slice(kv, dim, start, end, step)
    row = kv.state.rows[begin]
    return QuantizedKV(row.spec, row.group.anchor, row, kv.span)


QuantizedKV.handlers |= {
    aten.index_put_.default: _put,
    aten.scatter_.src: _scatter,
    aten.slice.Tensor: _part,
}
