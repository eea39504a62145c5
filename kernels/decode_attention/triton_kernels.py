"""Triton kernels of decode attention: split-K flash decoding on packed codes.

One program takes one split of the tokens of one KV head, with all its query heads and query tokens
as the ``ROWS`` columns of two matrix products, which are transposed so that the long axes, tokens
and channels, fill the matrix unit and few query rows waste little of it:

    logits^T [tokens, ROWS] = K [tokens, channels]  @  q^T [channels, ROWS]
    out^T  [channels, ROWS] = V^T [channels, tokens] @ p^T [tokens, ROWS]

``decode_kernel`` goes through the zones that tokens are stored in, one call each; ``combine_kernel`` merges
the splits. On NVIDIA's chips ``triton_interior.py`` takes whole groups in codes first, where it can. Values that
were rotated before they were quantized are rotated back as their sum. The pieces:

    triton_setup.py    where a program begins: its head, its tokens, its query rows
    triton_zones.py    a zone: which tokens, where their keys and values are
    triton_codes.py    logits of keys, outputs of values, in codes
    triton_ranked.py   logits of keys whose channels are ranked
    triton_unpack.py   words of codes as operands of the matrix unit
    triton_softmax.py  masks and the online softmax
"""

from __future__ import annotations

import triton
import triton.language as tl

from xquant_fx.kernels.decode_attention.triton_parts import store_part
from xquant_fx.kernels.decode_attention.triton_ranked import ranked_query
from xquant_fx.kernels.decode_attention.triton_setup import (
    code_query,
    codes_of,
    edge_of,
    full_query,
    interior_of,
    limits_of,
    mask_rows_of,
    norms_of,
    past_of,
    range_of_split,
    rows_of,
)
from xquant_fx.kernels.decode_attention.triton_zones import (
    attend_codes,
    attend_late_keys,
    attend_mixed,
    attend_new_tokens,
    attend_sinks,
    attend_unwritten,
    attend_window,
)
from xquant_fx.kernels.triton_rotation import rotate_back


@triton.jit
def decode_kernel(
    q,
    k_codes,
    k_scale,
    k_zero,
    k_order,
    k_center,
    k_norm,
    k_ring,
    k_sink,
    v_codes,
    v_scale,
    v_zero,
    v_ring,
    v_sink,
    start,
    past,
    mask,
    k_new,
    v_new,
    part,
    stats,
    KV_HEADS: tl.constexpr,
    HEADS_PER_KV: tl.constexpr,
    QUERY: tl.constexpr,
    NEW_TOKENS: tl.constexpr,
    PAST_STRIDE: tl.constexpr,
    MAX_LEN: tl.constexpr,
    K_DIM: tl.constexpr,
    K_BITS: tl.constexpr,
    K_LOW: tl.constexpr,
    K_WORDS: tl.constexpr,
    K_GROUP: tl.constexpr,
    K_TOKENS: tl.constexpr,
    K_GROUPS: tl.constexpr,
    K_RESIDUAL: tl.constexpr,
    K_RING: tl.constexpr,
    V_DIM: tl.constexpr,
    V_BITS: tl.constexpr,
    V_LOW: tl.constexpr,
    V_GROUP: tl.constexpr,
    V_TOKENS: tl.constexpr,
    V_STRIDE: tl.constexpr,
    V_RESIDUAL: tl.constexpr,
    V_RING: tl.constexpr,
    K_WRAP: tl.constexpr,
    V_WRAP: tl.constexpr,
    SINK_TOKENS: tl.constexpr,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    WINDOW: tl.constexpr,
    MASK_KIND: tl.constexpr,
    MASK_BATCH: tl.constexpr,
    MASK_HEADS: tl.constexpr,
    MASK_QUERY: tl.constexpr,
    HAS_NEW: tl.constexpr,
    ROWS: tl.constexpr,
    ROW_BLOCKS: tl.constexpr,
    SPLITS: tl.constexpr,
    MIXED_SPLIT: tl.constexpr,
    INTERIOR_SPLITS: tl.constexpr,
    INTERIOR_TILE: tl.constexpr,
    PARTS: tl.constexpr,
    TILE: tl.constexpr,
    FULL_TILE: tl.constexpr,
    LATE_TILE: tl.constexpr,
    TAIL: tl.constexpr,
    STAGES: tl.constexpr,
    FULL_STAGES: tl.constexpr,
    K_CHANNELS: tl.constexpr,
    V_CHANNELS: tl.constexpr,
    CODE_CHANNELS: tl.constexpr,
    K_LANES: tl.constexpr,
    V_LANES: tl.constexpr,
    LOW_CHANNELS: tl.constexpr,
    K_LOW_LANES: tl.constexpr,
    V_LOW_LANES: tl.constexpr,
    FOLD_K: tl.constexpr,
    FOLD_V: tl.constexpr,
    BITCAST: tl.constexpr,
    MODEL: tl.constexpr,
    RANKED: tl.constexpr,
    K_FOURS: tl.constexpr,
    K_TWOS: tl.constexpr,
    K_ONES: tl.constexpr,
    RANKS_1: tl.constexpr,
    RANKS_2: tl.constexpr,
    RANKS_3: tl.constexpr,
    RANKS_4: tl.constexpr,
    RANKS_5: tl.constexpr,
    RANKS_6: tl.constexpr,
    RANKS_7: tl.constexpr,
    ROTATION: tl.constexpr,
):
    """One split of one KV head (times ROWS query rows): unnormalized output, top and total of each row."""
    # In the order of the fields in triton_unpack.py and triton_softmax.py.
    COUNTS: tl.constexpr = (RANKS_1, RANKS_2, RANKS_3, RANKS_4, RANKS_5, RANKS_6, RANKS_7)
    TWOS: tl.constexpr = RANKS_6 + RANKS_2 - RANKS_4
    ONES: tl.constexpr = RANKS_7 + RANKS_5 - RANKS_6 + RANKS_3 - RANKS_4 + RANKS_1 - RANKS_2
    PLANES: tl.constexpr = (
        (RANKS_4, K_FOURS, 4, K_FOURS // 8 if K_FOURS < 32 else 4, K_TOKENS, K_GROUP, K_DIM, True, BITCAST, MODEL),
        (TWOS, K_TWOS, 2, K_TWOS // 16 if K_TWOS < 64 else 4, K_TOKENS, K_GROUP, K_DIM, True, BITCAST, MODEL),
        (ONES, K_ONES, 1, K_ONES // 32 if K_ONES < 128 else 4, K_TOKENS, K_GROUP, K_DIM, True, BITCAST, MODEL),
    )
    K_LOWER: tl.constexpr = (
        K_DIM, LOW_CHANNELS, K_LOW, K_LOW_LANES, K_TOKENS, K_GROUP, K_DIM, FOLD_K, BITCAST, MODEL,
    )  # fmt: skip
    KEYS: tl.constexpr = (
        K_DIM, CODE_CHANNELS, K_BITS - K_LOW, K_LANES, K_TOKENS, K_GROUP, K_DIM, FOLD_K, BITCAST, MODEL, RANKED, PLANES,
        COUNTS, K_LOWER, k_norm is not None, K_WRAP,
    )  # fmt: skip
    V_LOWER: tl.constexpr = (
        V_DIM, V_CHANNELS, V_LOW, V_LOW_LANES, V_TOKENS, V_GROUP, V_STRIDE, FOLD_V, BITCAST, MODEL, ROTATION,
    )  # fmt: skip
    VALUES: tl.constexpr = (
        V_DIM, V_CHANNELS, V_BITS - V_LOW, V_LANES, V_TOKENS, V_GROUP, V_STRIDE, FOLD_V, BITCAST, MODEL, ROTATION, 0, 0,
        V_LOWER, False, V_WRAP,
    )  # fmt: skip
    # The same for tiles of LATE_TILE tokens, which have fewer words.
    LATE_LANES: tl.constexpr = LATE_TILE * (V_BITS - V_LOW) // 32
    LATE_LOW_LANES: tl.constexpr = LATE_TILE * V_LOW // 32
    LATE_LOWER: tl.constexpr = (
        V_DIM, V_CHANNELS, V_LOW, LATE_LOW_LANES if LATE_LOW_LANES < V_LOW_LANES else V_LOW_LANES, V_TOKENS, V_GROUP,
        V_STRIDE, FOLD_V, BITCAST, MODEL, ROTATION,
    )  # fmt: skip
    LATE_CODES: tl.constexpr = (
        V_DIM, V_CHANNELS, V_BITS - V_LOW, LATE_LANES if LATE_LANES < V_LANES else V_LANES, V_TOKENS, V_GROUP, V_STRIDE,
        FOLD_V, BITCAST, MODEL, ROTATION, 0, 0, LATE_LOWER, False, V_WRAP,
    )  # fmt: skip
    LOGITS: tl.constexpr = (SCALE, SOFTCAP, WINDOW, MASK_KIND, SINK_TOKENS)
    split = tl.program_id(1)
    kv_head, batch = tl.program_id(0) // ROW_BLOCKS, tl.program_id(2)
    head = (batch * KV_HEADS + kv_head).to(tl.int64)
    keys = codes_of(head, k_codes, k_scale, k_zero, K_WORDS * K_TOKENS, K_GROUPS * K_DIM)
    values = codes_of(head, v_codes, v_scale, v_zero, V_TOKENS * V_BITS // 32 * V_DIM, V_DIM // V_GROUP * V_STRIDE)
    keys = keys[0], keys[1], keys[2], norms_of(batch, k_norm, k_codes, KEYS)
    RINGS: tl.constexpr = (K_RING, V_RING)
    residual = rows_of(head, k_ring, v_ring, RINGS, KEYS, VALUES)
    past_tokens = past_of(past, batch, QUERY, MAX_LEN, PAST_STRIDE)
    first_sink = tl.load(start + batch).to(tl.int32) if SINK_TOKENS > 0 else 0
    stored = past_tokens + NEW_TOKENS
    first, k_limit, v_limit = limits_of(past_tokens, K_RESIDUAL, V_RESIDUAL, WINDOW, KEYS)

    # Row r is query token r % QUERY of query head r // QUERY of this KV head.
    rows = tl.program_id(0) % ROW_BLOCKS * ROWS + tl.arange(0, ROWS)
    valid_rows = rows < HEADS_PER_KV * QUERY
    query_rows = head * (HEADS_PER_KV * QUERY) + rows
    MASK_SHAPE: tl.constexpr = (MASK_BATCH, MASK_HEADS, MASK_QUERY, MAX_LEN)
    mask_rows = mask_rows_of(mask, rows, valid_rows, batch, kv_head, HEADS_PER_KV, QUERY, MASK_KIND, MASK_SHAPE)
    view = (mask_rows, past_tokens + rows % QUERY)

    if RANKED:
        x = ranked_query(q, query_rows, valid_rows, k_order + head * K_DIM, k_center + head * K_DIM, KEYS)
    else:
        x = code_query(q, query_rows, valid_rows, KEYS)
    # Which of keys and values are in codes later than the others; both, in turns, where windows differ by a group only.
    LATE_KEYS: tl.constexpr = K_RESIDUAL > V_RESIDUAL + 1
    LATE_VALUES: tl.constexpr = (not RANKED) or K_RESIDUAL < V_RESIDUAL + K_GROUP
    both = tl.minimum(k_limit, v_limit) if LATE_KEYS else v_limit
    zone = (first, both, first_sink)
    if INTERIOR_SPLITS > 0:
        limit = tl.minimum(k_limit, v_limit)
        interior = interior_of(past_tokens, limit, first_sink, QUERY, WINDOW, SINK_TOKENS, INTERIOR_TILE)
        split_range = edge_of(split, first, both, interior, SPLITS, TILE)
    else:
        split_range = range_of_split(split, first, both, SPLITS, TILE)
    sums = attend_codes(x, keys, values, view, zone, split_range, KEYS, VALUES, LOGITS, TILE, STAGES)
    mixed = split == MIXED_SPLIT
    if LATE_KEYS:
        LATE_TILES: tl.constexpr = (LATE_TILE, FULL_STAGES)
        full_x = full_query(q, query_rows, valid_rows, K_CHANNELS, KEYS)
        zone = (tl.maximum(k_limit, first), v_limit, first_sink)
        sums = attend_late_keys(
            full_x, values, residual, view, zone, mixed, sums, KEYS, LATE_CODES, LOGITS, RINGS, LATE_TILES
        )
    if ROTATION >= 0:
        sums = sums[0], sums[1], rotate_back(sums[2], ROTATION)
    TILES: tl.constexpr = (FULL_TILE, FULL_STAGES)
    if LATE_VALUES:
        zone = (tl.maximum(v_limit, first), k_limit, first_sink)
        sums = attend_mixed(x, keys, residual, view, zone, mixed, sums, KEYS, VALUES, LOGITS, RINGS, TILES)
    x = full_query(q, query_rows, valid_rows, K_CHANNELS, KEYS)
    last = split == PARTS - INTERIOR_SPLITS - 1
    late = tl.maximum(k_limit, v_limit) if LATE_KEYS else k_limit
    zone = (tl.maximum(late, first), past_tokens if HAS_NEW else stored, first_sink)
    sums = attend_window(x, residual, view, zone, last, sums, KEYS, VALUES, LOGITS, RINGS, TILES)
    if HAS_NEW:
        new = rows_of(head, k_new, v_new, (NEW_TOKENS, NEW_TOKENS), KEYS, VALUES)
        zone = (past_tokens, stored, first_sink)
        sums = attend_new_tokens(x, new, view, zone, last, sums, KEYS, VALUES, LOGITS, NEW_TOKENS, TILES)
    if SINK_TOKENS > 0:
        sinks = rows_of(head, k_sink, v_sink, (SINK_TOKENS + 1, SINK_TOKENS + 1), KEYS, VALUES)
        zone = (first_sink, stored, first_sink)
        sums = attend_sinks(x, sinks, view, zone, last, sums, KEYS, VALUES, LOGITS, TILES)
    sums = attend_unwritten(mask_rows, stored, split, sums, LOGITS, MAX_LEN, PARTS - INTERIOR_SPLITS, TAIL)
    store_part(part, stats, query_rows * PARTS + INTERIOR_SPLITS + split, valid_rows, sums, V_DIM)


@triton.jit
def combine_kernel(
    part,
    stats,
    sink_logits,
    out,
    HEADS: tl.constexpr,
    QUERY: tl.constexpr,
    V_DIM: tl.constexpr,
    PARTS: tl.constexpr,
    PARTS_TILE: tl.constexpr,
    PARTS_STEP: tl.constexpr,
    V_CHANNELS: tl.constexpr,
    HAS_LOGITS: tl.constexpr,
):
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
