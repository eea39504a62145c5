"""Which layers share codes: the plan of one side of one layer.

Layers are numbered 0, 1, 2 ... in layer order and paired (2i, 2i + 1), never shifted. A pair shares
the codes of a side when its upper layer is at or past ``share_*_from`` and both layers agree in
geometry and bits; otherwise each keeps its own codes, and the plan says why. The lower layer stores
the same either way, so a plan needs to know only the layer below.
"""

from __future__ import annotations

import dataclasses

import torch

from xquant_fx.errors import ConfigError
from xquant_fx.plan.config import XQuantConfig
from xquant_fx.plan.spec import SCHEME_OF_ROLE, KVSpec


@dataclasses.dataclass(frozen=True)
class SidePlan:
    """The spec of one side of one layer, and why it reads its own codes (or "" if it borrows)."""

    spec: KVSpec
    reason: str


def borrow_or_own(
    shape: tuple[int, int, int, int], dtype: torch.dtype, config: XQuantConfig, side: str, layer: int, count: int,
    lower: KVSpec | None,
) -> SidePlan:
    """Plan ``side`` ("key" or "value") of quantized layer ``layer`` of ``count``.

    Args:
        shape: [B, H, N, D] of the buffer, N being max_cache_len in tokens.
        lower: spec of the same side of layer ``layer - 1``; None where there is none to pair with.
    """
    bits = config.bits(side, layer, count)
    spec = KVSpec(
        role=side, scheme=SCHEME_OF_ROLE[side], layer=layer, shape=shape, dtype=dtype, bits=bits,
        group_size=_group_size(shape[3], config, side, layer), residual_length=config.residual_length,
        eta=config.eta(bits), sink_tokens=config.sink_tokens, scale_dtype=config.scale_dtype,
        partner=None, fit=config.shared_fit,
    )
    reason = _why_own(spec, config, count, lower)
    partner = None if reason else layer - 1
    return SidePlan(dataclasses.replace(spec, partner=partner, reason=reason), reason)


def _why_own(spec: KVSpec, config: XQuantConfig, count: int, lower: KVSpec | None) -> str:
    layer = spec.layer
    if layer % 2 == 0:
        return "lower layer of its pair" if layer + 1 < count else "the last layer has no partner"
    start = config.share_start(spec.role, count)
    if layer < start:
        field = "share_keys_from" if spec.role == "key" else "share_values_from"
        return f"{field} starts sharing at layer {start}" if start < count else "sharing is off"
    if lower is None:
        return f"layer {layer - 1} is not in reach"
    if 16 in (spec.bits, lower.bits):
        return "16-bit storage has no codes to share"
    if spec.bits != lower.bits:
        return f"layers {layer - 1} and {layer} differ in bits: {lower.bits} and {spec.bits}"
    mine, below = ((s.shape, s.dtype, s.group_size) for s in (spec, lower))
    if mine != below:
        return f"layers {layer - 1} and {layer} differ in geometry: {below} and {mine}"
    return ""


def _group_size(dim: int, config: XQuantConfig, side: str, layer: int) -> int:
    if side == "key":
        return config.k_group_size
    group = config.v_group_size or dim
    if dim % group:
        raise ConfigError(
            f"layer {layer}: v_group_size must divide head_dim, got v_group_size={group} and head_dim={dim}"
        )
    return group
