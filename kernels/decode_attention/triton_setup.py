"""Where a program of decode attention begins: its head, its tokens, its query rows and their masks.

A row is one query token of one query head of a KV head; ``rows`` are their numbers.
"""

from __future__ import annotations

import triton
import triton.language as tl

from xquant_fx.kernels.decode_attention.triton_unpack import (
    BITS,
    CHANNELS,
    DIM,
    FOLD,
    GROUP,
    LOWER,
    RANKED,
    TOKENS,
    word_order,
)
from xquant_fx.kernels.triton_widths import ranked_limit


@triton.jit
def codes_of(head, codes, scale, zero, WORDS: tl.constexpr, SCALES: tl.constexpr):
    """(codes, scale, zero) of one KV head of one sequence, of WORDS words and SCALES scales."""
    return codes + head * WORDS, scale + head * SCALES, scale if zero is None else zero + head * SCALES


@triton.jit
def norms_of(batch, norm, otherwise, KEYS: tl.constexpr):
    """Token norms of one sequence; ``otherwise``, which is not read, where there are none."""
    return otherwise if norm is None else norm + batch.to(tl.int64) * KEYS[TOKENS]


@triton.jit
def rows_of(head, keys, values, TOKENS: tl.constexpr, KEYS: tl.constexpr, VALUES: tl.constexpr):
    """(keys, values) in full precision of one KV head of one sequence, of TOKENS = (keys, values) tokens."""
    return keys + head * (TOKENS[0] * KEYS[DIM]), values + head * (TOKENS[1] * VALUES[DIM])


@triton.jit
def past_of(past, batch, QUERY: tl.constexpr, MAX_LEN: tl.constexpr, PAST_STRIDE: tl.constexpr):
    """Tokens stored before the step: one number for all rows of the batch, or each row's own, PAST_STRIDE apart.

    They are within bounds, wherever the step was asked for: its fault is read later.
    """
    return tl.maximum(tl.minimum(tl.load(past + batch * PAST_STRIDE).to(tl.int32), MAX_LEN - QUERY), 0)


@triton.jit
def limits_of(
    past_tokens, K_RESIDUAL: tl.constexpr, V_RESIDUAL: tl.constexpr, WINDOW: tl.constexpr, KEYS: tl.constexpr
):
    """The first token that any row sees, and the tokens below which keys are in codes, and values."""
    first = tl.maximum(past_tokens - WINDOW + 1, 0) if WINDOW > 0 else past_tokens * 0
    ranked: tl.constexpr = KEYS[RANKED]
    k_limit = ranked_limit(past_tokens, K_RESIDUAL, KEYS[GROUP]) if ranked else past_tokens // K_RESIDUAL * K_RESIDUAL
    return first, k_limit, tl.maximum(past_tokens - V_RESIDUAL, 0)


@triton.jit
def range_of_split(split, first, limit, SPLITS: tl.constexpr, TILE: tl.constexpr):
    """(low, high): the tiles of ``split`` among SPLITS of the tokens from ``first`` to ``limit``."""
    begin = first // TILE * TILE
    tiles = tl.cdiv(tl.maximum(limit - begin, 0), TILE)
    low = begin + split * tl.cdiv(tiles, SPLITS) * TILE
    return low, tl.where(split < SPLITS, tl.minimum(low + tl.cdiv(tiles, SPLITS) * TILE, limit), low)


@triton.jit
def interior_of(
    past_tokens, limit, first_sink, QUERY: tl.constexpr, WINDOW: tl.constexpr, SINKS: tl.constexpr, TILE: tl.constexpr
):
    """(low, high): the whole tiles of tokens in codes, below ``limit``, that every row sees and that have no sinks."""
    high = limit // TILE * TILE
    low = tl.maximum(past_tokens + QUERY - WINDOW, 0) if WINDOW > 0 else past_tokens * 0
    if SINKS > 0:
        low = tl.maximum(low, first_sink + SINKS)
    return tl.minimum(tl.cdiv(low, TILE) * TILE, high), high


@triton.jit
def edge_of(split, first, limit, interior, EDGES: tl.constexpr, TILE: tl.constexpr):
    """(low, high): what is before the ``interior`` and after it, for the first of two splits, and the last one."""
    low, high = interior
    before = (split == 0) & (EDGES > 1)
    begin = tl.where(before, first // TILE * TILE, high)
    return begin, tl.where(before, low, tl.where(split < EDGES, limit, begin))


@triton.jit
def mask_rows_of(
    mask,
    rows,
    valid_rows,
    batch,
    kv_head,
    HEADS_PER_KV: tl.constexpr,
    QUERY: tl.constexpr,
    MASK_KIND: tl.constexpr,
    MASK_SHAPE: tl.constexpr,
):
    """Where the mask's row of each query row begins: [ROWS], or [1] if all rows share one."""
    heads: tl.constexpr = MASK_SHAPE[1]
    queries: tl.constexpr = MASK_SHAPE[2]
    b = batch if MASK_SHAPE[0] > 1 else 0
    if heads * queries == 1:
        index = tl.zeros((1,), tl.int64) + b
    else:
        head = kv_head * HEADS_PER_KV + rows // QUERY if heads > 1 else rows * 0
        query = rows % QUERY if queries > 1 else rows * 0
        index = tl.where(valid_rows, (b * heads + head) * queries + query, 0).to(tl.int64)
    return index if MASK_KIND == "none" else mask + index * MASK_SHAPE[3]


@triton.jit
def code_query(q, rows, valid_rows, KEYS: tl.constexpr):
    """Query rows as ``code_logits`` wants them: float32 [channels, ROWS] in word order, for each plane of fields."""
    if KEYS[LOWER][BITS] > 0:
        high = query_of_fields(q, rows, valid_rows, KEYS)
        return high, query_of_fields(q, rows, valid_rows, KEYS[LOWER])
    else:
        return query_of_fields(q, rows, valid_rows, KEYS)


@triton.jit
def query_of_fields(q, rows, valid_rows, KEYS: tl.constexpr):
    """The same for one plane."""
    d, factor = word_order(KEYS[CHANNELS], KEYS)
    in_bounds = valid_rows[None, :] & (d < KEYS[DIM])[:, None]
    offsets = rows[None, :] * KEYS[DIM] + d[:, None]
    x = tl.load(q + offsets, mask=in_bounds, other=0.0).to(tl.float32)
    return x * factor[:, None] if KEYS[FOLD] else x


@triton.jit
def full_query(q, rows, valid_rows, CHANNELS_TILE: tl.constexpr, KEYS: tl.constexpr):
    """Query rows [channels, ROWS] as they are, for keys in full precision."""
    d = tl.arange(0, CHANNELS_TILE)
    in_bounds = valid_rows[None, :] & (d < KEYS[DIM])[:, None]
    offsets = rows[None, :] * KEYS[DIM] + d[:, None]
    return tl.load(q + offsets, mask=in_bounds, other=0.0)
