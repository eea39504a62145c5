"""Whole groups of tokens in codes: one warp a program, no barrier, codes never in shared memory as float16.

    logits [rows, tokens] = (q s) [rows, channels] @ K^T [channels, tokens]
    out^T [channels, rows] += V^T [channels, tokens] @ p^T [tokens, rows]

Codes of keys are the right operand, and the logits of a thread are of the tokens whose values it multiplies next, so
probabilities stay where they are. A tile lies in one group and every row sees all of it but for a mask of bool: what
remains, at both ends, windows and sinks, is for ``decode_kernel``. Sums are as there, times 2**14, logits in base 2.
"""

from __future__ import annotations

import triton
import triton.language as tl

from xquant_fx.kernels.decode_attention.triton_fragments import (
    exp2,
    fragment,
    inverse_power,
    power_above,
    right_operand,
    to_columns,
)
from xquant_fx.kernels.decode_attention.triton_interior_keys import (
    LOG2_E,
    PADDED_ROWS,
    interior_logits,
    interior_query,
    interior_scales,
)
from xquant_fx.kernels.decode_attention.triton_parts import store_part
from xquant_fx.kernels.decode_attention.triton_products import LARGEST, SUBNORMAL
from xquant_fx.kernels.decode_attention.triton_setup import (
    codes_of,
    interior_of,
    limits_of,
    mask_rows_of,
    norms_of,
    range_of_split,
)
from xquant_fx.kernels.decode_attention.triton_softmax import MASK, SM_SCALE, SOFTCAP, tanh
from xquant_fx.kernels.decode_attention.triton_unpack import BITS, CHANNELS, DIM, NORMS, ROTATION
from xquant_fx.kernels.triton_rotation import rotate_back
from xquant_fx.kernels.triton_small_floats import UNIT_OF_SCALES, decode_scale, scale_in_units

# Top of a row that has seen nothing yet: finite, so that differences are numbers.
NOTHING = tl.constexpr(-1e30)
LARGEST_LOG2 = tl.constexpr(14.0)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def value_scales(values, t0, TILE: tl.constexpr, VALUES: tl.constexpr):
    """(scales, zero points) [TILE] of a tile, as stored."""
    _, scale, zero = values
    tokens = t0 + tl.arange(0, TILE)
    s = tl.load(scale + tokens)
    return s, s if VALUES[ROTATION] != -1 else tl.load(zero + tokens)


@triton.jit
def token_norms(keys, t0, TILE: tl.constexpr, KEYS: tl.constexpr):
    """The norms [TILE] of a tile's keys, as stored; nothing of use where there are none."""
    if KEYS[NORMS]:
        return tl.load(keys[3] + t0 + tl.arange(0, TILE))
    else:
        return tl.zeros((1,), tl.uint8)


@triton.jit
def interior_mask(mask_rows, t0, TILE: tl.constexpr, MASK_KIND: tl.constexpr):
    """The mask [rows or 1, TILE] of a tile; nothing of use without one."""
    if MASK_KIND == "none":
        return tl.zeros((1, 1), tl.int1)
    else:
        return tl.load(mask_rows[:, None] + (t0 + tl.arange(0, TILE))[None, :])


@triton.jit
def in_columns(seen, COLUMN_BITS: tl.constexpr):
    """A mask [rows or 1, tokens] with tokens in the order of columns."""
    if seen.shape[0] == 1:
        return to_columns(tl.reshape(seen, (seen.shape[1],)), COLUMN_BITS)[None, :]
    else:
        planes: tl.constexpr = 8 // COLUMN_BITS
        x = tl.reshape(seen, (seen.shape[0], seen.shape[1] // (16 * planes), 4, planes, 2, 2))
        return tl.reshape(tl.permute(x, (0, 1, 3, 5, 2, 4)), seen.shape)


@triton.jit
def quad_sums(x):
    """[rows, 4]: sums over tokens [rows, tokens] of what each thread of four has."""
    x = tl.reshape(x, (x.shape[0], x.shape[1] // 8, 4, 2))
    return tl.sum(tl.sum(x, 3), 1)


@triton.jit
def value_words(codes, t0, TILE: tl.constexpr, VALUES: tl.constexpr):
    """Words [words, channels] of a tile of values, as they lie in memory."""
    w = t0 // (32 // VALUES[BITS]) + tl.arange(0, TILE * VALUES[BITS] // 32)
    d = tl.arange(0, VALUES[CHANNELS])
    pointers = codes + w[:, None] * VALUES[DIM] + d[None, :]
    if VALUES[CHANNELS] == VALUES[DIM]:
        return tl.load(pointers)
    else:
        return tl.load(pointers, mask=(d < VALUES[DIM])[None, :], other=0)


@triton.jit
def attend_interior(
    q,
    keys,
    values,
    mask_rows,
    tile_range,
    KEYS: tl.constexpr,
    VALUES: tl.constexpr,
    LOGITS: tl.constexpr,
    TILE: tl.constexpr,
    ASM: tl.constexpr,
):
    """Sums (top [ROWS], total [ROWS], acc [channels, ROWS]) of tokens of ``tile_range`` = (low, high), whole tiles."""
    low, high = tile_range
    ROWS: tl.constexpr = q[4].shape[0]
    BYTES: tl.constexpr = values[1].dtype.element_ty == tl.uint8
    WIDTH: tl.constexpr = VALUES[BITS]
    last = tl.maximum(high - TILE, 0)
    top = tl.full((ROWS,), NOTHING, tl.float32)
    total = tl.zeros((ROWS, 4), tl.float32)
    from_zeros = tl.zeros((ROWS, 4), tl.float32)
    acc = tl.zeros((VALUES[CHANNELS], ROWS), tl.float32)
    unit = tl.full((1,), 2.0**-100, tl.float32)  # of values' scales: a power of two above all so far
    plane = tl.arange(0, TILE) // 16 % (8 // WIDTH)
    factor = tl.exp2((-WIDTH * plane).to(tl.float32))
    next_keys = interior_scales(keys, tl.minimum(low, last), VALUES[CHANNELS], KEYS)
    next_s, next_z = value_scales(values, tl.minimum(low, last), TILE, VALUES)
    next_norms = token_norms(keys, tl.minimum(low, last), TILE, KEYS)
    next_seen = interior_mask(mask_rows, tl.minimum(low, last), TILE, LOGITS[MASK])
    for t0 in tl.range(low, high, TILE):
        for_keys, s, z, norms, seen = next_keys, next_s, next_z, next_norms, next_seen
        t1 = tl.minimum(t0 + TILE, last)
        next_keys = interior_scales(keys, t1, VALUES[CHANNELS], KEYS)
        next_s, next_z = value_scales(values, t1, TILE, VALUES)
        next_norms = token_norms(keys, t1, TILE, KEYS)
        next_seen = interior_mask(mask_rows, t1, TILE, LOGITS[MASK])
        r, of_row, offset = interior_logits(q, keys, for_keys, t0, TILE, WIDTH, LOGITS[SM_SCALE], BYTES, KEYS)
        if KEYS[NORMS] or LOGITS[SOFTCAP] != 0.0:
            r = r * of_row[:, None] + offset[:, None]
            if KEYS[NORMS]:
                r = r * to_columns(decode_scale(norms), WIDTH)[None, :]
            if LOGITS[SOFTCAP] != 0.0:
                capped: tl.constexpr = LOGITS[SOFTCAP] * LOG2_E
                r = capped * tanh(r * (1.0 / capped))
            of_row, offset = tl.full((ROWS,), 1.0, tl.float32), tl.zeros((ROWS,), tl.float32)
        if LOGITS[MASK] == "bool":
            r = tl.where(in_columns(seen, WIDTH).to(tl.int1), r, float("-inf"))
        new_top = tl.maximum(top, tl.max(r, 1) * of_row + offset)
        p = exp2(r * of_row[:, None] + (offset + LARGEST_LOG2 - new_top)[:, None], ASM)
        alpha = exp2(top - new_top, ASM)
        top = new_top
        s = to_columns(scale_in_units(s), WIDTH)
        new_unit = tl.maximum(unit, power_above(tl.max(tl.abs(s), 0)))
        ps = p.to(tl.float16) * (s * (factor * inverse_power(new_unit))).to(tl.float16)[None, :]
        z = s if VALUES[ROTATION] != -1 else to_columns(z.to(tl.float32), WIDTH)
        total = total * alpha[:, None] + quad_sums(p)
        from_zeros = from_zeros * alpha[:, None] + quad_sums(p * z[None, :])
        back = alpha * (unit * inverse_power(new_unit))
        unit = new_unit
        words = tl.trans(value_words(values[0], t0, TILE, VALUES))
        acc = tl.dot(fragment(words, WIDTH, TILE * WIDTH // 32, False), right_operand(ps), acc=acc * back[None, :])
    scale_unit: tl.constexpr = UNIT_OF_SCALES if BYTES else 1.0
    down: tl.constexpr = 1.0 / LARGEST
    # Values about zero have zero point -n / 2 times their scale.
    middle: tl.constexpr = -0.5 * ((1 << WIDTH) - 1) * scale_unit if VALUES[ROTATION] != -1 else 1.0
    acc = acc * (unit * (SUBNORMAL * scale_unit * down))[:, None] + (tl.sum(from_zeros, 1) * (middle * down))[None, :]
    total = tl.sum(total, 1) * down
    return tl.where(total == 0, float("-inf"), top * LN_2), total, acc


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
    MAX_LEN: tl.constexpr,
    K_DIM: tl.constexpr,
    K_BITS: tl.constexpr,
    K_WORDS: tl.constexpr,
    K_GROUP: tl.constexpr,
    K_TOKENS: tl.constexpr,
    K_GROUPS: tl.constexpr,
    V_DIM: tl.constexpr,
    V_BITS: tl.constexpr,
    V_GROUP: tl.constexpr,
    V_TOKENS: tl.constexpr,
    V_STRIDE: tl.constexpr,
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
    FOURS: tl.constexpr = RANKS_4 if RANKED else K_DIM
    TWOS: tl.constexpr = RANKS_6 + RANKS_2 - RANKS_4 if RANKED else K_DIM
    ONES: tl.constexpr = RANKS_7 + RANKS_5 - RANKS_6 + RANKS_3 - RANKS_4 + RANKS_1 - RANKS_2 if RANKED else K_DIM
    TWOS_AT: tl.constexpr = (FOURS * 4 + 31) // 32 if RANKED else 0
    ONES_AT: tl.constexpr = TWOS_AT + (TWOS * 2 + 31) // 32 if RANKED else 0
    PLANES: tl.constexpr = (
        (FOURS, 4, FOUR_WORDS, 0), (TWOS, 2, TWO_WORDS, TWOS_AT), (ONES, 1, ONE_WORDS, ONES_AT),
    )  # fmt: skip
    # In the order of the fields in triton_unpack.py and triton_softmax.py.
    KEYS: tl.constexpr = (
        K_DIM, K_CHANNELS, K_BITS, 4, K_TOKENS, K_GROUP, K_DIM, True, True, "fp16", RANKED, PLANES, COUNTS, 0,
        k_norm is not None,
    )  # fmt: skip
    VALUES: tl.constexpr = (
        V_DIM, V_CHANNELS, V_BITS, 4, V_TOKENS, V_GROUP, V_STRIDE, True, True, "fp16", ROTATION,
    )  # fmt: skip
    LOGITS: tl.constexpr = (SCALE, SOFTCAP, WINDOW, MASK_KIND, SINK_TOKENS)
    split = tl.program_id(0)
    kv_head, batch = tl.program_id(1) // INTERIOR_BLOCKS, tl.program_id(2)
    head = (batch * KV_HEADS + kv_head).to(tl.int64)
    keys = codes_of(head, k_codes, k_scale, k_zero, K_WORDS * K_TOKENS, K_GROUPS * K_DIM)
    values = codes_of(head, v_codes, v_scale, v_zero, V_TOKENS * V_BITS // 32 * V_DIM, V_DIM // V_GROUP * V_STRIDE)
    keys = keys[0], keys[1], keys[2], norms_of(batch, k_norm, k_codes, KEYS)
    past_tokens = tl.load(past).to(tl.int32)
    first_sink = tl.load(start + batch).to(tl.int32) if SINK_TOKENS > 0 else 0
    _first, k_limit, v_limit = limits_of(past_tokens, K_RESIDUAL, V_RESIDUAL, WINDOW, KEYS)
    limit = tl.minimum(k_limit, v_limit)
    low, high = interior_of(past_tokens, limit, first_sink, QUERY, WINDOW, SINK_TOKENS, INTERIOR_TILE)
    tile_range = range_of_split(split, low, high, INTERIOR_SPLITS, INTERIOR_TILE)

    # Row r is query token r % QUERY of query head r // QUERY of this KV head.
    rows = tl.program_id(1) % INTERIOR_BLOCKS * INTERIOR_ROWS + tl.arange(0, INTERIOR_ROWS)
    valid_rows = rows < HEADS_PER_KV * QUERY
    MASK_SHAPE: tl.constexpr = (MASK_BATCH, MASK_HEADS, MASK_QUERY, MAX_LEN)
    mask_rows = mask_rows_of(mask, rows, valid_rows, batch, kv_head, HEADS_PER_KV, QUERY, MASK_KIND, MASK_SHAPE)
    padded = tl.arange(0, PADDED_ROWS)
    padded_rows = tl.program_id(1) % INTERIOR_BLOCKS * INTERIOR_ROWS + padded
    valid_padded = (padded < INTERIOR_ROWS) & (padded_rows < HEADS_PER_KV * QUERY)
    query_rows = head * (HEADS_PER_KV * QUERY)
    order, center = k_order, k_center
    if RANKED:
        order, center = k_order + head * K_DIM, k_center + head * K_DIM
    x = interior_query(q, query_rows + padded_rows, valid_padded, order, center, INTERIOR_ROWS, K_CHANNELS, KEYS)
    sums = attend_interior(x, keys, values, mask_rows, tile_range, KEYS, VALUES, LOGITS, INTERIOR_TILE, ASM)
    if ROTATION >= 0:
        sums = sums[0], sums[1], rotate_back(sums[2], ROTATION)
    store_part(part, stats, (query_rows + rows) * PARTS + split, valid_rows, sums, V_DIM)
