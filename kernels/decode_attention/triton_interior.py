"""Whole groups of tokens in codes: one warp a program, no barrier, codes never in shared memory as float16.

    logits [tokens, rows] = K [tokens, channels] @ (q s)^T [channels, rows]
    out^T [channels, rows] += V^T [channels, tokens] @ p [tokens, rows]

Codes are the left operand of both, so rows are columns, of which 8 are enough: nothing is padded.

What remains, tokens at both ends, windows and sinks, is for ``decode_kernel``, beside which this one runs where
``triton_interior_settings.py`` says so. The pieces:

    triton_interior_loop.py    the loop over tiles, the online softmax, values
    triton_interior_keys.py    queries, and logits of keys
    triton_interior_scales.py  scales of keys as they are stored
    triton_interior_rows.py    another loop, for more than 8 query rows: codes as the right operand
    triton_fragments.py        words of codes as operands, in the order of threads
"""

from __future__ import annotations

import triton
import triton.language as tl

from xquant_fx.kernels.decode_attention.triton_interior_keys import interior_query
from xquant_fx.kernels.decode_attention.triton_interior_loop import attend_interior
from xquant_fx.kernels.decode_attention.triton_interior_row_keys import rows_query
from xquant_fx.kernels.decode_attention.triton_interior_rows import attend_rows
from xquant_fx.kernels.decode_attention.triton_parts import store_part
from xquant_fx.kernels.decode_attention.triton_setup import (
    codes_of,
    interior_of,
    limits_of,
    mask_rows_of,
    norms_of,
    past_of,
    range_of_split,
)
from xquant_fx.kernels.triton_rotation import rotate_back


@triton.jit
def interior_kernel(
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
    PAST_STRIDE: tl.constexpr,
    MAX_LEN: tl.constexpr,
    K_DIM: tl.constexpr,
    K_BITS: tl.constexpr,
    K_WORDS: tl.constexpr,
    K_GROUP: tl.constexpr,
    K_TOKENS: tl.constexpr,
    K_GROUPS: tl.constexpr,
    V_DIM: tl.constexpr,
    V_BITS: tl.constexpr,
    V_LOW: tl.constexpr,
    V_GROUP: tl.constexpr,
    V_TOKENS: tl.constexpr,
    V_STRIDE: tl.constexpr,
    K_WRAP: tl.constexpr,
    V_WRAP: tl.constexpr,
    K_RESIDUAL: tl.constexpr,
    V_RESIDUAL: tl.constexpr,
    SINK_TOKENS: tl.constexpr,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    WINDOW: tl.constexpr,
    MASK_KIND: tl.constexpr,
    MASK_BATCH: tl.constexpr,
    MASK_HEADS: tl.constexpr,
    MASK_QUERY: tl.constexpr,
    INTERIOR_ROWS: tl.constexpr,
    INTERIOR_BLOCKS: tl.constexpr,
    INTERIOR_SPLITS: tl.constexpr,
    INTERIOR_TILE: tl.constexpr,
    PARTS: tl.constexpr,
    K_CHANNELS: tl.constexpr,
    V_CHANNELS: tl.constexpr,
    RANKED: tl.constexpr,
    FOUR_WORDS: tl.constexpr,
    TWO_WORDS: tl.constexpr,
    ONE_WORDS: tl.constexpr,
    RANKS_1: tl.constexpr,
    RANKS_2: tl.constexpr,
    RANKS_3: tl.constexpr,
    RANKS_4: tl.constexpr,
    RANKS_5: tl.constexpr,
    RANKS_6: tl.constexpr,
    RANKS_7: tl.constexpr,
    ROTATION: tl.constexpr,
    ASM: tl.constexpr,
):
    """One split of the whole tiles of one KV head, with INTERIOR_ROWS query rows: a part, as of ``decode_kernel``."""
    COUNTS: tl.constexpr = (RANKS_1, RANKS_2, RANKS_3, RANKS_4, RANKS_5, RANKS_6, RANKS_7)
    # Of plain keys a code is one field, of 8 bits at most, or two.
    WIDE: tl.constexpr = 8 if K_BITS == 8 and not RANKED else 4
    FOURS: tl.constexpr = RANKS_4 if RANKED else K_DIM
    TWOS: tl.constexpr = RANKS_6 + RANKS_2 - RANKS_4 if RANKED else K_DIM
    ONES: tl.constexpr = RANKS_7 + RANKS_5 - RANKS_6 + RANKS_3 - RANKS_4 + RANKS_1 - RANKS_2 if RANKED else K_DIM
    TWOS_AT: tl.constexpr = (FOURS * 4 + 31) // 32 if RANKED else 0
    ONES_AT: tl.constexpr = TWOS_AT + (TWOS * 2 + 31) // 32 if RANKED or TWO_WORDS > 0 else 0
    K_LOW: tl.constexpr = 1 if TWO_WORDS > 0 and ONE_WORDS > 0 and not RANKED else 0
    PLANES: tl.constexpr = (
        (FOURS, WIDE, FOUR_WORDS, 0), (TWOS, 2, TWO_WORDS, TWOS_AT), (ONES, 1, ONE_WORDS, ONES_AT),
    )  # fmt: skip
    # In the order of the fields in triton_unpack.py and triton_softmax.py; here BITS are a whole code's, LOWER a width.
    KEYS: tl.constexpr = (
        K_DIM, K_CHANNELS, K_BITS, 4, K_TOKENS, K_GROUP, K_DIM, True, True, "fp16", RANKED, PLANES, COUNTS, K_LOW,
        k_norm is not None, K_WRAP,
    )  # fmt: skip
    VALUES: tl.constexpr = (
        V_DIM, V_CHANNELS, V_BITS, 4, V_TOKENS, V_GROUP, V_STRIDE, True, True, "fp16", ROTATION, 0, 0, V_LOW, False,
        V_WRAP,
    )  # fmt: skip
    LOGITS: tl.constexpr = (SCALE, SOFTCAP, WINDOW, MASK_KIND, SINK_TOKENS)
    split = tl.program_id(1)
    kv_head, batch = tl.program_id(0) // INTERIOR_BLOCKS, tl.program_id(2)
    head = (batch * KV_HEADS + kv_head).to(tl.int64)
    keys = codes_of(head, k_codes, k_scale, k_zero, K_WORDS * K_TOKENS, K_GROUPS * K_DIM)
    values = codes_of(head, v_codes, v_scale, v_zero, V_TOKENS * V_BITS // 32 * V_DIM, V_DIM // V_GROUP * V_STRIDE)
    keys = keys[0], keys[1], keys[2], norms_of(batch, k_norm, k_codes, KEYS)
    past_tokens = past_of(past, batch, QUERY, MAX_LEN, PAST_STRIDE)
    first_sink = tl.load(start + batch).to(tl.int32) if SINK_TOKENS > 0 else 0
    _first, k_limit, v_limit = limits_of(past_tokens, K_RESIDUAL, V_RESIDUAL, WINDOW, KEYS)
    limit = tl.minimum(k_limit, v_limit)
    low, high = interior_of(past_tokens, limit, first_sink, QUERY, WINDOW, SINK_TOKENS, INTERIOR_TILE)
    tile_range = range_of_split(split, low, high, INTERIOR_SPLITS, INTERIOR_TILE)

    # Row r is query token r % QUERY of query head r // QUERY of this KV head.
    first_row = tl.program_id(0) % INTERIOR_BLOCKS * INTERIOR_ROWS
    rows = first_row + tl.arange(0, INTERIOR_ROWS)
    all_rows: tl.constexpr = HEADS_PER_KV * QUERY
    valid_rows = rows < all_rows
    MASK_SHAPE: tl.constexpr = (MASK_BATCH, MASK_HEADS, MASK_QUERY, MAX_LEN)
    query_rows = head * (HEADS_PER_KV * QUERY)
    order, center = k_order, k_center
    if RANKED:
        order, center = k_order + head * K_DIM, k_center + head * K_DIM
    BY_FOUR: tl.constexpr = MAX_LEN % 4 == 0
    if INTERIOR_ROWS > 8:
        x = rows_query(q, query_rows + rows, valid_rows, order, center, K_CHANNELS, KEYS)
        masks = tl.arange(0, 8) + first_row
        first = mask_rows_of(mask, masks, masks < all_rows, batch, kv_head, HEADS_PER_KV, QUERY, MASK_KIND, MASK_SHAPE)
        second = first
        if MASK_HEADS > 1:
            second = mask_rows_of(
                mask, masks + 8, masks + 8 < all_rows, batch, kv_head, HEADS_PER_KV, QUERY, MASK_KIND, MASK_SHAPE
            )
        # Where heads have the same mask, 8 rows have those of all query tokens, of which there are no more.
        SAME: tl.constexpr = 0 if MASK_HEADS > 1 else QUERY
        sums = attend_rows(
            x, keys, values, (first, second), tile_range, KEYS, VALUES, LOGITS, SAME, INTERIOR_TILE, BY_FOUR, ASM
        )
    else:
        mask_rows = mask_rows_of(mask, rows, valid_rows, batch, kv_head, HEADS_PER_KV, QUERY, MASK_KIND, MASK_SHAPE)
        x = interior_query(q, query_rows + rows, valid_rows, order, center, K_CHANNELS, KEYS)
        sums = attend_interior(
            x, keys, values, mask_rows, tile_range, KEYS, VALUES, LOGITS, INTERIOR_TILE, BY_FOUR, ASM
        )
    if ROTATION >= 0:
        sums = sums[0], sums[1], rotate_back(sums[2], ROTATION)
    store_part(part, stats, (query_rows + rows) * PARTS + split, valid_rows, sums, V_DIM)
