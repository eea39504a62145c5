"""Attention of a decode step over a quantized cache, spelt out in plain torch, in any compute dtype.

    k, v = what the step sees: codes * scale + zero (ranked and rotated as ``dequantized`` says), or full
           precision from ring and sink; zero for tokens not written yet
    logits = scale * q k^T, softcapped; plus a float mask; -inf where a bool mask or the window says so
    out = softmax(logits, with an extra logit per head in the sum) v; 0 for rows that see nothing

In float64 with ``rounded=None`` it is the truth; in float32 with ``rounded`` the model's dtype it is what
loading the cache in that dtype and attending in float32 gives.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from xquant_fx.kernels.packing import unpack_words
from xquant_fx.kernels.rotation import rotated_size, signs
from xquant_fx.kernels.schemes.per_channel_ranked import unpack
from xquant_fx.kernels.small_floats import decode_mid, decode_scale
from xquant_fx.kernels.widths import rank_widths


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stored:
    """The tensors of one side of one layer, as ``KVState`` names them, and what they mean."""

    scheme: str
    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    order: Tensor | None
    center: Tensor | None
    norm: Tensor | None
    ring: Tensor
    sink: Tensor | None
    bits: float
    group: int
    residual: int
    new: Tensor | None = None
    """Tokens of a chunk that the ring is too short for; the ring is as it was before them."""


def limit_of(s: Stored, past: int) -> int:
    """Tokens that are in codes in a step after ``past``."""
    if s.scheme == "per_channel":
        return past // s.residual * s.residual
    if s.scheme == "per_channel_ranked":
        return max((past - s.residual + s.group) // s.group * s.group, 0)
    return max(past - s.residual, 0)


def hadamard(n: int, dtype: torch.dtype) -> Tensor:
    """The matrix of +1 and -1 by its recursion."""
    h = torch.ones(1, 1, dtype=dtype)
    while h.shape[0] < n:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)], 0)
    return h


def dequantized(s: Stored, n: int, dtype: torch.dtype) -> Tensor:
    """The first ``n`` tokens [B, H, n, D] from codes, in ``dtype``."""
    dim = s.ring.shape[3]
    if s.scheme == "per_channel":
        codes = unpack_words(s.codes[..., :n], s.bits, 2, dim).transpose(2, 3)
        scale, zero = (t.repeat_interleave(s.group, 2)[:, :, :n] for t in (s.scale, s.zero))
        return codes.to(dtype) * scale.to(dtype) + zero.to(dtype)
    if s.scheme == "per_channel_ranked":
        largest = 2 ** torch.tensor(rank_widths(s.bits, dim)) - 1
        scale, mid = (t.repeat_interleave(s.group, 2)[:, :, :n] for t in (decode_scale(s.scale), decode_mid(s.zero)))
        levels = unpack(s.codes[..., :n], s.bits, dim).to(dtype) - largest.to(dtype) / 2 + mid.to(dtype)
        ranked = levels * scale.to(dtype) + s.center.to(dtype)[:, :, None]
        ranked = torch.empty_like(ranked).scatter_(3, s.order.long()[:, :, None].expand(ranked.shape), ranked)
        return ranked if s.norm is None else ranked * decode_scale(s.norm[:, None, :n, None]).to(dtype)
    codes = unpack_words(s.codes, s.bits, 2, n).to(dtype)
    scale = s.scale if s.scheme == "per_token" else decode_scale(s.scale)
    scale = scale[..., :n].transpose(2, 3).repeat_interleave(s.group, 3).to(dtype)
    if s.scheme == "per_token":
        return codes * scale + s.zero[..., :n].transpose(2, 3).repeat_interleave(s.group, 3).to(dtype)
    size, y = rotated_size(dim), (codes - (2**s.bits - 1) / 2) * scale
    if s.scheme == "per_token_folded":  # whoever reads rotates back
        return y
    y = y.unflatten(3, (dim // size, size))
    return (y @ hadamard(size, dtype)).flatten(3) * (torch.tensor(signs(dim), dtype=dtype) / size**0.5)


def seen(s: Stored, start: Tensor, past: int, new: int, count: int, dtype: torch.dtype,
         rounded: torch.dtype | None) -> Tensor:  # fmt: skip
    """Keys or values [B, H, count, D] of tokens 0 .. count - 1 in ``dtype``."""
    written, dim = past + new, s.ring.shape[3]
    quantized = limit_of(s, past)
    out = torch.zeros(*s.ring.shape[:2], count, dim, dtype=dtype)
    dense = dequantized(s, quantized, dtype)
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
    more_scores: Tensor | float = 0.0, more_values: Callable[[Tensor], Tensor | float] = lambda p: 0.0,
) -> Tensor:  # fmt: skip
    """[B, heads, query, v_dim] in ``dtype``.

    What else a kernel rounds: ``more_scores`` is added to q k^T, what ``more_values`` makes of weights to the output.
    """
    repeat = q.shape[1] // key.ring.shape[1]
    k, v = (seen(s, start, past, new, max_len, dtype, rounded).repeat_interleave(repeat, 1) for s in (key, value))
    logits = (q.to(dtype) @ k.transpose(2, 3) + more_scores) * scale
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
    p = torch.where(nothing, 0.0, p)
    return torch.where(nothing, 0.0, p @ v + more_values(p))
