"""``LaidOutGrowingKV``: keys or values that grow by concatenation along another dimension than 2 of [B, H, N, D].

``torch.cat([past, new], dim=1)`` of tensors [B, N, H, D], say. What ``LaidOutKV`` is to a buffer, this is to a
``GrowingKV``: the same tokens of the same state, under the dimensions that a program has them in. A graph is given
``ordered``, and its result gets the program's dimensions again (``compiler/laid_out_growth.py``).
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from xquant_fx.cache import growing
from xquant_fx.cache.aliases import in_order, laid_out, merged_heads, shape_in
from xquant_fx.cache.growing import GrowingKV
from xquant_fx.cache.reads import wrapper

aten = torch.ops.aten


class LaidOutGrowingKV(GrowingKV):
    """The tokens of ``ordered`` under other dimensions; ``dims`` names them as ``LaidOutKV`` does."""

    ordered: GrowingKV
    dims: str

    @staticmethod
    def __new__(cls, ordered: GrowingKV, dims: str) -> LaidOutGrowingKV:
        made: LaidOutGrowingKV = wrapper(cls, shape_in(dims, ordered.shape), ordered.dtype, ordered.device)
        return made

    def __init__(self, ordered: GrowingKV, dims: str) -> None:
        tokens, growth = ordered.shape[2], ordered.growth
        super().__init__(ordered.spec, ordered.anchor, tokens, growth, ordered.begin, ordered.is_tail)
        self.ordered, self.dims, self.since = ordered, dims, ordered.since
        self.token_dim, self.row_dim = dims.index("N"), dims.index("B") if "B" in dims else None
        if growth is not None:
            self._dynamo_weak_dynamic_indices = {self.token_dim}

    @property
    def end(self) -> int:
        """How many tokens there are, those before this tensor included."""
        return self.ordered.end

    # Dynamo guards on what comes second; the length is not part of it.
    def __tensor_flatten__(self) -> tuple[list[str], tuple[Any, ...]]:
        return ["anchor"], (self.spec, self.is_tail, self.dims)

    @staticmethod
    def __tensor_unflatten__(
        inner: dict[str, Tensor], fixed: tuple[Any, ...], outer_size: Any, outer_stride: Any
    ) -> LaidOutGrowingKV:
        spec, tail, dims = fixed
        ordered = GrowingKV(spec, inner["anchor"], outer_size[dims.index("N")], tail=tail)
        return LaidOutGrowingKV(ordered, dims)

    def _stable_hash_for_caching(self) -> str:
        return super()._stable_hash_for_caching() + self.dims

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"LaidOut{super().__repr__()}"

    def __deepcopy__(self, memo: dict[int, Any]) -> LaidOutGrowingKV:
        new = memo[id(self)] = LaidOutGrowingKV(copy.deepcopy(self.ordered, memo), self.dims)
        return new

    def __reduce_ex__(self, protocol: Any) -> Any:
        return LaidOutGrowingKV, (self.ordered, self.dims)

    def dense(self) -> Tensor:
        """Dequantized copy, contiguous as this is; a tensor of the right shape only, while Dynamo traces."""
        return laid_out(self.ordered.dense(), self.dims).contiguous()

    def append(self, x: Tensor) -> LaidOutGrowingKV:
        """The tensor with ``x``, whose dimensions are this one's, behind it."""
        return LaidOutGrowingKV(self.ordered.append(in_order(x, self.dims)), self.dims)

    def appended(self, new: int, keep: int) -> LaidOutGrowingKV:
        """The last ``keep`` tokens (0: all) after a compiled step stored ``new``; there is room for the next one."""
        return LaidOutGrowingKV(self.ordered.appended(new, keep), self.dims)

    def like_this(self, ordered: Any) -> Any:
        """``ordered`` under these dimensions, if it is a tensor of codes; NotImplemented stays."""
        return LaidOutGrowingKV(ordered, self.dims) if isinstance(ordered, GrowingKV) else ordered


def _cat(tensors: list[Tensor], dim: int = 0) -> Any:
    past, *others = tensors
    if not isinstance(past, LaidOutGrowingKV) or len(others) != 1 or dim % past.dim() != past.token_dim:
        return NotImplemented
    (x,) = others
    if x.dim() != past.dim() or (merged_heads(past.dims) and x.shape[-1] != past.shape[-1]):
        return NotImplemented  # torch says what is wrong
    return past.like_this(growing._cat([past.ordered, in_order(x, past.dims)], 2))


def _slice(kv: LaidOutGrowingKV, dim: int = 0, start: Any = None, end: Any = None, step: int = 1) -> Any:
    if kv.growth is None:
        return NotImplemented
    if dim % kv.dim() == kv.token_dim:
        return kv.like_this(growing._slice(kv.ordered, 2, start, end, step))
    size = kv.shape[dim]
    is_whole = step == 1 and slice(start, end).indices(size)[:2] == (0, size)
    return kv.like_this(growing._slice(kv.ordered, 0)) if is_whole else NotImplemented


def _select_rows(kv: LaidOutGrowingKV, dim: int, index: Tensor) -> Any:
    if kv.row_dim is None or dim % kv.dim() != kv.row_dim:
        return NotImplemented
    return kv.like_this(growing._select_rows(kv.ordered, 0, index))


def _index_rows(kv: LaidOutGrowingKV, indices: list[Tensor | None]) -> Any:
    if kv.row_dim is None or any((index is not None) != (i == kv.row_dim) for i, index in enumerate(indices)):
        return NotImplemented
    return kv.like_this(growing._index_rows(kv.ordered, indices[kv.row_dim : kv.row_dim + 1]))


def _alias(kv: LaidOutGrowingKV) -> Any:
    return kv.like_this(growing._alias(kv.ordered))


LaidOutGrowingKV.handlers = {
    aten.cat.default: _cat,
    aten.slice.Tensor: _slice,
    aten.index_select.default: _select_rows,
    aten.index.Tensor: _index_rows,
    aten.detach.default: _alias,
    aten.alias.default: _alias,
}
