"""Appending keys whose channels are ranked: a program has a batch row and a head, all channels and all groups due.

Codes are stored plane by plane, everything per channel in the order of ranks (``schemes/per_channel_ranked.py``).
"""

from __future__ import annotations

import triton
import triton.language as tl

from xquant_fx.kernels.quantize_store.triton_kernels import begin_step
from xquant_fx.kernels.quantize_store.triton_keys import range_of_keys, tile_of_group
from xquant_fx.kernels.quantize_store.triton_quantizer import code_shift, encode_to, step_to
from xquant_fx.kernels.quantize_store.triton_ranks import note_norms, note_ranks
from xquant_fx.kernels.quantize_store.triton_window import source_of, turns_before, write_step
from xquant_fx.kernels.triton_small_floats import LARGEST_OF_MIDS, decode_scale, encode_mid, encode_scale
from xquant_fx.kernels.triton_widths import field_of_rank, ranked_limit, width_of_rank


@triton.jit
def store_plane(
    codes, c, tokens, in_group, WIDTH: tl.constexpr, FIELDS: tl.constexpr, COUNTS: tl.constexpr, TOKENS: tl.constexpr
):
    """The fields of WIDTH bits of codes ``c`` [tokens, ranks] into the words from ``codes`` on."""
    rank = tl.arange(0, c.shape[1])
    width, place = width_of_rank(rank, COUNTS), field_of_rank(rank, WIDTH, COUNTS)
    word = tl.where((width & WIDTH) > 0, place // (32 // WIDTH), -1)
    fields = (c >> (width & (WIDTH - 1))[None, :]) & ((1 << WIDTH) - 1)
    fields = fields << code_shift(tl.maximum(place, 0), WIDTH)[None, :]
    for w in range((FIELDS * WIDTH + 31) // 32):
        bits = tl.sum(tl.where((word == w)[None, :], fields, 0), 1)
        tl.store(codes + w * TOKENS + tokens, bits, mask=in_group)


@triton.jit
def store_planes(codes, c, tokens, in_group, COUNTS: tl.constexpr, TOKENS: tl.constexpr):
    """Codes ``c`` [tokens, ranks] into the words of all planes."""
    twos: tl.constexpr = COUNTS[5] + COUNTS[1] - COUNTS[3]
    ones: tl.constexpr = COUNTS[6] + COUNTS[4] - COUNTS[5] + COUNTS[2] - COUNTS[3] + COUNTS[0] - COUNTS[1]
    store_plane(codes, c, tokens, in_group, 4, COUNTS[3], COUNTS, TOKENS)
    codes += (COUNTS[3] * 4 + 31) // 32 * TOKENS
    store_plane(codes, c, tokens, in_group, 2, twos, COUNTS, TOKENS)
    codes += (twos * 2 + 31) // 32 * TOKENS
    store_plane(codes, c, tokens, in_group, 1, ones, COUNTS, TOKENS)


@triton.jit
def encode_ranked(
    source,
    codes,
    first_valid,
    t0,
    d,
    n,
    low,
    step,
    DIM: tl.constexpr,
    RING: tl.constexpr,
    GROUP: tl.constexpr,
    TILE: tl.constexpr,
    TOKENS: tl.constexpr,
    COUNTS: tl.constexpr,
):
    """Store the codes of the group at ``t0``; returns what a scale is fitted to: means and variances.

    (mean of keys, of levels, variance of keys, of levels) per channel ``d``; levels are codes - n / 2.
    """
    sum_x, sum_t, count = tl.zeros(d.shape, tl.float32), tl.zeros(d.shape, tl.float32), tl.zeros(d.shape, tl.float32)
    for i in range(0, GROUP, TILE):
        tokens, in_bounds, x = tile_of_group(source, i, t0, d, DIM, RING, GROUP, TILE)
        valid = in_bounds & (tokens >= first_valid)[:, None]
        c = tl.where(in_bounds, encode_to(x, low[None, :], step[None, :], n[None, :]), 0)
        store_planes(codes, c, tokens, i + tl.arange(0, TILE) < GROUP, COUNTS, TOKENS)
        sum_x += tl.sum(tl.where(valid, x, 0.0), 0)
        sum_t += tl.sum(tl.where(valid, c.to(tl.float32) - (n * 0.5)[None, :], 0.0), 0)
        count += tl.sum(valid.to(tl.float32), 0)
    count = tl.maximum(count, 1.0)
    mean_x, mean_t = tl.div_rn(sum_x, count), tl.div_rn(sum_t, count)
    var_x, var_t = tl.zeros(d.shape, tl.float32), tl.zeros(d.shape, tl.float32)
    for i in range(0, GROUP, TILE):
        tokens, in_bounds, x = tile_of_group(source, i, t0, d, DIM, RING, GROUP, TILE)
        valid = in_bounds & (tokens >= first_valid)[:, None]
        c = encode_to(x, low[None, :], step[None, :], n[None, :])
        off_x = tl.where(valid, x - mean_x[None, :], 0.0)
        off_t = tl.where(valid, c.to(tl.float32) - (n * 0.5 + mean_t)[None, :], 0.0)
        var_x += tl.sum(off_x * off_x, 0)
        var_t += tl.sum(off_t * off_t, 0)
    return mean_x, mean_t, tl.div_rn(var_x, count), tl.div_rn(var_t, count)


@triton.jit
def fit_ranked(moments, low, n, center, DTYPE: tl.constexpr):
    """(scale, mid point) as stored, of DTYPE, which keep the spread of the keys (``reference.kept_spread``)."""
    mean_x, mean_t, var_x, var_t = moments
    offset = mean_x - center
    s = tl.where(var_t > 0, tl.sqrt_rn(tl.div_rn(var_x, tl.where(var_t > 0, var_t, 1.0))), 0.0)
    # Without bits the scale is but the unit of the mid point, which has to reach ``offset`` in any case.
    s = tl.where(n > 0, s, tl.sqrt_rn(var_x))
    least = tl.div_rn(tl.abs(offset), -n + LARGEST_OF_MIDS)  # Triton 3.8 interprets the difference as a constant
    known = (low == low) & (s == s) & (least == least)
    stored = encode_scale(tl.where(known, tl.maximum(s, least), float("nan")), DTYPE)
    s = decode_scale(stored)
    mid = tl.div_rn(offset - s * mean_t, tl.where(s > 0, s, 1.0))
    return stored, encode_mid(tl.where(s > 0, mid, 0.0), DTYPE)


@triton.jit
def flush_ranked(
    source,
    codes,
    scale,
    zero,
    order,
    center,
    first_valid,
    t0,
    DIM: tl.constexpr,
    RING: tl.constexpr,
    GROUP: tl.constexpr,
    TILE: tl.constexpr,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
    COUNTS: tl.constexpr,
):
    """Quantize the group of tokens at ``t0``."""
    rank = tl.arange(0, CHANNELS)
    d = tl.load(order + rank, mask=rank < DIM, other=DIM)
    n = ((1 << width_of_rank(rank, COUNTS)) - 1).to(tl.float32)
    low, high = range_of_keys(source, first_valid, t0, d, DIM, RING, GROUP, TILE)
    low, step = step_to(low, high, tl.maximum(n, 1.0))
    moments = encode_ranked(source, codes, first_valid, t0, d, n, low, step, DIM, RING, GROUP, TILE, TOKENS, COUNTS)
    centers = tl.load(center + rank, mask=rank < DIM, other=0.0)
    s, mid = fit_ranked(moments, low, n, centers, scale.dtype.element_ty)
    tl.store(scale + t0 // GROUP * DIM + rank, s, mask=rank < DIM)
    tl.store(zero + t0 // GROUP * DIM + rank, mid, mask=rank < DIM)


@triton.jit
def append_ranked(
    program, x, pos, codes, scale, zero, ring, sink, order, center, energy, norm, start, length, fault,
    HEADS: tl.constexpr, NEW_TOKENS: tl.constexpr, NEW_TILE: tl.constexpr, DIM: tl.constexpr, RING: tl.constexpr,
    SINK_TOKENS: tl.constexpr, RESIDUAL: tl.constexpr, GROUP: tl.constexpr, MAX_LEN: tl.constexpr,
    WRAP: tl.constexpr, RAGGED: tl.constexpr, TOKENS: tl.constexpr, GROUPS: tl.constexpr, WORDS: tl.constexpr,
    CHANNELS: tl.constexpr, TILE: tl.constexpr, COUNTS: tl.constexpr,
):  # fmt: skip
    """A program has a batch row and head: it writes the new tokens and quantizes the groups that become due."""
    row = program
    head, first_token, pos, source = begin_step(
        program, row, x, ring, pos, start, length, fault,
        1, HEADS, NEW_TOKENS, NEW_TILE, DIM, RING, RESIDUAL, MAX_LEN, RAGGED,
    )  # fmt: skip
    _, _, past = source
    order += head * DIM
    center += head * DIM
    d = tl.arange(0, CHANNELS)
    write_step(source, pos, sink, head, first_token, d, d < DIM, NEW_TOKENS, NEW_TILE, DIM, RING, SINK_TOKENS)
    first, end = ranked_limit(past, RESIDUAL, GROUP), ranked_limit(past + NEW_TOKENS, RESIDUAL, GROUP)
    if norm is not None:
        norm += (row // HEADS).to(tl.int64) * TOKENS
        of_row = source_of(x, ring, pos, head // HEADS * HEADS, NEW_TOKENS, DIM, RING, MAX_LEN)
        room = past * 0 + (WRAP if WRAP > 0 else TOKENS)
        note_norms(of_row, norm, room, first, end, HEADS, NEW_TOKENS, DIM, RING, TILE, CHANNELS)
        source = source[0], source[1], past, norm, room
    first_valid = first_token + SINK_TOKENS
    note_ranks(source, order, center, energy + head * DIM, first_valid, first, end, DIM, RING, GROUP, TILE, CHANNELS)
    codes += head * (WORDS * TOKENS)
    scale += head * (GROUPS * DIM)
    zero += head * (GROUPS * DIM)
    for t0 in range(first, end, GROUP):
        before = turns_before(t0, WRAP)
        groups_before = before // GROUP * DIM
        flush_ranked(
            source,
            codes - before,
            scale - groups_before,
            zero - groups_before,
            order,
            center,
            first_valid,
            t0,
            DIM,
            RING,
            GROUP,
            TILE,
            TOKENS,
            CHANNELS,
            COUNTS,
        )
