"""Empty states of quantized caches, as the product allocates them."""

from __future__ import annotations

from typing import Any, get_args

import torch
from torch import Tensor

from xquant_fx import XQuantConfig
from xquant_fx.cache.allocate import Geometry, allocate, bind_all
from xquant_fx.cache.group import CacheGroup
from xquant_fx.cache.state import KVState
from xquant_fx.plan.plan import Plan, make_plan
from xquant_fx.plan.spec import KVSpec, Role

Shape = tuple[int, int, int, int]


def range_config(**fields: Any) -> XQuantConfig:
    """The preset ``xquant`` (range codes, values shared) with ``fields``."""
    return XQuantConfig.preset("xquant").replace(**fields)


def layers_of(
    settings: XQuantConfig | Plan,
    shape: Shape,
    dtype: torch.dtype,
    num_layers: int = 1,
    *,
    device: str = "cpu",
    start: Tensor | None = None,
    ragged: bool = False,
) -> list[list[KVState]]:
    """Empty (keys, values) of every layer of one cache, all of one shape [B, H, N, D]; ``ragged``: rows differ."""
    plan, roles = make_plan(settings, num_layers), get_args(Role)
    of_each = Geometry(shape, dtype, ragged=ragged)
    specs = bind_all(plan, [(layer, role, of_each) for layer in range(num_layers) for role in roles])
    states = allocate(CacheGroup(plan, shape[0], torch.device(device), start), specs)
    return [states[i : i + 2] for i in range(0, len(states), 2)]


def spec_of(settings: XQuantConfig | Plan, role: str, shape: Shape, dtype: torch.dtype) -> KVSpec:
    """The spec of the only layer's keys or values."""
    return make_plan(settings, 1).layers[0].of(role).bind(0, shape, dtype, None)


def bare_spec(**fields: Any) -> KVSpec:
    """A spec as its fields say, without a plan; those that are not given are something plain."""
    plain = dict(
        layer=0, dtype=torch.float32, eta=0.0, sink_tokens=0, scale_dtype=torch.float32, partner=None, fit="minmax"
    )
    return KVSpec(**{**plain, **fields})
