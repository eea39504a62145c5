"""Logits of ranked keys: codes of mixed widths in planes, channels in the order of their ranks.

With f over the fields of a key and r over its ranks, each field of a rank that has shift bits below it in the code,

    sum_r q_r (s_r (c_r - n_r / 2 + mid_r) + center_r)
        = sum_f (q_f s_f 2**shift_f) field_f + sum_r q_r s_r (mid_r - n_r / 2) + sum_r q_r center_r

so that the fields of a plane are one product with a query that is gathered once, in the order in which the plane's
fields are unpacked. The last sum is known before any key is read. All of it is multiplied by the token's norm, where
there are norms. A tile lies in one group of tokens.
"""

from __future__ import annotations

import triton
import triton.language as tl

from xquant_fx.kernels.decode_attention.triton_products import SUBNORMAL, add_product, rounded
from xquant_fx.kernels.decode_attention.triton_unpack import (
    BITCAST,
    BITS,
    CHANNELS,
    COUNTS,
    DIM,
    GROUP,
    MODEL,
    NORMS,
    PLANES,
    STRIDE,
    TOKENS,
    code_slot,
    unpack,
    word_order,
)
from xquant_fx.kernels.triton_small_floats import (
    UNIT_OF_SCALES,
    decode_mid,
    decode_scale,
    largest_exponent,
    scale_in_units,
)
from xquant_fx.kernels.triton_widths import rank_of_field, width_of_rank

# A query below 2, a scale below 2 * 2**S_EXPONENT and the weight of a field, 8 at most, multiply to a float16.
S_EXPONENT = tl.constexpr(10)
# The unit of queries of zeros.
LEAST_UNIT = tl.constexpr(2.0**-100)


@triton.jit
def plane_fields(PLANE: tl.constexpr, KEYS: tl.constexpr):
    """(rank, weight) of a plane's fields, as they are unpacked: what a field's unit stands for, 0 for padding."""
    place, factor = word_order(PLANE[CHANNELS], PLANE)
    in_plane = place < PLANE[DIM]
    rank = tl.where(in_plane, rank_of_field(place, PLANE[BITS], KEYS[COUNTS]), 0)
    shift = width_of_rank(rank, KEYS[COUNTS]) & (PLANE[BITS] - 1)
    return rank, tl.where(in_plane, factor * tl.exp2(shift.to(tl.float32)), 0.0)


@triton.jit
def plane_query(q, order, unit, rows, valid_rows, PLANE: tl.constexpr, KEYS: tl.constexpr):
    """Query rows [fields, ROWS] in ``unit`` for the codes of a plane; nothing of use for a plane without words."""
    if PLANE[CHANNELS] == 0:
        return tl.zeros((1, 1), tl.float32)
    else:
        rank, _weight = plane_fields(PLANE, KEYS)
        channel = tl.load(order + rank)
        x = tl.load(q + rows[None, :] * KEYS[DIM] + channel[:, None], mask=valid_rows[None, :], other=0.0)
        return rounded(x.to(tl.float32) / unit[None, :], "fp32" if KEYS[MODEL] == "fp32" else "fp16")


@triton.jit
def query_unit(x, KEYS: tl.constexpr):
    """The unit [ROWS] of float16 queries of planes: a power of two above half of the largest number."""
    if KEYS[MODEL] == "fp32":
        return tl.full((x.shape[1],), 1.0, tl.float32)
    else:
        largest = tl.max(tl.abs(x.to(tl.float32)), 0)
        exponent = tl.maximum(largest, LEAST_UNIT).to(tl.int32, bitcast=True) & 0x7F800000
        return exponent.to(tl.float32, bitcast=True)


@triton.jit
def ranked_query(q, rows, valid_rows, order, center, KEYS: tl.constexpr):
    """Query rows for ranked keys: by rank [ranks, ROWS], those of each plane, their unit, times centers [ROWS]."""
    rank = tl.arange(0, KEYS[CHANNELS])
    in_bounds = rank < KEYS[DIM]
    channel = tl.load(order + rank, mask=in_bounds, other=0)
    offsets = rows[None, :] * KEYS[DIM] + channel[:, None]
    x = tl.load(q + offsets, mask=in_bounds[:, None] & valid_rows[None, :], other=0.0)
    unit = query_unit(x, KEYS)
    from_center = tl.sum(x.to(tl.float32) * tl.load(center + rank, mask=in_bounds, other=0.0)[:, None], 0)
    four = plane_query(q, order, unit, rows, valid_rows, KEYS[PLANES][0], KEYS)
    two = plane_query(q, order, unit, rows, valid_rows, KEYS[PLANES][1], KEYS)
    one = plane_query(q, order, unit, rows, valid_rows, KEYS[PLANES][2], KEYS)
    return x, four, two, one, unit, from_center


@triton.jit
def plane_words(codes, tokens, FIRST: tl.constexpr, PLANE: tl.constexpr):
    """Words of a plane [tokens, words], of which FIRST lie before it; in bounds, since tiles divide the storage."""
    if PLANE[CHANNELS] == 0:
        return tl.zeros((1, 1), tl.int32)
    else:
        w = tl.arange(0, PLANE[CHANNELS] * PLANE[BITS] // 32)
        in_plane = (w < (PLANE[DIM] * PLANE[BITS] + 31) // 32)[None, :]
        return tl.load(codes + (FIRST + w)[None, :] * PLANE[TOKENS] + tokens[:, None], mask=in_plane, other=0)


@triton.jit
def ranked_words(codes, t0, KEYS: tl.constexpr, TILE: tl.constexpr):
    """Words of a tile of keys, plane by plane."""
    tokens = t0 + tl.arange(0, TILE)
    twos: tl.constexpr = (KEYS[PLANES][0][DIM] * 4 + 31) // 32
    ones: tl.constexpr = twos + (KEYS[PLANES][1][DIM] * 2 + 31) // 32
    four = plane_words(codes, tokens, 0, KEYS[PLANES][0])
    two = plane_words(codes, tokens, twos, KEYS[PLANES][1])
    return four, two, plane_words(codes, tokens, ones, KEYS[PLANES][2])


@triton.jit
def plane_scales(scale, in_use, PLANE: tl.constexpr, KEYS: tl.constexpr):
    """The scale of each field of a plane, in the order of its query."""
    if PLANE[CHANNELS] == 0:
        return tl.zeros((1,), scale.dtype.element_ty)
    else:
        rank, _weight = plane_fields(PLANE, KEYS)
        return tl.load(scale + rank, mask=in_use, other=0)


@triton.jit
def ranked_scales(scale, zero, norm, t0, limit, KEYS: tl.constexpr, TILE: tl.constexpr):
    """(scales, mid points) by rank, scales by field, norms [TILE] as stored; zeros from ``limit`` on."""
    slot = code_slot(t0, KEYS)
    at = slot // KEYS[GROUP] * KEYS[STRIDE]
    in_use = t0 + tl.arange(0, 1) < limit
    rank = tl.arange(0, KEYS[CHANNELS])
    in_bounds = (rank < KEYS[DIM]) & in_use
    s = tl.load(scale + at + rank, mask=in_bounds, other=0)
    mid = tl.load(zero + at + rank, mask=in_bounds, other=0)
    four = plane_scales(scale + at, in_use, KEYS[PLANES][0], KEYS)
    two = plane_scales(scale + at, in_use, KEYS[PLANES][1], KEYS)
    one = plane_scales(scale + at, in_use, KEYS[PLANES][2], KEYS)
    none: tl.constexpr = not KEYS[NORMS]
    norms = tl.zeros((1,), tl.uint8) if none else tl.load(norm + slot + tl.arange(0, TILE), mask=in_use, other=0)
    return s, mid, four, two, one, norms


@triton.jit
def plane_logits(sums, words, q, s, factor, PLANE: tl.constexpr, KEYS: tl.constexpr):
    """``sums`` [tokens, ROWS] and the products of the codes of a plane with its query, scaled, times ``factor``."""
    if PLANE[CHANNELS] == 0:
        return sums
    else:
        _rank, weight = plane_fields(PLANE, KEYS)
        dtype: tl.constexpr = "fp32" if KEYS[MODEL] == "fp32" else "fp16"
        qs = q * rounded(scale_in_units(s) * (weight * factor), dtype)[:, None]
        return add_product(sums, unpack(words, PLANE), qs, dtype)


@triton.jit
def ranked_logits(q, words, scales, TILE: tl.constexpr, SM_SCALE: tl.constexpr, KEYS: tl.constexpr):
    """Scaled logits [TILE, ROWS] of a tile of ranked keys."""
    x, q_four, q_two, q_one, q_unit, from_center = q
    four, two, one = words
    s, mid, s_four, s_two, s_one, norms = scales
    n = (1 << width_of_rank(tl.arange(0, KEYS[CHANNELS]), KEYS[COUNTS])) - 1
    offset = decode_scale(s) * (decode_mid(mid) - 0.5 * n.to(tl.float32))
    constant = from_center + tl.sum(x.to(tl.float32) * offset[:, None], 0)
    # Scales are brought to the largest one's power of two, times S_UNIT.
    exponent = largest_exponent(s)
    factor = ((-exponent + (127 + 15 + S_EXPONENT)) << 23).to(tl.float32, bitcast=True)
    undo = ((exponent + (127 - 15 - S_EXPONENT)) << 23).to(tl.float32, bitcast=True)
    sums = tl.zeros((TILE, x.shape[1]), tl.float32)
    sums = plane_logits(sums, four, q_four, s_four, factor, KEYS[PLANES][0], KEYS)
    sums = plane_logits(sums, two, q_two, s_two, factor, KEYS[PLANES][1], KEYS)
    sums = plane_logits(sums, one, q_one, s_one, factor, KEYS[PLANES][2], KEYS)
    unit: tl.constexpr = SUBNORMAL if KEYS[BITCAST] else 1.0
    scale_unit: tl.constexpr = UNIT_OF_SCALES if s.dtype == tl.uint8 else 1.0
    logits = sums * (q_unit * (undo * (scale_unit * unit * SM_SCALE)))[None, :] + (constant * SM_SCALE)[None, :]
    return logits * decode_scale(norms)[:, None] if KEYS[NORMS] else logits
