"""Norms of tokens, and ranking the channels of keys when a sequence's first groups are quantized.

``schemes/per_channel_ranked.py`` says what they are.

``source`` is explained in ``triton_window.py``. Tokens before ``first_valid`` are padding or attention sinks and take
no part.
"""

from __future__ import annotations

import triton
import triton.language as tl

from xquant_fx.kernels.quantize_store.triton_keys import tile_of_group
from xquant_fx.kernels.quantize_store.triton_quantizer import LARGEST_FLOAT32
from xquant_fx.kernels.quantize_store.triton_window import full_tokens
from xquant_fx.kernels.triton_small_floats import encode_norm

# Channels that all others are compared with at a time: as many as registers have room for.
COMPARED = tl.constexpr(16)


@triton.jit
def note_norms(
    source,
    norm,
    room,
    first,
    end,
    HEADS: tl.constexpr,
    NEW_TOKENS: tl.constexpr,
    DIM: tl.constexpr,
    RING: tl.constexpr,
    TILE: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Write the norms of tokens ``first`` to below ``end``; ``source`` is that of the first head of a batch row.

    They start over after ``room`` of them. The programs of all its heads write the same: none has to wait for another.
    """
    x, ring, past = source
    d = tl.arange(0, CHANNELS)
    for t0 in range(first, end, TILE):
        tokens = t0 + tl.arange(0, TILE)
        in_bounds = (tokens < end)[:, None] & (d < DIM)[None, :]
        square = tl.zeros((TILE,), tl.float32)
        for head in range(HEADS):
            of_head = x + head * (NEW_TOKENS * DIM), ring + head * (RING * DIM), past
            k = full_tokens(of_head, tokens, d, in_bounds, DIM, RING)
            square += tl.sum(k * k, 1)
        root = tl.sqrt_rn(square * (1.0 / (HEADS * DIM)))
        tl.store(norm + tokens % room, encode_norm(root), mask=tokens < end)
    tl.debug_barrier()  # other threads of the program read them


@triton.jit
def sums_of_group(
    source, first_valid, t0, d, DIM: tl.constexpr, RING: tl.constexpr, GROUP: tl.constexpr, TILE: tl.constexpr
):
    """Per channel ``d`` of the group at ``t0``: sums of keys, of squares, of squared distances from the mean; count."""
    total, square, count = tl.zeros(d.shape, tl.float32), tl.zeros(d.shape, tl.float32), tl.zeros(d.shape, tl.float32)
    for i in range(0, GROUP, TILE):
        tokens, in_bounds, x = tile_of_group(source, i, t0, d, DIM, RING, GROUP, TILE)
        valid = in_bounds & (tokens >= first_valid)[:, None]
        x = tl.where(valid, x, 0.0)
        total += tl.sum(x, 0)
        square += tl.sum(x * x, 0)
        count += tl.sum(valid.to(tl.float32), 0)
    mean = tl.div_rn(total, tl.maximum(count, 1.0))
    spread = tl.zeros(d.shape, tl.float32)
    for i in range(0, GROUP, TILE):
        tokens, in_bounds, x = tile_of_group(source, i, t0, d, DIM, RING, GROUP, TILE)
        off = tl.where(in_bounds & (tokens >= first_valid)[:, None], x - mean[None, :], 0.0)
        spread += tl.sum(off * off, 0)
    return total, square, spread, count


@triton.jit
def importances(
    source,
    energy,
    first_valid,
    first,
    end,
    d,
    DIM: tl.constexpr,
    RING: tl.constexpr,
    GROUP: tl.constexpr,
    TILE: tl.constexpr,
):
    """(importance, mean) of channels ``d`` over the groups from ``first`` to below ``end``; -1 for no channel."""
    total, square, spread = tl.zeros(d.shape, tl.float32), tl.zeros(d.shape, tl.float32), tl.zeros(d.shape, tl.float32)
    count = tl.zeros(d.shape, tl.float32)
    for t0 in range(first, end, GROUP):
        t, sq, sp, c = sums_of_group(source, first_valid, t0, d, DIM, RING, GROUP, TILE)
        total += t
        square += sq
        spread += sp
        count += c
    count = tl.maximum(count, 1.0)
    e = tl.load(energy + d, mask=d < DIM, other=0.0)
    seen = tl.max((e > 0).to(tl.int32), 0) > 0
    importance = tl.div_rn(spread, count) * tl.where(seen, e, tl.div_rn(square, count))
    importance = tl.where(importance == importance, tl.minimum(importance, LARGEST_FLOAT32), 0.0)
    mean = tl.div_rn(total, count)
    return tl.where(d < DIM, importance, -1.0), tl.where(tl.abs(mean) < float("inf"), mean, 0.0)


@triton.jit
def ranks_of(importance, d, scratch, DIM: tl.constexpr):
    """How many channels matter more than each of ``d``; the first of equals goes first. ``scratch`` has DIM places."""
    tl.store(scratch + d, importance, mask=d < DIM)
    tl.debug_barrier()
    rank = tl.zeros(d.shape, tl.int32)
    for begin in range(0, DIM, COMPARED):
        i = begin + tl.arange(0, COMPARED)
        other = tl.load(scratch + i, mask=i < DIM, other=-1.0)
        ahead = other[None, :] > importance[:, None]
        ahead = ahead | ((other[None, :] == importance[:, None]) & (i[None, :] < d[:, None]))
        rank += tl.sum(ahead.to(tl.int32), 1)
    tl.debug_barrier()
    return rank


@triton.jit
def note_ranks(
    source,
    order,
    center,
    energy,
    first_valid,
    first,
    end,
    DIM: tl.constexpr,
    RING: tl.constexpr,
    GROUP: tl.constexpr,
    TILE: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Write order and centers if the groups from ``first`` to below ``end`` are the first of a sequence."""
    # Of a padded sequence the first group that is no padding counts.
    begins = (first <= first_valid // GROUP * GROUP) & (end > first) & (end > first_valid)
    if begins:
        d = tl.arange(0, CHANNELS)
        importance, mean = importances(source, energy, first_valid, first, end, d, DIM, RING, GROUP, TILE)
        rank = ranks_of(importance, d, center, DIM)
        tl.store(order + rank, d, mask=d < DIM)
        tl.store(center + rank, mean, mask=d < DIM)
        tl.debug_barrier()  # other threads of the program read them
