"""What ops of torch do with a quantized buffer [B, H, N, D] in eager code: ways to append, to cut, to choose rows.

NotImplemented of one of them: the op reads numbers, or is refused if it writes (``reads.py``).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from xquant_fx.cache.held_tokens import heads_apart
from xquant_fx.cache.reads import Dequantized
from xquant_fx.cache.select import reorder, select

aten = torch.ops.aten

#: A ``QuantizedKV``, which brings these functions in.
Buffer = Any


def _is(kv: Buffer, dim: int, meant: int | None) -> bool:
    return meant is not None and dim in (meant, meant - kv.dim())


def _positions(indices: Any, dim: int | None) -> Tensor | None:
    """The positions that ``indices`` choose along ``dim``, if they take all of the other dimensions."""
    if dim is None or len(indices) <= dim or any(index is not None for index in (*indices[:dim], *indices[dim + 1 :])):
        return None
    chosen: Tensor | None = indices[dim]
    if chosen is None or chosen.dim() != 1 or chosen.dtype not in (torch.int64, torch.int32):  # a mask is no positions
        return None
    return chosen


def _index_copy(kv: Buffer, dim: int, pos: Tensor, x: Tensor) -> Any:
    if not _is(kv, dim, kv.token_dim):
        return NotImplemented
    kv.append_at(pos, x)
    return kv


def _index_put(kv: Buffer, indices: Any, x: Tensor, accumulate: bool = False) -> Any:
    pos, at = _positions(indices, kv.token_dim), kv.token_dim
    if accumulate or pos is None or at is None:
        return NotImplemented
    if x.dim() < kv.dim() or 1 in x.shape:  # what torch would broadcast
        x = x.expand(*kv.shape[:at], pos.shape[0], *kv.shape[at + 1 :])
    kv.append_at(pos, x)
    return kv


def _zero(kv: Buffer) -> Any:
    """Zeros are no tokens: nothing is left, or nothing from a token on. In the middle they are refused."""
    if kv.state is None:
        return kv
    begin, end = kv.span
    if kv.is_whole:
        kv.state.reset()
    elif kv.spec.ragged or end < kv.state.length:
        return NotImplemented
    elif begin < kv.state.length:
        kv.state.truncate(begin)
    return kv


def _fill(kv: Buffer, value: Any) -> Any:
    """``buffer[:, :, n:] = 0`` arrives so, too."""
    return aten.zero_.default(kv) if kv.state is not None and is_zero(value) else NotImplemented


def is_zero(value: Any) -> bool:
    """Whether a fill is with 0; of a tensor that Dynamo traces it is not known."""
    return not isinstance(value, FakeTensor) and bool(value == 0)


def _slice(kv: Buffer, dim: int = 0, start: Any = None, end: Any = None, step: int = 1) -> Any:
    if isinstance(start, torch.SymInt) or isinstance(end, torch.SymInt):
        return NotImplemented  # while Dynamo traces; to count from them would make numbers of them
    size = kv.shape[dim]
    begin, stop, _ = slice(start, end).indices(size)
    if (begin, stop) == (0, size) and step == 1:
        return kv.part(*kv.span)
    if not _is(kv, dim, kv.token_dim) or step != 1:
        return NotImplemented
    base = kv.span[0]
    return kv.part(base + begin, base + max(begin, stop))


def _select(kv: Buffer, dim: int, index: int) -> Any:
    """``buffer[:, :, p] = x`` arrives as a copy into the token p."""
    if not _is(kv, dim, kv.token_dim) or kv.state is None or not -kv.shape[dim] <= index < kv.shape[dim]:
        return NotImplemented
    return kv.token(kv.span[0] + index % kv.shape[dim])


def _index_select(kv: Buffer, dim: int, index: Tensor) -> Any:
    """Rows of the batch, as beam search selects them: the codes themselves are selected."""
    if not _is(kv, dim, kv.row_dim) or kv.state is None or not kv.is_whole:
        return NotImplemented
    chosen = kv.standing_for(select(kv.state, index.reshape(-1)))
    return chosen.as_taken_over(bool(kv.state.group.taken_over))


def _index(kv: Buffer, indices: Any) -> Any:
    rows = _positions(indices, kv.row_dim)
    if rows is None or kv.row_dim is None:
        return NotImplemented
    return _index_select(kv, kv.row_dim, rows.remainder(kv.shape[kv.row_dim]))


def _copy(kv: Buffer, source: Tensor, non_blocking: bool = False) -> Any:
    """``buffer[:, :, a:b] = x`` arrives as a copy into a view of tokens a to b."""
    if kv.is_whole:
        chosen = getattr(source, "state", None) if isinstance(source, Dequantized) else None
        return kv if kv.state is not None and reorder(kv.state, chosen) else NotImplemented
    if kv.state is not None:
        kv.append_at(torch.arange(*kv.span, device=kv.device), source.expand(kv.shape).to(kv.dtype))
    return kv


def _alias(kv: Buffer) -> Any:
    return kv.part(*kv.span)


#: For buffers whose dimensions are in any order.
HANDLERS = {
    aten.index_copy_.default: _index_copy,
    aten.index_put_.default: _index_put,
    aten.zero_.default: _zero,
    aten.fill_.Scalar: _fill,
    aten.fill_.Tensor: _fill,
    aten.slice.Tensor: _slice,
    aten.select.int: _select,
    aten.index_select.default: _index_select,
    aten.index.Tensor: _index,
    aten.copy_.default: _copy,
    aten.detach.default: _alias,
    aten.alias.default: _alias,
    aten.unsqueeze.default: heads_apart,
}
