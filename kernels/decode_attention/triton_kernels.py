"""Triton kernels of decode attention: split-K flash decoding on packed codes.

One program takes one split of the tokens of one KV head, with all its query heads and query tokens
as the ``ROWS`` columns of two matrix products, which are transposed so that the long axes, tokens
and channels, fill the matrix unit and few query rows waste little of it:

    logits^T [tokens, ROWS] = K [tokens, channels]  @  q^T [channels, ROWS]
    out^T  [channels, ROWS] = V^T [channels, tokens] @ p^T [tokens, ROWS]

``decode_kernel`` goes through the zones that tokens are stored in, one call each; ``combine_kernel`` merges
the splits. The pieces:

    triton_zones.py    a zone: which tokens, where their keys and values are
    triton_codes.py    logits and outputs of packed codes
    triton_unpack.py   words of codes as operands of the matrix unit
    triton_softmax.py  masks and the online softmax
"""

from __future__ import annotations

import triton
import triton.language as tl

from xquant_fx.kernels.decode_attention.triton_unpack import CHANNELS, DIM, FOLD, word_order
from xquant_fx.kernels.decode_attention.triton_zones import (
    attend_codes,
    attend_mixed,
    attend_new_tokens,
    attend_sinks,
    attend_unwritten,
    attend_window,
)


@triton.jit
def store_part(part, stats, index, valid_rows, sums, V_DIM: tl.constexpr):
    """Sums of a split to places ``index`` [ROWS]: unnormalized output, top and total of each row."""
    top, total, acc = sums
    d = tl.arange(0, acc.shape[0])
    # Rows with no token in this split have total 0, and their part is not read either.
    in_bounds = (d < V_DIM)[:, None] & (valid_rows & (total != 0))[None, :]
    tl.store(part + index[None, :] * V_DIM + d[:, None], acc, mask=in_bounds)
    tl.store(stats + index * 2, top, mask=valid_rows)
    tl.store(stats + index * 2 + 1, total, mask=valid_rows)


@triton.jit
def head_codes(codes, scale, zero, head, WORDS: tl.constexpr, SCALES: tl.constexpr):
    """(codes, scale, zero) of one KV head of one sequence."""
    return codes + head * WORDS, scale + head * SCALES, zero + head * SCALES


@triton.jit
def range_of_split(split, first, limit, SPLITS: tl.constexpr, TILE: tl.constexpr):
    """(low, high): the tiles of ``split`` among SPLITS of the tokens from ``first`` to ``limit``."""
    begin = first // TILE * TILE
    tiles = tl.cdiv(tl.maximum(limit - begin, 0), TILE)
    low = begin + split * tl.cdiv(tiles, SPLITS) * TILE
    return low, tl.where(split < SPLITS, tl.minimum(low + tl.cdiv(tiles, SPLITS) * TILE, limit), low)


@triton.jit
def mask_rows_of(
    mask, rows, valid_rows, batch, kv_head,
    HEADS_PER_KV: tl.constexpr, QUERY: tl.constexpr, MASK_KIND: tl.constexpr, MASK_BATCH: tl.constexpr,
    MASK_HEADS: tl.constexpr, MASK_QUERY: tl.constexpr, MAX_LEN: tl.constexpr,
):  # fmt: skip
    """Where the mask's row of each query row begins: [ROWS], or [1] if all rows share one."""
    b = batch if MASK_BATCH > 1 else 0
    if MASK_HEADS * MASK_QUERY == 1:
        index = tl.zeros((1,), tl.int64) + b
    else:
        head = kv_head * HEADS_PER_KV + rows // QUERY if MASK_HEADS > 1 else rows * 0
        query = rows % QUERY if MASK_QUERY > 1 else rows * 0
        index = tl.where(valid_rows, (b * MASK_HEADS + head) * MASK_QUERY + query, 0).to(tl.int64)
    return index if MASK_KIND == "none" else mask + index * MAX_LEN


@triton.jit
def code_query(q, rows, valid_rows, KEYS: tl.constexpr):
    """Query rows as ``code_logits`` wants them: float32 [channels, ROWS] in word order."""
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


@triton.jit
def decode_kernel(
    q, k_codes, k_scale, k_zero, k_ring, k_sink, v_codes, v_scale, v_zero, v_ring, v_sink, start, past, mask,
    k_new, v_new, part, stats,
    KV_HEADS: tl.constexpr, HEADS_PER_KV: tl.constexpr, QUERY: tl.constexpr, NEW_TOKENS: tl.constexpr,
    MAX_LEN: tl.constexpr, K_DIM: tl.constexpr, K_BITS: tl.constexpr, K_GROUP: tl.constexpr, K_TOKENS: tl.constexpr,
    K_GROUPS: tl.constexpr, V_DIM: tl.constexpr, V_BITS: tl.constexpr, V_GROUP: tl.constexpr, V_TOKENS: tl.constexpr,
    V_STRIDE: tl.constexpr, RING: tl.constexpr, RESIDUAL: tl.constexpr, SINK_TOKENS: tl.constexpr, SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr, WINDOW: tl.constexpr, MASK_KIND: tl.constexpr, MASK_BATCH: tl.constexpr,
    MASK_HEADS: tl.constexpr, MASK_QUERY: tl.constexpr, HAS_NEW: tl.constexpr,
    ROWS: tl.constexpr, ROW_BLOCKS: tl.constexpr, SPLITS: tl.constexpr, MIXED_SPLIT: tl.constexpr,
    PARTS: tl.constexpr, TILE: tl.constexpr, FULL_TILE: tl.constexpr, TAIL: tl.constexpr, STAGES: tl.constexpr,
    FULL_STAGES: tl.constexpr, K_CHANNELS: tl.constexpr, V_CHANNELS: tl.constexpr, CODE_CHANNELS: tl.constexpr,
    K_LANES: tl.constexpr, V_LANES: tl.constexpr, FOLD_K: tl.constexpr, FOLD_V: tl.constexpr, BITCAST: tl.constexpr,
    MODEL_DTYPE: tl.constexpr,
):  # fmt: skip
    """One split of one KV head (times ROWS query rows): unnormalized output, top and total of each row."""
    KEYS: tl.constexpr = (
        K_DIM, CODE_CHANNELS, K_BITS, K_LANES, K_TOKENS, K_GROUP, K_DIM, FOLD_K, BITCAST, MODEL_DTYPE,
    )  # fmt: skip
    VALUES: tl.constexpr = (
        V_DIM, V_CHANNELS, V_BITS, V_LANES, V_TOKENS, V_GROUP, V_STRIDE, FOLD_V, BITCAST, MODEL_DTYPE,
    )  # fmt: skip
    LOGITS: tl.constexpr = (SCALE, SOFTCAP, WINDOW, MASK_KIND, SINK_TOKENS)
    split = tl.program_id(0)
    kv_head, batch = tl.program_id(1) // ROW_BLOCKS, tl.program_id(2)
    head = (batch * KV_HEADS + kv_head).to(tl.int64)
    keys = head_codes(k_codes, k_scale, k_zero, head, (K_DIM * K_BITS + 31) // 32 * K_TOKENS, K_GROUPS * K_DIM)
    values = head_codes(
        v_codes, v_scale, v_zero, head, V_TOKENS * V_BITS // 32 * V_DIM, V_DIM // V_GROUP * V_STRIDE
    )
    k_ring += head * (RING * K_DIM)
    v_ring += head * (RING * V_DIM)

    past_tokens = tl.load(past).to(tl.int32)
    stored = past_tokens + NEW_TOKENS
    first_sink = tl.load(start + batch).to(tl.int32) if SINK_TOKENS > 0 else 0
    # No row sees tokens before ``first``; keys below ``k_limit`` and values below ``v_limit`` are in codes.
    first = tl.maximum(past_tokens - WINDOW + 1, 0) if WINDOW > 0 else 0
    k_limit = past_tokens // RESIDUAL * RESIDUAL
    v_limit = tl.maximum(past_tokens - RESIDUAL, 0)

    # Row r is query token r % QUERY of query head r // QUERY of this KV head.
    rows = tl.program_id(1) % ROW_BLOCKS * ROWS + tl.arange(0, ROWS)
    valid_rows = rows < HEADS_PER_KV * QUERY
    query_rows = head * (HEADS_PER_KV * QUERY) + rows
    mask_rows = mask_rows_of(
        mask, rows, valid_rows, batch, kv_head, HEADS_PER_KV, QUERY, MASK_KIND, MASK_BATCH, MASK_HEADS, MASK_QUERY,
        MAX_LEN,
    )  # fmt: skip
    view = (mask_rows, past_tokens + rows % QUERY)

    x = code_query(q, query_rows, valid_rows, KEYS)
    zone = (first, v_limit, first_sink)
    split_range = range_of_split(split, first, v_limit, SPLITS, TILE)
    sums = attend_codes(x, keys, values, view, zone, split_range, KEYS, VALUES, LOGITS, TILE, STAGES)

    zone = (tl.maximum(v_limit, first), k_limit, first_sink)
    active = split == MIXED_SPLIT
    sums = attend_mixed(x, keys, v_ring, view, zone, active, sums, KEYS, VALUES, LOGITS, RING, FULL_TILE, FULL_STAGES)

    last = split == PARTS - 1
    x = full_query(q, query_rows, valid_rows, K_CHANNELS, KEYS)
    in_ring = past_tokens if HAS_NEW else stored
    zone = (tl.maximum(k_limit, first), in_ring, first_sink)
    sums = attend_window(x, k_ring, v_ring, view, zone, last, sums, KEYS, VALUES, LOGITS, RING, FULL_TILE, FULL_STAGES)
    if HAS_NEW:
        k_new += head * (NEW_TOKENS * K_DIM)
        v_new += head * (NEW_TOKENS * V_DIM)
        zone = (past_tokens, stored, first_sink)
        sums = attend_new_tokens(
            x, k_new, v_new, view, zone, last, sums, KEYS, VALUES, LOGITS, NEW_TOKENS, FULL_TILE, FULL_STAGES
        )
    if SINK_TOKENS > 0:
        k_sink += head * ((SINK_TOKENS + 1) * K_DIM)
        v_sink += head * ((SINK_TOKENS + 1) * V_DIM)
        zone = (first_sink, stored, first_sink)
        sums = attend_sinks(x, k_sink, v_sink, view, zone, last, sums, KEYS, VALUES, LOGITS, FULL_TILE, FULL_STAGES)
    sums = attend_unwritten(mask_rows, stored, split, sums, LOGITS, MAX_LEN, PARTS, TAIL)
    store_part(part, stats, query_rows * PARTS + split, valid_rows, sums, V_DIM)


@triton.jit
def combine_kernel(
    part, stats, sink_logits, out, HEADS: tl.constexpr, QUERY: tl.constexpr, V_DIM: tl.constexpr, PARTS: tl.constexpr,
    PARTS_TILE: tl.constexpr, PARTS_STEP: tl.constexpr, V_CHANNELS: tl.constexpr, HAS_LOGITS: tl.constexpr,
):  # fmt: skip
    """Merge the PARTS of one query row; the sink logit of its head, if any, counts in the sum alone."""
    row = tl.program_id(0).to(tl.int64)
    parts, d = tl.arange(0, PARTS_TILE), tl.arange(0, V_CHANNELS)
    stats += row * PARTS * 2
    part += row * PARTS * V_DIM
    tops = tl.load(stats + parts * 2, mask=parts < PARTS, other=float("-inf"))
    totals = tl.load(stats + parts * 2 + 1, mask=parts < PARTS, other=0.0)
    top = tl.max(tops, 0)
    if HAS_LOGITS:
        sink_logit = tl.load(sink_logits + row // QUERY % HEADS).to(tl.float32)
        top = tl.maximum(top, sink_logit)
    base = tl.where(top == float("-inf"), 0.0, top)
    total = tl.sum(tl.exp(tops - base) * totals, 0)
    if HAS_LOGITS:
        total += tl.exp(sink_logit - base)
    acc = tl.zeros((V_CHANNELS,), tl.float32)
    for p0 in tl.range(0, PARTS, PARTS_STEP):
        i = p0 + tl.arange(0, PARTS_STEP)
        weight = tl.exp(tl.load(stats + i * 2, mask=i < PARTS, other=float("-inf")) - base)
        written = tl.load(stats + i * 2 + 1, mask=i < PARTS, other=0.0) != 0
        in_bounds = written[:, None] & (d < V_DIM)[None, :]
        outs = tl.load(part + i[:, None] * V_DIM + d[None, :], mask=in_bounds, other=0.0)
        acc += tl.sum(weight[:, None] * outs, 0)
    mean = acc / tl.where(total == 0, 1.0, total)
    tl.store(out + row * V_DIM + d, mean.to(out.dtype.element_ty), mask=d < V_DIM)
