"""Per token: one scale and zero point per token and group of channels, one token at a time (values).

A token is quantized when it leaves the window of the last R = ``residual_length``: with ``past`` tokens stored,
those below past - R are quantized.

    codes  [B, H, tokens / per, D]    per = codes_per_word(bits): packed along tokens
    scale  [B, H, D / group, tokens]
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from xquant_fx.kernels.layout import full_precision
from xquant_fx.kernels.packing import codes_per_word, pack_words, shifts, unpack_words
from xquant_fx.kernels.quantize_store.arguments import StoreArguments
from xquant_fx.kernels.reference import fit_codes, own_codes
from xquant_fx.kernels.schemes.base import Past, Shapes, Stored

APPEND = "tokens"
BITS: tuple[float, ...] = (1, 2, 4, 8)
RANGE_CODES = True

#: Makes (codes or None if borrowed, scale, zero or None) of fp32 values [B, H, tokens, D] and the codes stored there.
Quantize = Callable[[StoreArguments, Tensor, Tensor], tuple[Tensor | None, Tensor, Tensor | None]]

#: The CPU kernel loads whole vectors of channels, of the last row, too: 16 channels at most.
VECTOR = 16


def stored_tokens(max_len: int, dim: int, bits: float, group: int, residual: int) -> int:
    """Whole words, and spare ones: where tokens that are not due are quantized to, and a vector's last load ends."""
    per = codes_per_word(bits)
    return (math.ceil(max_len / per) + max(1, math.ceil(VECTOR / dim))) * per


def shapes(tokens: int, dim: int, bits: float, group: int, scale_dtype: torch.dtype) -> Shapes:
    """What follows [B, H] in the shape of each tensor, and its dtype."""
    codes, scale = (tokens // codes_per_word(bits), dim), ((dim // group, tokens), scale_dtype)
    return {"codes": (codes, torch.int32), "scale": scale, "zero": scale}


def tokens_of(codes: Sequence[int], scale: Sequence[int]) -> int:
    """Tokens that codes of this shape have room for."""
    return scale[3]


def quantized_limit(past: Past, group: int, residual: int) -> Past:
    """All but the last R tokens; negative below R."""
    return past - residual


def store_due(a: StoreArguments, x: Tensor, past: Tensor, in_ring: bool) -> None:
    """Quantize the tokens that the step pushes out of the window of the last R."""
    store_leaving(a, x, past, in_ring, quantize)


def store_leaving(a: StoreArguments, x: Tensor, past: Tensor, in_ring: bool, quantize: Quantize) -> None:
    """The same, by any way to quantize a token."""
    if in_ring:
        for j in range(x.shape[2]):
            store_one(a, past + j - a.residual_length, quantize)
        return
    per, ring = codes_per_word(a.bits), a.quantized.ring
    new, first = x.shape[2], (past - a.residual_length).clamp_min(0)
    words = (new + 2 * per - 2) // per
    tokens = first // per * per + torch.arange(words * per, device=x.device)
    leaves = (tokens >= first) & (tokens < past - a.residual_length + new)
    due = leaves.unflatten(0, (words, per))
    trash = a.codes.shape[2] - 1
    rows = torch.where(due.any(1), first // per + torch.arange(words, device=x.device), trash)
    old = a.codes.index_select(2, rows)
    values = full_precision(x, ring, tokens, past, False)
    codes, scale, zero = quantize(a, values, unpack_words(old, a.bits, 2, words * per))
    if codes is not None:
        ones = torch.where(leaves, 2 ** int(a.bits) - 1, 0)[:, None]
        kept = old & ~pack_words(ones, a.bits, 0)
        a.codes.index_copy_(2, rows, kept | pack_words(torch.where(leaves[:, None], codes, 0), a.bits, 2))
    put_scales(a, torch.where(leaves, tokens, trash * per), scale, zero)


def store_one(a: StoreArguments, token: Tensor, quantize: Quantize) -> None:
    """Quantize one token (int64 [1]) out of the ring; a negative one goes to padding."""
    per, ring = codes_per_word(a.bits), a.quantized.ring
    due = token >= 0
    row = torch.where(due, token // per, a.codes.shape[2] - 1)
    shift = shifts(a.bits, token.device).index_select(0, token % per)
    old = a.codes.index_select(2, row)
    value = full_precision(ring, ring, token, token, True)
    codes, scale, zero = quantize(a, value, torch.bitwise_right_shift(old, shift) & (2 ** int(a.bits) - 1))
    if codes is not None:
        mask = torch.bitwise_left_shift(torch.full_like(shift, 2 ** int(a.bits) - 1), shift)
        a.codes.index_copy_(2, row, (old & ~mask) | torch.bitwise_left_shift(codes, shift))
    put_scales(a, torch.where(due, token, (a.codes.shape[2] - 1) * per), scale, zero)


def quantize(a: StoreArguments, values: Tensor, stored: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
    """(codes or None if borrowed, scale, zero) of fp32 ``values`` [B, H, tokens, D]."""
    split = (values.shape[3] // a.group_size, a.group_size)
    stats: dict[str, Any] = dict(bits=int(a.bits), eta=a.eta, dim=4, dtype=a.quantized.scale.dtype)
    if a.fit is None:
        codes, scale, zero = own_codes(values.unflatten(3, split), **stats)
        return codes.flatten(3, 4), scale, zero
    return (None, *fit_codes(values.unflatten(3, split), stored.unflatten(3, split), fit=a.fit, **stats))


def put_scales(a: StoreArguments, tokens: Tensor, scale: Tensor, zero: Tensor | None) -> None:
    """Store [B, H, tokens, groups, 1] scales and zeros in their [B, H, groups, N] homes."""
    a.quantized.scale.index_copy_(3, tokens, scale.squeeze(4).transpose(2, 3))
    if zero is not None:
        a.zero_points.index_copy_(3, tokens, zero.squeeze(4).transpose(2, 3))


def dequantize(stored: Stored, bits: float, group: int, n: int, dim: int) -> Tensor:
    """First ``n`` tokens as fp32 [B, H, n, dim]."""
    assert stored.zero is not None
    c = unpack_words(stored.codes, bits, 2, n)
    channel_group = torch.arange(dim, device=stored.codes.device) // group
    s, z = (t[..., :n].transpose(-1, -2).index_select(3, channel_group) for t in (stored.scale, stored.zero))
    return c.to(torch.float32) * s.to(torch.float32) + z.to(torch.float32)
