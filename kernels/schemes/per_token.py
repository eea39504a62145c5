"""Per token: one scale and zero point per token and group of channels, one token at a time (values).

A token is quantized when it leaves the window of the last R = ``residual_length``: with ``past`` tokens stored,
those below past - R are quantized.

    codes  [B, H, tokens * bits / 32, D]    packed along tokens
    scale  [B, H, D / group, tokens]
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from xquant_fx.kernels.layout import WORD_TOKENS, full_precision, wrap_tokens
from xquant_fx.kernels.packing import (
    WORD_BITS,
    CodePlane,
    code_planes,
    codes_per_block,
    codes_per_word,
    pack_words,
    shifts,
    unpack_words,
)
from xquant_fx.kernels.quantize_store.arguments import StoreArguments
from xquant_fx.kernels.reference import fit_codes, own_codes
from xquant_fx.kernels.schemes.base import Past, Shapes, Stored, wraps_at

APPEND = "tokens"
BITS: tuple[float, ...] = (1, 2, 3, 4, 8)
SCALE_DTYPES: tuple[torch.dtype, ...] = (torch.float16, torch.bfloat16, torch.float32)
RANGE_CODES = True
TOKEN_NORMS = False

#: Makes (codes or None if borrowed, scale, zero or None) of fp32 values [B, H, tokens, D] and the codes stored there.
Quantize = Callable[[StoreArguments, Tensor, Tensor], tuple[Tensor | None, Tensor, Tensor | None]]

#: The CPU kernel loads whole vectors of channels, of the last row, too: 16 channels at most.
VECTOR = 16


def stored_tokens(max_len: int, dim: int, bits: float, group: int, residual: int) -> int:
    """Whole words, and spare ones: where tokens that are not due are quantized to, and a vector's last load ends."""
    per = codes_per_block(bits)
    return (math.ceil(max_len / per) + max(1, math.ceil(VECTOR / dim))) * per


def window_tokens(reach: int, group: int, residual: int) -> int:
    """From the first token that is read to the last quantized one, which share no word."""
    return wrap_tokens(reach - residual + WORD_TOKENS, WORD_TOKENS)


def first_kept(end: Past, wrap: int) -> Past:
    """Behind the word that the last token shares with the first one."""
    return end - wrap + WORD_TOKENS


def wrap_of(a: StoreArguments) -> int:
    """After how many tokens codes start over; 0: they do not."""
    spare = stored_tokens(0, a.x.shape[3], a.bits, a.group_size, a.residual_length)
    return wraps_at(a.quantized.scale.shape[3], spare, a.max_len)


def shapes(tokens: int, dim: int, bits: float, group: int, scale_dtype: torch.dtype) -> Shapes:
    """What follows [B, H] in the shape of each tensor, and its dtype."""
    codes, scale = (tokens * int(bits) // WORD_BITS, dim), ((dim // group, tokens), scale_dtype)
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
    per, ring = codes_per_block(a.bits), a.quantized.ring
    new, first = x.shape[2], (past - a.residual_length).clamp_min(0)
    count = (new + 2 * per - 2) // per * per
    tokens = first // per * per + torch.arange(count, device=x.device)
    end, wrap = past - a.residual_length + new, wrap_of(a)
    leaves = (tokens >= first) & (tokens < end)
    if wrap:
        leaves = leaves & (tokens >= first_kept(end, wrap))
    slots = tokens % wrap if wrap else tokens
    rows = torch.cat([_rows(p, slots, leaves) for p in code_planes(a.bits, a.codes.shape[2])])
    old = a.codes.index_select(2, rows)
    values = full_precision(x, ring, tokens, past, False)
    codes, scale, zero = quantize(a, values, unpack_words(old, a.bits, 2, count))
    if codes is not None:
        ones = torch.where(leaves, 2 ** int(a.bits) - 1, 0)[:, None]
        kept = old & ~pack_words(ones, a.bits, 0)
        a.codes.index_copy_(2, rows, kept | pack_words(torch.where(leaves[:, None], codes, 0), a.bits, 2))
    put_scales(a, torch.where(leaves, slots, a.quantized.scale.shape[3] - 1), scale, zero)


def _rows(plane: CodePlane, tokens: Tensor, due: Tensor) -> Tensor:
    """Rows of ``plane`` that hold ``tokens``, whole words of them; its last, a spare one, for those without any due."""
    words, due = (x.unflatten(0, (-1, codes_per_word(plane.width))) for x in (tokens, due))
    return plane.first + torch.where(due.any(1), words[:, 0] // codes_per_word(plane.width), plane.words - 1)


def store_one(a: StoreArguments, token: Tensor, quantize: Quantize) -> None:
    """Quantize one token (int64 [1]) out of the ring; a negative one goes to padding."""
    ring, due = a.quantized.ring, token >= 0
    value = full_precision(ring, ring, token, token, True)
    wrap = wrap_of(a)
    token = token % wrap if wrap else token
    places = [_place(a, plane, token, due) for plane in code_planes(a.bits, a.codes.shape[2])]
    stored = [(old >> shift & mask) << plane.shift for plane, _, shift, mask, old in places]
    codes, scale, zero = quantize(a, value, sum(stored[1:], stored[0]))
    if codes is not None:
        for plane, row, shift, mask, old in places:
            field = codes >> plane.shift & mask
            a.codes.index_copy_(2, row, (old & ~(mask << shift)) | field << shift)
    put_scales(a, torch.where(due, token, a.quantized.scale.shape[3] - 1), scale, zero)


def _place(
    a: StoreArguments, plane: CodePlane, token: Tensor, due: Tensor
) -> tuple[CodePlane, Tensor, Tensor, Tensor, Tensor]:
    """(plane, row, shift within its words, mask of a field, words) of one token."""
    per = codes_per_word(plane.width)
    row = plane.first + torch.where(due, token // per, plane.words - 1)
    shift = shifts(plane.width, token.device).index_select(0, token % per)
    mask = torch.full_like(shift, 2**plane.width - 1)
    return plane, row, shift, mask, a.codes.index_select(2, row)


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
