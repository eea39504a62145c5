"""Per channel with mixed widths: more bits for the channels that move the logits most (keys).

A group of tokens is quantized when the window has as many more: with ``past`` tokens stored, those below
floor((past - R) / group + 1) * group, so that the latest R - group tokens are always in full precision. Per channel of
a group, with n = 2**bits - 1 and bits by the channel's rank (``widths.py``):

    codes = round((x - min) n / (max - min))
    x ~ scale (codes - n / 2) + mid             by ``reference.kept_spread``; with no bits, the mean

With token norms, all of the above and below is of x / norm, and what is read is multiplied by it: a norm is the root
mean square of a token's keys over the channels of *all* KV heads of the layer (OScaR, arXiv 2605.19660), rounded to 8
bits before it is used, so that rounding costs nothing by itself. Statistics, ranks, centers and mid points are those of
normalized keys; the queries' mean square, windows and sinks are as they are.

Sinks and padding take no part in statistics. Channels are ranked when the first group of a sequence is quantized, by

    importance = variance within groups * mean square of the queries of this KV head

over all that is quantized then; later groups keep the order. ``energy`` holds the mean square, or zeros where no query
was seen: that of the keys stands in. What is stored per channel lies in the order of ranks:

    codes   int32 [B, H, words, tokens]           the planes of ``widths.py``, packed along ranks
    scale   uint8 or float16 [B, H, tokens / group, D]    ``small_floats.py``
    zero    the same                              (mid - center) / scale
    order   int32 [B, H, D]                       the channel of each rank
    center  float32 [B, H, D]                     mean of what was quantized first: parts that are large and constant
    norm    uint8 [B, tokens]                     as a scale; only with token norms

Sources: docs/quality.md. Widths by channel also in Kitty (arXiv 2511.18643) and MixKVQ (arXiv 2512.19206).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from xquant_fx.kernels.layout import code_slots, full_precision, wrap_tokens
from xquant_fx.kernels.packing import pack_words, unpack_words
from xquant_fx.kernels.quantize_store.arguments import StoreArguments
from xquant_fx.kernels.reference import encode, kept_spread, masked_mean, minmax_range
from xquant_fx.kernels.schemes.base import Past, Shapes, Stored, wraps_at
from xquant_fx.kernels.small_floats import (
    DTYPES,
    LARGEST_MID,
    decode_mid,
    decode_scale,
    encode_mid,
    encode_norm,
    encode_scale,
)
from xquant_fx.kernels.widths import planes, rank_widths, words_of

APPEND = "ranked"
BITS: tuple[float, ...] = tuple(quarters / 4 for quarters in range(4, 17))
SCALE_DTYPES: tuple[torch.dtype, ...] = DTYPES
RANGE_CODES = False
TOKEN_NORMS = True


def stored_tokens(max_len: int, dim: int, bits: float, group: int, residual: int) -> int:
    """Whole groups, and one more: where a group that is not full is quantized to."""
    return (math.ceil(max_len / group) + 1) * group


def window_tokens(reach: int, group: int, residual: int) -> int:
    """From the group of the first token that is read to that of the last quantized one."""
    return wrap_tokens((math.ceil((reach - 1) / group) + 1) * group - residual, group)


def first_kept(end: Past, wrap: int) -> Past:
    """Whole groups."""
    return end - wrap


def shapes(tokens: int, dim: int, bits: float, group: int, scale_dtype: torch.dtype) -> Shapes:
    """What follows [B, H] in the shape of each tensor, and its dtype."""
    per_group = ((tokens // group, dim), scale_dtype)
    return {
        "codes": ((words_of(bits, dim), tokens), torch.int32), "scale": per_group, "zero": per_group,
        "order": ((dim,), torch.int32), "center": ((dim,), torch.float32), "energy": ((dim,), torch.float32),
    }  # fmt: skip


def tokens_of(codes: Sequence[int], scale: Sequence[int]) -> int:
    """Tokens that codes of this shape have room for."""
    return codes[3]


def quantized_limit(past: Past, group: int, residual: int) -> Past:
    """Full groups that leave R - group tokens or more."""
    return (past - residual + group) // group * group


def largest_codes(bits: float, dim: int, device: torch.device) -> Tensor:
    """The largest code of each rank: float32 [dim]."""
    widths = torch.tensor(rank_widths(bits, dim), device=device)
    return torch.bitwise_left_shift(torch.ones_like(widths), widths).to(torch.float32) - 1


def store_due(a: StoreArguments, x: Tensor, past: Tensor, in_ring: bool) -> None:
    """Quantize every group of tokens that the step may have completed."""
    group, new = a.group_size, x.shape[2]
    groups = (new + group - 1) // group
    first = torch.clamp_min(quantized_limit(past, group, a.residual_length), 0)
    tokens = first + torch.arange(groups * group, device=x.device)
    split = (groups, group)
    grouped = full_precision(x, a.quantized.ring, tokens, past, in_ring).unflatten(2, split)
    valid = (tokens >= a.start[:, None] + a.sink_tokens).unflatten(1, split)[:, None, :, :, None]
    end = quantized_limit(past + new, group, a.residual_length)
    due = (tokens < end).unflatten(0, split)[..., None]
    wrap = wraps_at(a.codes.shape[3], group, a.max_len)
    if wrap:
        tokens = code_slots(tokens, end, wrap, group)
    if a.norm is not None:
        norm = token_norms(grouped)
        a.norm.index_copy_(1, tokens, norm.flatten(1))
        grouped = grouped / decode_scale(norm)[:, None, ..., None]
    note_ranks(a, grouped, valid & due, first)
    ranked = grouped.gather(4, a.ranks.order.long()[:, :, None, None].expand(grouped.shape))
    codes, scale, zero = quantize(ranked, valid, a.ranks.center[:, :, None, None], a.bits, a.quantized.scale.dtype)
    a.codes.index_copy_(3, tokens, pack(codes.flatten(2, 3), a.bits))
    rows = tokens[::group] // group
    a.quantized.scale.index_copy_(2, rows, scale.squeeze(3))
    a.zero_points.index_copy_(2, rows, zero.squeeze(3))


def token_norms(grouped: Tensor) -> Tensor:
    """uint8 [B, groups, group]: root mean square of each token of float32 [B, H, groups, group, D]."""
    return encode_norm(grouped.square().mean((1, 4)).sqrt())


def note_ranks(a: StoreArguments, grouped: Tensor, valid: Tensor, first: Tensor) -> None:
    """Rank the channels of these groups [B, H, groups, group, D] where they are a sequence's first ones."""
    spread = grouped - masked_mean(grouped, 3, valid)
    variance, square = (masked_mean(y * y, (2, 3), valid)[:, :, 0, 0] for y in (spread, grouped))
    seen = (a.ranks.energy > 0).any(2, keepdim=True)
    importance = (variance * torch.where(seen, a.ranks.energy, square)).nan_to_num(0.0)
    order = torch.sort(importance, dim=2, descending=True, stable=True).indices
    center = masked_mean(grouped, (2, 3), valid)[:, :, 0, 0].nan_to_num(0.0, 0.0, 0.0).gather(2, order)
    # Of a padded sequence the first group that is no padding counts.
    starts = first <= (a.start + a.sink_tokens) // a.group_size * a.group_size
    begins = (starts & valid.flatten(1).any(1))[:, None, None]
    a.ranks.order.copy_(torch.where(begins, order.to(torch.int32), a.ranks.order))
    a.ranks.center.copy_(torch.where(begins, center, a.ranks.center))


def quantize(
    x: Tensor, valid: Tensor, center: Tensor, bits: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """(codes int32, scale, zero of ``dtype``) of float32 groups [B, H, groups, group, D] in the order of ranks."""
    return quantize_up_to(x, valid, center, largest_codes(bits, x.shape[4], x.device), dtype)


def quantize_up_to(
    x: Tensor, valid: Tensor, center: Tensor, n: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """The same for channels in any order, whose largest codes are ``n``: float32, broadcast to the groups."""
    low, step = minmax_range(x, n.clamp_min(1), 3, valid)
    codes = encode(x, low, step, n)
    scale, mean, level = kept_spread(x, codes - n / 2, 3, valid)
    spread = masked_mean((x - mean) ** 2, 3, valid).sqrt()
    offset = mean - center
    # Without bits the scale is but the unit of ``zero``, which has to reach ``offset`` in any case.
    scale = torch.maximum(torch.where(n > 0, scale, spread), offset.abs() / (LARGEST_MID - n))
    stored = encode_scale(torch.where(low == low, scale, math.nan), dtype)
    scale = decode_scale(stored)
    mid = offset - scale * level
    return codes, stored, encode_mid(torch.where(scale > 0, mid / scale, 0.0), dtype)


def pack(codes: Tensor, bits: float) -> Tensor:
    """int32 words [B, H, words, tokens] of codes [B, H, tokens, D]."""
    fields = [
        pack_words(codes[..., list(p.ranks)] >> codes.new_tensor(p.shifts) & (2**p.width - 1), p.width, 3)
        for p in planes(bits, codes.shape[3])
    ]
    return torch.cat(fields, 3).transpose(2, 3)


def unpack(words: Tensor, bits: float, dim: int) -> Tensor:
    """Undo :func:`pack`: int32 codes [B, H, tokens, D]."""
    words = words.transpose(2, 3)
    codes = words.new_zeros((*words.shape[:3], dim))
    begin = 0
    for p in planes(bits, dim):
        fields = unpack_words(words.narrow(3, begin, p.words), p.width, 3, len(p.ranks))
        ranks = torch.tensor(p.ranks, device=words.device)
        codes = codes.index_add(3, ranks, fields << fields.new_tensor(p.shifts))
        begin += p.words
    return codes


def dequantize(stored: Stored, bits: float, group: int, n: int, dim: int) -> Tensor:
    """First ``n`` tokens as fp32 [B, H, n, dim]."""
    levels = unpack(stored.codes[..., :n], bits, dim) - largest_codes(bits, dim, stored.codes.device) / 2
    token_group = torch.arange(n, device=stored.codes.device) // group
    scale = decode_scale(stored.scale).index_select(2, token_group)
    assert stored.zero is not None and stored.order is not None and stored.center is not None
    mid = decode_mid(stored.zero).index_select(2, token_group)
    x = scale * (levels + mid) + stored.center[:, :, None]
    place = torch.argsort(stored.order.long(), 2)  # the rank of each channel
    x = x.gather(3, place[:, :, None].expand(x.shape))
    return x if stored.norm is None else x * decode_scale(stored.norm[:, :n])[:, None, :, None]
