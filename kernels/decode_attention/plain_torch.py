"""``xquant::decode_attention`` in plain torch, on dequantized keys and values: for devices without a kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from xquant_fx.kernels.decode_attention.arguments import OF_KEYS, OF_SIDE, DecodeArguments
from xquant_fx.kernels.shared_code_load.arguments import LoadArguments
from xquant_fx.kernels.shared_code_load.plain_torch import load


def _loaded(a: DecodeArguments) -> tuple[Tensor, Tensor]:
    """Keys and values [B, heads, max_len, D], each head of them repeated for its query heads."""
    loaded = []
    for side, names in (("k", (*OF_SIDE, *OF_KEYS)), ("v", OF_SIDE)):
        stored = {name: getattr(a, f"{side}_{name}") for name in (*names, "bits", "scheme")}
        x = load(
            LoadArguments(
                **{**dict.fromkeys(OF_KEYS), **stored},
                start=a.start,
                past=a.past,
                new_tokens=a.new_tokens,
                n=a.max_len,
                group_size=getattr(a, f"{side}_group"),
                residual_length=getattr(a, f"{side}_residual"),
                x=getattr(a, f"{side}_new"),
            )
        )
        loaded.append(x.repeat_interleave(a.q.shape[1] // x.shape[1], 1))
    return loaded[0], loaded[1]


def attend(a: DecodeArguments) -> Tensor:
    """[B, heads, q, D of the values]."""
    keys, values = _loaded(a)
    logits = (a.q @ keys.transpose(2, 3)).to(torch.float32) * a.scale
    if a.softcap:
        logits = a.softcap * torch.tanh(logits / a.softcap)
    if a.mask is not None and a.mask.dtype == torch.bool:
        logits = logits.masked_fill(~a.mask, -torch.inf)
    elif a.mask is not None:
        logits = logits + a.mask
    if a.window:
        tokens = torch.arange(a.max_len, device=a.q.device)
        last = a.past + torch.arange(a.q.shape[2], device=a.q.device)
        logits = logits.masked_fill(tokens <= last[:, None] - a.window, -torch.inf)
    if a.sink_logits is not None:
        extra = a.sink_logits.to(torch.float32)[:, None, None].expand(*logits.shape[:3], 1)
        logits = torch.cat([logits, extra], -1)
    nothing = (logits == -torch.inf).all(-1, keepdim=True)  # rows that may attend to nothing give 0
    weights = torch.where(nothing, 0.0, torch.softmax(logits, -1))[..., : a.max_len]
    return weights.to(values.dtype) @ values
