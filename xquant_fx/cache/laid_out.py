"""``LaidOutKV``: a quantized buffer whose dimensions a program has in another order than [B, H, N, D].

Hand-written models keep tokens first ([N, H, D]), before the heads ([B, N, H, D]) or last ([B, H, D, N]). Kernels,
passes and reports know one order. So a graph is rewritten to it (``compiler/laid_out_graph.py``), and what the program
holds is this: the same state, under other dimensions.

``dims`` names them: "BNHD", say. A dimension that is not there has size 1 in [B, H, N, D].
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from xquant_fx.cache.aliases import ORDER, in_order, laid_out
from xquant_fx.cache.kv_tensor import QuantizedKV
from xquant_fx.cache.reads import Dequantized
from xquant_fx.cache.state import KVState
from xquant_fx.plan.spec import KVSpec

aten = torch.ops.aten


class LaidOutKV(QuantizedKV):
    """Tokens ``span`` of a quantized buffer, under other dimensions."""

    dims: str

    @staticmethod
    def __new__(
        cls, spec: KVSpec, anchor: Tensor, state: KVState | None, span: tuple[int, int] | None, dims: str
    ) -> LaidOutKV:
        begin, end = span or (0, spec.shape[2])
        sizes = dict(zip(ORDER, (*spec.shape[:2], end - begin, spec.shape[3]), strict=True))
        with torch.inference_mode(False):
            buffer = torch.Tensor._make_wrapper_subclass(
                cls, [sizes[dim] for dim in dims], dtype=spec.dtype, device=anchor.device
            )
        torch._C._set_throw_on_mutable_data_ptr(buffer)
        return buffer

    def __init__(
        self, spec: KVSpec, anchor: Tensor, state: KVState | None, span: tuple[int, int] | None, dims: str
    ) -> None:
        super().__init__(spec, anchor, state, span)
        self.dims = dims
        self.ordered = QuantizedKV(spec, anchor, state, span)
        """The same buffer as [B, H, N, D]."""

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        names, context = super().__tensor_flatten__()
        return names, (*context, self.dims)

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], context: Any, outer_size: Any, outer_stride: Any) -> LaidOutKV:
        spec, span, dims = context
        return LaidOutKV(spec, inner["anchor"], None, span, dims)

    def _stable_hash_for_caching(self) -> str:
        return super()._stable_hash_for_caching() + self.dims

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"LaidOut{super().__repr__()[len('Quantized') :]}"

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _rebuild, (self.live, self.dims, bool(self.live.group.taken_over))

    def standing_for(self, state: KVState) -> LaidOutKV:
        """A buffer like this one of another ``state``."""
        return of_state(state, self.dims)

    def part(self, begin: int, end: int) -> LaidOutKV:
        """A view of tokens [begin, end) of the buffer."""
        return LaidOutKV(self.spec, self.anchor, self.state, (begin, end), self.dims)

    def dense(self) -> Tensor:
        """Dequantized copy; a tensor of the right shape only, while Dynamo traces."""
        return laid_out(self.ordered.dense(), self.dims)

    def append(self, pos: Tensor, x: Tensor) -> None:
        """Store ``x``, whose dimensions are this buffer's, at positions ``pos`` [q], eagerly."""
        at = self.dims.index("N")
        x = x.expand([*self.shape[:at], pos.shape[0], *self.shape[at + 1 :]])
        x = x.dense() if isinstance(x, Dequantized) else x
        self.ordered.append_at(pos, in_order(x, self.dims))


def of_state(state: KVState, dims: str) -> LaidOutKV:
    """The buffer that stands for ``state`` under ``dims``, whose address compiled graphs may take for granted."""
    buffer = LaidOutKV(state.spec, state.owned["length"], state, None, dims)
    torch._dynamo.mark_static_address(buffer)
    return buffer


def _rebuild(state: KVState, dims: str, was_taken_over: bool) -> QuantizedKV:
    return of_state(state, dims).as_taken_over(was_taken_over)


def _is_tokens(kv: LaidOutKV, dim: int) -> bool:
    return "N" in kv.dims and dim % kv.dim() == kv.dims.index("N")


def _index_copy(kv: LaidOutKV, dim: int, pos: Tensor, x: Tensor) -> Any:
    if not _is_tokens(kv, dim):
        return NotImplemented
    kv.append(pos, x)
    return kv


def _index_put(kv: LaidOutKV, indices: Any, x: Tensor, accumulate: bool = False) -> Any:
    given = [i for i, index in enumerate(indices) if index is not None]
    if accumulate or len(given) != 1 or not _is_tokens(kv, given[0]):
        return NotImplemented
    pos = indices[given[0]]
    if pos.dim() != 1 or pos.dtype not in (torch.int64, torch.int32):  # a mask is no positions
        return NotImplemented
    kv.append(pos, x)
    return kv


def _slice(kv: LaidOutKV, dim: int = 0, start: Any = None, end: Any = None, step: int = 1) -> Any:
    if isinstance(start, torch.SymInt) or isinstance(end, torch.SymInt):
        return NotImplemented  # while Dynamo traces; to count from them would make numbers of them
    size = kv.shape[dim]
    begin, stop, _ = slice(start, end).indices(size)
    if (begin, stop) == (0, size) and step == 1:
        return kv.part(*kv.span)
    if not _is_tokens(kv, dim) or step != 1:
        return NotImplemented
    base = kv.span[0]
    return kv.part(base + begin, base + max(begin, stop))


def _select(kv: LaidOutKV, dim: int, index: int) -> Any:
    """``buffer[:, p] = x`` arrives as a copy into the token p."""
    if kv.state is None or not _is_tokens(kv, dim):
        return NotImplemented
    at = kv.span[0] + index % kv.shape[dim]
    return LaidOutKV(kv.spec, kv.anchor, kv.state, (at, at + 1), kv.dims.replace("N", ""))


def _copy(kv: LaidOutKV, source: Tensor, non_blocking: bool = False) -> Any:
    """``buffer[:, a:b] = x`` arrives as a copy into a view of tokens a to b."""
    if kv.is_whole:
        return NotImplemented
    if kv.state is not None:
        numbers = kv.numbers_of(source).expand(kv.shape).to(kv.dtype)
        kv.ordered.append_at(torch.arange(*kv.span, device=kv.device), in_order(numbers, kv.dims))
    return kv


def _index_select(kv: LaidOutKV, dim: int, index: Tensor) -> Any:
    """Rows of the batch, as beam search selects them: the codes themselves are selected."""
    if kv.state is None or not kv.is_whole or "B" not in kv.dims or dim % kv.dim() != kv.dims.index("B"):
        return NotImplemented
    chosen: Any = aten.index_select.default(kv.ordered, 0, index)
    return of_state(chosen.live, kv.dims).as_taken_over(bool(kv.live.group.taken_over))


def _index(kv: LaidOutKV, indices: Any) -> Any:
    rows = indices[-1]
    if any(index is not None for index in indices[:-1]) or rows is None or rows.dim() != 1:
        return NotImplemented
    if rows.dtype not in (torch.int64, torch.int32):
        return NotImplemented
    return _index_select(kv, len(indices) - 1, rows.remainder(kv.shape[len(indices) - 1]))


def _zero(kv: LaidOutKV) -> Any:
    if kv.state is not None:
        kv.live.reset()
    return kv


def _alias(kv: LaidOutKV) -> Any:
    return kv.part(*kv.span)


LaidOutKV.handlers = {
    aten.index_copy_.default: _index_copy,
    aten.index_put_.default: _index_put,
    aten.zero_.default: _zero,
    aten.slice.Tensor: _slice,
    aten.select.int: _select,
    aten.index_select.default: _index_select,
    aten.index.Tensor: _index,
    aten.copy_.default: _copy,
    aten.detach.default: _alias,
    aten.alias.default: _alias,
}
