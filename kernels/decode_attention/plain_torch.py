"""``xquant::decode_attention`` in plain torch, on dequantized keys and values: for devices without a kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from xquant_fx.kernels.decode_attention.arguments import OF_KEYS, OF_SIDE, DecodeArguments
from xquant_fx.kernels.schemes import SCHEMES
from xquant_fx.kernels.shared_code_load.arguments import LoadArguments
from xquant_fx.kernels.shared_code_load.plain_torch import load_as_stored


def _loaded(a: DecodeArguments) -> tuple[Tensor, Tensor]:
    """Keys and values [B, KV heads, max_len, D]."""
    loaded = []
    for side, names in (("k", (*OF_SIDE, *OF_KEYS)), ("v", OF_SIDE)):
        stored = {name: getattr(a, f"{side}_{name}") for name in (*names, "bits", "scheme")}
        x = load_as_stored(
            LoadArguments(
                **{**dict.fromkeys(OF_KEYS), **stored},
                start=a.start,
                past=a.past,
                new_tokens=a.new_tokens,
                n=a.max_len,
                max_len=a.max_len,
                group_size=getattr(a, f"{side}_group"),
                residual_length=getattr(a, f"{side}_residual"),
                x=getattr(a, f"{side}_new"),
            )
        )
        loaded.append(x)
    return loaded[0], loaded[1]


def _room_of(a: DecodeArguments) -> int:
    """Tokens that keys and values both have room for."""
    dims, rooms = (a.q.shape[3], a.v_ring.shape[3]), list[int]()
    for side, dim in zip("kv", dims, strict=True):
        scheme, bits, group, residual, codes, scale = (
            getattr(a, f"{side}_{name}") for name in ("scheme", "bits", "group", "residual", "codes", "scale")
        )
        spare = SCHEMES[scheme].stored_tokens(0, dim, bits, group, residual)
        rooms.append(SCHEMES[scheme].tokens_of(codes.shape, scale.shape) - spare)
    return min(rooms)


def attend(a: DecodeArguments) -> Tensor:
    """[B, heads, q, D of the values]."""
    if not a.max_len:
        room = _room_of(a)
        written = torch.arange(room, device=a.q.device) < a.past + a.new_tokens
        a = a.replace(max_len=room, mask=written[None, None, None])
    return attend_dense(a.q, *_loaded(a), a.past, a.mask, a.sink_logits, a.scale, a.softcap, a.window)


def attend_dense(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    past: Tensor,
    mask: Tensor | None,
    sink_logits: Tensor | None,
    scale: float,
    softcap: float,
    window: int,
) -> Tensor:
    """What the op computes, on ``keys`` and ``values`` [B, KV heads, max_len, D] that are there as numbers.

    The other arguments are the op's: [B, heads, q, D of the values].
    """
    heads, tokens = q.shape[1], keys.shape[2]
    keys, values = (x.repeat_interleave(heads // x.shape[1], 1) for x in (keys, values))
    logits = (q @ keys.transpose(2, 3)).to(torch.float32) * scale
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    if mask is not None and mask.dtype == torch.bool:
        logits = logits.masked_fill(~mask, -torch.inf)
    elif mask is not None:
        logits = logits + mask
    if window:
        last = past + torch.arange(q.shape[2], device=q.device)
        logits = logits.masked_fill(torch.arange(tokens, device=q.device) <= last[:, None] - window, -torch.inf)
    if sink_logits is not None:
        extra = sink_logits.to(torch.float32)[:, None, None].expand(*logits.shape[:3], 1)
        logits = torch.cat([logits, extra], -1)
    nothing = (logits == -torch.inf).all(-1, keepdim=True)  # rows that may attend to nothing give 0
    weights = torch.where(nothing, 0.0, torch.softmax(logits, -1))[..., :tokens]
    return weights.to(values.dtype) @ values
