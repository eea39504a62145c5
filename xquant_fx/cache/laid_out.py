"""``LaidOutKV``: a quantized buffer whose dimensions a program has in another order than [B, H, N, D].

Hand-written models keep tokens first ([N, H, D]), before the heads ([B, N, H, D]) or last ([B, H, D, N]). Kernels,
passes and reports know one order. So a graph is rewritten to it (``compiler/laid_out_graph.py``), and what the program
holds is this: the same state, under other dimensions.

``dims`` names them: "BNHD", say. A dimension that is not there has size 1 in [B, H, N, D]; a number says into how many
heads the channels are split there ("BN12D": [B, N, 12 * D]).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from xquant_fx.cache.aliases import in_order, laid_out, shape_in
from xquant_fx.cache.buffer_ops import HANDLERS
from xquant_fx.cache.kv_tensor import QuantizedKV
from xquant_fx.cache.reads import wrapper
from xquant_fx.cache.state import KVState
from xquant_fx.plan.spec import KVSpec


class LaidOutKV(QuantizedKV):
    """Tokens ``span`` of a quantized buffer, under other dimensions."""

    dims: str

    @staticmethod
    def __new__(
        cls, spec: KVSpec, anchor: Tensor, state: KVState | None, span: tuple[int, int] | None, dims: str
    ) -> LaidOutKV:
        begin, end = span or (0, spec.shape[2])
        shape = shape_in(dims, (*spec.shape[:2], end - begin, spec.shape[3]))
        made: LaidOutKV = wrapper(cls, shape, spec.dtype, anchor.device)
        return made

    def __init__(
        self, spec: KVSpec, anchor: Tensor, state: KVState | None, span: tuple[int, int] | None, dims: str
    ) -> None:
        self.dims = dims
        super().__init__(spec, anchor, state, span)
        self.token_dim, self.row_dim = (dims.index(dim) if dim in dims else None for dim in "NB")
        self.ordered = QuantizedKV(spec, anchor, state, span)
        """The same buffer as [B, H, N, D]."""

    def context(self, spec: KVSpec) -> tuple[Any, ...]:
        """What Dynamo guards on."""
        return *self.exact_context(spec), self.dims

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
        """Dequantized copy, contiguous as this is; a tensor of the right shape only, while Dynamo traces."""
        return laid_out(self.ordered.dense(), self.dims).contiguous()

    def append_at(self, pos: Tensor, x: Tensor) -> None:
        """Store ``x``, whose dimensions are this buffer's, at positions ``pos`` [q], eagerly."""
        self.ordered.append_at(pos, in_order(x, self.dims))

    def token(self, at: int) -> LaidOutKV:
        """The token ``at``, without a dimension of tokens."""
        return LaidOutKV(self.spec, self.anchor, self.state, (at, at + 1), self.dims.replace("N", ""))


def of_state(state: KVState, dims: str) -> LaidOutKV:
    """The buffer that stands for ``state`` under ``dims``, whose address compiled graphs may take for granted."""
    buffer = LaidOutKV(state.spec, state.group.anchor, state, None, dims)
    torch._dynamo.mark_static_address(buffer)
    return buffer


def _rebuild(state: KVState, dims: str, was_taken_over: bool) -> QuantizedKV:
    return of_state(state, dims).as_taken_over(was_taken_over)


LaidOutKV.handlers = dict(HANDLERS)
