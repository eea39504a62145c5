"""Empty states of quantized caches, as the product allocates them."""

from __future__ import annotations

import torch
from torch import Tensor

from xquant_fx import XQuantConfig
from xquant_fx.cache.allocate import Geometry, allocate_layers
from xquant_fx.cache.state import KVState
from xquant_fx.plan.plan import Plan, make_plan
from xquant_fx.plan.spec import KVSpec

Shape = tuple[int, int, int, int]


def layers_of(
    settings: XQuantConfig | Plan,
    shape: Shape,
    dtype: torch.dtype,
    num_layers: int = 1,
    *,
    device: str = "cpu",
    start: Tensor | None = None,
) -> list[list[KVState]]:
    """Empty (keys, values) of every layer of one cache, all of one shape [B, H, N, D]."""
    geometry = Geometry(shape, dtype)
    return allocate_layers(
        make_plan(settings, num_layers),
        [(geometry, geometry)] * num_layers,
        batch=shape[0],
        device=torch.device(device),
        start=start,
    )


def spec_of(settings: XQuantConfig | Plan, role: str, shape: Shape, dtype: torch.dtype) -> KVSpec:
    """The spec of the only layer's keys or values."""
    return make_plan(settings, 1).layers[0].of(role).bind(0, shape, dtype, None)
