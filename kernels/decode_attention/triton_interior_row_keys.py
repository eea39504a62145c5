"""Keys for ``triton_interior_rows.py``: queries as the left operand of 16 rows, times the scales of a group of tokens.

Scales are float16, or of ranked keys also bytes. Those have mid points, which count once a rank, in the plane of its
highest field; ranks of no bits have no field, and a product of their own.

Queries stay in registers as operands, each plane in the order of places. What Triton needs for that: the product with
zero points comes first and takes the same queries, and what it multiplies them by went through ``tl.join``, so that
both products want the same order (``triton_fragments.py``). Then scales are brought to the operand, not the product
of both to shared memory.
"""

from __future__ import annotations

import triton
import triton.language as tl

from xquant_fx.kernels.decode_attention.triton_fragments import (
    field_at,
    fragment,
    inverse_power,
    operand_of_pairs,
    power_above,
    times,
    times_pairs,
    twice,
    twice_power,
    words_in_order,
)
from xquant_fx.kernels.decode_attention.triton_interior_keys import (
    LEAST_FACTOR,
    LEAST_SCALES,
    LEAST_UNIT,
    LOG2_E,
    SCALED,
    place_weights,
    plane_words,
    quad_order,
)
from xquant_fx.kernels.decode_attention.triton_interior_row_scales import most_of_scales, pairs_of_run, plane_pairs
from xquant_fx.kernels.decode_attention.triton_interior_scales import WIDTH, WORDS
from xquant_fx.kernels.decode_attention.triton_products import SUBNORMAL
from xquant_fx.kernels.decode_attention.triton_unpack import COUNTS, DIM, LOWER, PLANES, RANKED
from xquant_fx.kernels.triton_small_floats import UNIT_OF_MIDS, UNIT_OF_SCALES

# Columns of a product at least.
LEAST_COLUMNS = tl.constexpr(8)


@triton.jit
def rows_of_plane(q, order, unit, rows, valid_rows, PLANE: tl.constexpr, KEYS: tl.constexpr):
    """Query rows [ROWS, places] in ``unit`` for the codes of a plane, float16."""
    if PLANE[WORDS] == 0:
        return tl.zeros((1, 1), tl.float16)
    else:
        channel, weight = place_weights(tl.arange(0, PLANE[WORDS] * (32 // PLANE[WIDTH])), PLANE, KEYS)
        return rows_of_channels(q, order, unit, rows, valid_rows, channel, weight != 0, KEYS)


@triton.jit
def rows_of_channels(q, order, unit, rows, valid_rows, channel, in_bounds, KEYS: tl.constexpr):
    """Query rows in ``unit``, float16, of some channels, or of some ranks; 0 where not ``in_bounds``."""
    if KEYS[RANKED]:
        channel = tl.load(order + channel)
    mask = valid_rows[:, None] & in_bounds[None, :]
    x = tl.load(q + rows[:, None] * KEYS[DIM] + channel[None, :], mask=mask, other=0.0)
    return (x.to(tl.float32) * inverse_power(unit)[:, None]).to(tl.float16)


@triton.jit
def rows_query(q, rows, valid_rows, order, center, CHANNELS_TILE: tl.constexpr, KEYS: tl.constexpr):  # fmt: skip
    """Query rows for whole groups: those of each plane and of ranks without bits, their unit, times centers."""
    channel = tl.arange(0, CHANNELS_TILE)
    in_bounds = channel < KEYS[DIM]
    mask = in_bounds[None, :] & valid_rows[:, None]
    x = tl.load(q + rows[:, None] * KEYS[DIM] + channel[None, :], mask=mask, other=0.0).to(tl.float32)
    unit = power_above(tl.maximum(tl.max(tl.abs(x), 1), LEAST_UNIT)) * 0.5
    four = rows_of_plane(q, order, unit, rows, valid_rows, KEYS[PLANES][0], KEYS)
    two = rows_of_plane(q, order, unit, rows, valid_rows, KEYS[PLANES][1], KEYS)
    one = rows_of_plane(q, order, unit, rows, valid_rows, KEYS[PLANES][2], KEYS)
    none, from_center = tl.zeros((1, 1), tl.float16), tl.zeros(unit.shape, tl.float32)
    if KEYS[RANKED]:
        channel = tl.load(order + channel, mask=in_bounds, other=0)
        x = tl.load(q + rows[:, None] * KEYS[DIM] + channel[None, :], mask=mask, other=0.0).to(tl.float32)
        of_rank = tl.load(center + tl.arange(0, CHANNELS_TILE), mask=in_bounds, other=0.0)
        from_center = tl.sum(x * of_rank[None, :], 1)
        NONE: tl.constexpr = KEYS[DIM] - KEYS[COUNTS][0]
        if NONE > 0:
            rank = KEYS[COUNTS][0] + quad_order(16 if NONE <= 16 else 32 if NONE <= 32 else 64)
            in_use = rank < KEYS[DIM]
            none = rows_of_channels(q, order, unit, rows, valid_rows, tl.where(in_use, rank, 0), in_use, KEYS)
    return four, two, one, none, unit, from_center


@triton.jit
def operand_of_columns(pairs):
    """float16 [2 * M, LEAST_COLUMNS] of both halves of int32 ``pairs`` [M]: the right operand of a product."""
    x = operand_of_pairs(pairs[None, :])
    return tl.trans(tl.broadcast_to(x, (LEAST_COLUMNS, x.shape[1])))


@triton.jit
def operand_of_both(first, second):
    """The same with ``first`` in one half of the columns and ``second`` in the other."""
    x = operand_of_pairs(tl.trans(tl.join(first, second)))
    x = tl.broadcast_to(x[:, None, :], (2, LEAST_COLUMNS // 2, x.shape[1]))
    return tl.trans(tl.reshape(x, (LEAST_COLUMNS, x.shape[2])))


@triton.jit
def times_mids(s, z, BYTES: tl.constexpr, ASM: tl.constexpr):
    """Scales ``s`` times mid points ``z``, both pairs, in UNIT_OF_MIDS."""
    if not BYTES:  # those, too, are brought to where a scale times them is a float16
        z = times_pairs(z, twice(tl.full((1,), 1.0 / UNIT_OF_MIDS, tl.float16)), ASM)
    return times_pairs(s, z, ASM)


@triton.jit
def offset_of_plane(offset, q, s, z, factor, BYTES: tl.constexpr, PLANE: tl.constexpr, KEYS: tl.constexpr,
                    ASM: tl.constexpr):  # fmt: skip
    """``offset`` [ROWS, columns] with the products of a plane's queries and zero points; of ranked keys half of the
    columns have those with scaled mid points, the other half those with half of the largest codes."""
    if PLANE[WORDS] == 0:
        return offset
    elif not KEYS[RANKED]:
        return tl.dot(q, operand_of_columns(plane_pairs(z, BYTES, True, PLANE)), acc=offset)
    else:
        place = tl.arange(0, PLANE[WORDS] * (32 // PLANE[WIDTH]) // 2) * 2
        s = times_pairs(plane_pairs(s, BYTES, False, PLANE), factor, ASM)
        mids = times_mids(s, plane_pairs(z, BYTES, True, PLANE), BYTES, ASM)
        # Fields of ranks that have one in a wider plane.
        WIDER: tl.constexpr = (
            0 if PLANE[WIDTH] == 4 else KEYS[COUNTS][5] if PLANE[WIDTH] == 2
            else KEYS[COUNTS][6] + KEYS[COUNTS][4] - KEYS[COUNTS][5] + KEYS[COUNTS][2] - KEYS[COUNTS][3]
        )  # fmt: skip
        field, plane = field_at(place, PLANE[WIDTH], PLANE[WORDS])
        if WIDER > 0:
            second, _plane = field_at(place + 1, PLANE[WIDTH], PLANE[WORDS])
            mids &= tl.where(field < WIDER, 0, 0xFFFF) | tl.where(second < WIDER, 0, -65536)
        _rank, weight = place_weights(place, PLANE, KEYS)
        most: tl.constexpr = ((1 << PLANE[WIDTH]) - 1) * (-0.5 / UNIT_OF_MIDS)
        weight = weight * tl.exp2((PLANE[WIDTH] * plane).to(tl.float32)) * most
        return tl.dot(q, operand_of_both(mids, times_pairs(s, twice(weight.to(tl.float16)), ASM)), acc=offset)


@triton.jit
def offset_of_none(offset, q, s, z, factor, BYTES: tl.constexpr, KEYS: tl.constexpr, ASM: tl.constexpr):
    """``offset`` with the mid points of ranks of no bits."""
    if not KEYS[RANKED] or KEYS[COUNTS][0] == KEYS[DIM]:
        return offset
    else:
        s = times_pairs(pairs_of_run(s, 4, BYTES, False), factor, ASM)
        z = times_mids(s, pairs_of_run(z, 4, BYTES, True), BYTES, ASM)
        return tl.dot(q, operand_of_both(z, z & 0), acc=offset)


@triton.jit
def scaled_plane(q, s, factor, BYTES: tl.constexpr, PLANE: tl.constexpr, KEYS: tl.constexpr, ASM: tl.constexpr):
    """A plane's queries times scales."""
    if PLANE[WORDS] == 0:
        return q
    else:
        place = tl.arange(0, PLANE[WORDS] * (32 // PLANE[WIDTH]) // 2) * 2
        _channel, weight = place_weights(place, PLANE, KEYS)  # neighbours weigh the same
        if KEYS[LOWER] > 0:  # no weight above 1, by which a factor could be no float16
            weight *= 1.0 / (1 << KEYS[LOWER])
        weight, s = twice(weight.to(tl.float16)), plane_pairs(s, BYTES, False, PLANE)
        if KEYS[RANKED]:  # the factor first, for the same reason: weights are 8 at most
            s = times_pairs(times_pairs(s, factor, ASM), weight, ASM)
        else:
            s = times_pairs(s, times_pairs(weight, factor, ASM), ASM)
        return times(q, s, ASM)


@triton.jit
def add_codes(sums, qs, codes, t0, V_BITS: tl.constexpr, PLANE: tl.constexpr, KEYS: tl.constexpr):
    """``sums`` [ROWS, tokens] with the products of a plane's codes from ``t0`` on."""
    if PLANE[WORDS] == 0:
        return sums
    else:
        words = words_in_order(plane_words(codes, t0, sums.shape[1], PLANE, KEYS), PLANE[WORDS], V_BITS, True)
        return tl.dot(qs, tl.trans(fragment(words, PLANE[WIDTH], PLANE[WORDS])), acc=sums)


@triton.jit
def row_logits(q, codes, scales, t0, TILE: tl.constexpr, V_BITS: tl.constexpr, SM_SCALE: tl.constexpr,
               BYTES: tl.constexpr, KEYS: tl.constexpr, ASM: tl.constexpr):  # fmt: skip
    """(r [ROWS, TILE], factor [ROWS], offset [ROWS]): logits, times log2(e), are r * factor + offset.

    Tokens are in the order of columns (``numbers_in_order``).
    """
    q_four, q_two, q_one, q_none, q_unit, from_center = q
    four, two, one, none, words = scales
    unit = tl.maximum(power_above(most_of_scales(words, BYTES)) * 0.5, LEAST_SCALES)
    factor = twice_power(inverse_power(unit) * SCALED)
    offset = tl.zeros((q_unit.shape[0], LEAST_COLUMNS), tl.float32)
    offset = offset_of_plane(offset, q_four, four[0], four[1], factor, BYTES, KEYS[PLANES][0], KEYS, ASM)
    offset = offset_of_plane(offset, q_two, two[0], two[1], factor, BYTES, KEYS[PLANES][1], KEYS, ASM)
    offset = offset_of_plane(offset, q_one, one[0], one[1], factor, BYTES, KEYS[PLANES][2], KEYS, ASM)
    offset = offset_of_none(offset, q_none, none[0], none[1], factor, BYTES, KEYS, ASM)
    # Which is done first is a question of registers: of several planes one is scaled at a time, just before its codes.
    FIRST: tl.constexpr = not KEYS[RANKED] and KEYS[LOWER] == 0
    if FIRST:
        q_four = scaled_plane(q_four, four[0], factor, BYTES, KEYS[PLANES][0], KEYS, ASM)
        q_two = scaled_plane(q_two, two[0], factor, BYTES, KEYS[PLANES][1], KEYS, ASM)
        q_one = scaled_plane(q_one, one[0], factor, BYTES, KEYS[PLANES][2], KEYS, ASM)
    q_unit = q_unit * (SM_SCALE * LOG2_E)
    scale_unit: tl.constexpr = UNIT_OF_SCALES if BYTES else 1.0
    of_scale = unit * (scale_unit / SCALED)
    if KEYS[RANKED]:
        offset = tl.sum(offset, 1) * (q_unit * of_scale * (UNIT_OF_MIDS * 2.0 / LEAST_COLUMNS))
        offset += from_center * (SM_SCALE * LOG2_E)
    else:
        # All columns are the same; with fields in two planes every channel was counted twice.
        offset = tl.max(offset, 1) * (q_unit * (0.5 if KEYS[LOWER] > 0 else 1.0))
    r = tl.zeros((q_unit.shape[0], TILE), tl.float32)
    if not FIRST:
        q_four = scaled_plane(q_four, four[0], factor, BYTES, KEYS[PLANES][0], KEYS, ASM)
    r = add_codes(r, q_four, codes, t0, V_BITS, KEYS[PLANES][0], KEYS)
    if not FIRST:
        q_two = scaled_plane(q_two, two[0], factor, BYTES, KEYS[PLANES][1], KEYS, ASM)
    r = add_codes(r, q_two, codes, t0, V_BITS, KEYS[PLANES][1], KEYS)
    if not FIRST:
        q_one = scaled_plane(q_one, one[0], factor, BYTES, KEYS[PLANES][2], KEYS, ASM)
    r = add_codes(r, q_one, codes, t0, V_BITS, KEYS[PLANES][2], KEYS)
    # No 0, which would make NaN of the logits of what is masked.
    return r, tl.maximum(q_unit * (of_scale * (SUBNORMAL * (1 << KEYS[LOWER]))), LEAST_FACTOR), offset
