"""Attention of a decode step over a quantized cache, spelt out in plain torch, in any compute dtype.

    k, v = what the step sees: codes * scale + zero, or full precision from ring and sink; zero for
           tokens not written yet
    logits = scale * q k^T, softcapped; plus a float mask; -inf where a bool mask or the window says so
    out = softmax(logits, with an extra logit per head in the sum) v; 0 for rows that see nothing

In float64 with ``rounded=None`` it is the truth; in float32 with ``rounded`` the model's dtype it is what
loading the cache in that dtype and attending in float32 gives.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from xquant_fx.kernels.packing import unpack_words


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stored:
    """The tensors of one side of one layer, as ``KVState`` names them, and what they mean."""

    side: str
    codes: Tensor
    scale: Tensor
    zero: Tensor
    ring: Tensor
    sink: Tensor | None
    bits: int
    group: int
    residual: int
    new: Tensor | None = None
    """Tokens of a chunk that the ring is too short for; the ring is as it was before them."""


def seen(s: Stored, start: Tensor, past: int, new: int, count: int, dtype: torch.dtype,
         rounded: torch.dtype | None) -> Tensor:  # fmt: skip
    """Keys or values [B, H, count, D] of tokens 0 .. count - 1 in ``dtype``."""
    written, dim = past + new, s.ring.shape[3]
    quantized = past // s.residual * s.residual if s.side == "key" else max(past - s.residual, 0)
    out = torch.zeros(*s.ring.shape[:2], count, dim, dtype=dtype)
    if s.side == "key":
        codes = unpack_words(s.codes[..., :quantized], s.bits, 2, dim).transpose(2, 3)
        scale, zero = (t.repeat_interleave(s.group, 2)[:, :, :quantized] for t in (s.scale, s.zero))
    else:
        codes = unpack_words(s.codes, s.bits, 2, quantized)
        scale, zero = (t[..., :quantized].transpose(2, 3).repeat_interleave(s.group, 3) for t in (s.scale, s.zero))
    dense = codes.to(dtype) * scale.to(dtype) + zero.to(dtype)
    out[:, :, :quantized] = dense if rounded is None else dense.to(rounded).to(dtype)
    late = torch.arange(quantized, written if s.new is None else past)
    out[:, :, late] = s.ring[:, :, late % s.ring.shape[2]].to(dtype)
    if s.new is not None:
        out[:, :, past:written] = s.new.to(dtype)
    for b, i in ((b, i) for b in range(out.shape[0]) for i in range(0 if s.sink is None else s.sink.shape[2] - 1)):
        if (token := int(start[b]) + i) < written:
            out[b, :, token] = s.sink[b, :, i].to(dtype)
    return out


def attention(
    q: Tensor, key: Stored, value: Stored, start: Tensor, past: int, mask: Tensor | None,
    sink_logits: Tensor | None, new: int, max_len: int, scale: float, softcap: float, window: int,
    dtype: torch.dtype, rounded: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    """[B, heads, query, v_dim] in ``dtype``."""
    repeat = q.shape[1] // key.ring.shape[1]
    k, v = (seen(s, start, past, new, max_len, dtype, rounded).repeat_interleave(repeat, 1) for s in (key, value))
    logits = q.to(dtype) @ k.transpose(2, 3) * scale
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    if mask is not None:
        logits = logits.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else logits + mask.to(dtype)
    if window:
        position = past + torch.arange(q.shape[2])
        hidden = torch.arange(max_len) <= position[:, None] - window
        logits = logits.masked_fill(hidden, -torch.inf)
    extra = torch.full((q.shape[1],), -torch.inf) if sink_logits is None else sink_logits
    extra = extra.to(dtype)[None, :, None, None].expand(*logits.shape[:3], 1)
    p = torch.softmax(torch.cat([logits, extra], 3), 3)[..., :-1]
    nothing = (logits == -torch.inf).all(3, keepdim=True)
    return torch.where(nothing, 0.0, torch.where(nothing, 0.0, p) @ v)
