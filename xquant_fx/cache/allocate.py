"""Allocation of a quantized cache inside a compiled region: a cold, compiled prefill.

Dynamo puts one call to :func:`quantized_empty` a buffer into its graph and takes the result for an
ordinary tensor. The backend runs such a graph, which is a cache's first step, as it stands, without
compiling it; the buffers it returns are quantized, and the next step is compiled for them.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

from xquant_fx.cache.kv_tensor import QuantizedKV
from xquant_fx.cache.state import CacheGroup, KVState
from xquant_fx.errors import CacheStateError
from xquant_fx.plan.config import XQuantConfig
from xquant_fx.plan.pairing import borrow_or_own
from xquant_fx.plan.spec import KVSpec


def planned_spec(
    buffer: Tensor, lower: KVSpec | None, layer: int, count: int, side: str, max_len: int, dim: int, config: str
) -> KVSpec:
    """The spec of an empty buffer such as ``buffer`` [B, H, any, dim]; ``lower``: that of the layer below."""
    shape = (buffer.shape[0], buffer.shape[1], max_len, dim)
    return borrow_or_own(shape, buffer.dtype, XQuantConfig.from_json(config), side, layer, count, lower).spec


def quantized_empty(
    like: Tensor, first: Tensor | None, lower: Tensor | None, start: Tensor | None,
    layer: int, count: int, side: str, max_len: int, dim: int, config: str,
) -> Tensor:
    """An empty quantized buffer [B, H, max_len, dim]; ``first`` is the first buffer of the same cache."""
    if isinstance(like, FunctionalTensor):
        raise CacheStateError(
            'an XQuantCache must be compiled with backend="xquant", not with plain Inductor '
            "(or initialised before: run one eager step)"
        )
    if isinstance(like, FakeTensor):
        return like.new_empty((*like.shape[:2], max_len, dim))
    if isinstance(first, QuantizedKV):
        group = first._live().group
    else:
        group = CacheGroup(XQuantConfig.from_json(config), like.shape[0], like.device, start)
    below = lower._live() if isinstance(lower, QuantizedKV) else None
    spec = planned_spec(like, below.spec if below is not None else None, layer, count, side, max_len, dim, config)
    buffer = QuantizedKV.of(KVState(spec, group, below if spec.borrowed else None))
    torch._dynamo.mark_static_address(buffer)
    return buffer


torch.compiler.allow_in_graph(quantized_empty)
