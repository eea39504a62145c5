"""Logits of whole groups of keys, [tokens, rows], codes as the left operand (``triton_fragments.py``).

The sums are those of ``triton_codes.py`` and ``triton_ranked.py``: scales go to the query, mid points or zero points to
one number a row. Queries are float16 in a unit of their own for each row, scales in one for each group. Levels of
ranked keys are about their mean: half of the largest codes, times the query, is taken off by a product with a constant.
"""

from __future__ import annotations

import triton
import triton.language as tl

from xquant_fx.kernels.decode_attention.triton_fragments import (
    field_at,
    fragment,
    inverse_power,
    power_above,
    words_in_order,
)
from xquant_fx.kernels.decode_attention.triton_interior_scales import FIELDS, FIRST, WIDTH, WORDS, halves_of_run
from xquant_fx.kernels.decode_attention.triton_products import SUBNORMAL
from xquant_fx.kernels.decode_attention.triton_unpack import BITS, COUNTS, DIM, PLANES, RANKED, TOKENS, code_slot
from xquant_fx.kernels.triton_small_floats import UNIT_OF_MIDS, UNIT_OF_SCALES
from xquant_fx.kernels.triton_widths import rank_of_field, width_of_rank

# Rows of the left operand of a product at least.
LEAST_ROWS = tl.constexpr(16)
# Queries below 2, scales below 2 * SCALED and the weight of a field, 8 at most, multiply to a float16.
SCALED = tl.constexpr(2.0**10)
# Scales are brought up from no less than that: SCALED times its inverse is a float16, and a group of zeros gives zeros.
LEAST_SCALES = tl.constexpr(2.0**-5)
LEAST_UNIT = tl.constexpr(2.0**-100)
LEAST_FACTOR = tl.constexpr(2.0**-120)
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def place_weights(place, PLANE: tl.constexpr, KEYS: tl.constexpr):
    """(rank or channel, weight) of each ``place`` of a plane; weight 0 for padding."""
    field, plane = field_at(place, PLANE[WIDTH], PLANE[WORDS])
    weight = tl.exp2((-PLANE[WIDTH] * plane).to(tl.float32))
    in_plane = field < PLANE[FIELDS]
    field = tl.where(in_plane, field, 0)
    if KEYS[RANKED]:
        field = rank_of_field(field, PLANE[WIDTH], KEYS[COUNTS])
        shift = width_of_rank(field, KEYS[COUNTS]) & (PLANE[WIDTH] - 1)
        weight = weight * tl.exp2(shift.to(tl.float32))
    else:
        weight = weight * (1 << (KEYS[BITS] & (PLANE[WIDTH] - 1)))
    return field, tl.where(in_plane, weight, 0.0)


@triton.jit
def every_eighth(q, order, unit, rows, valid_rows, FROM: tl.constexpr, PLANE: tl.constexpr, KEYS: tl.constexpr):
    """Query rows of the places FROM, FROM + 8, ... of a plane."""
    place = tl.arange(0, PLANE[WORDS] * 4 // PLANE[WIDTH]) * 8 + FROM
    channel, weight = place_weights(place, PLANE, KEYS)
    if KEYS[RANKED]:
        channel = tl.load(order + channel)
    x = tl.load(q + rows[:, None] * KEYS[DIM] + channel[None, :], mask=valid_rows[:, None], other=0.0)
    return (x.to(tl.float32) * (inverse_power(unit)[:, None] * weight[None, :])).to(tl.float16)


@triton.jit
def every_fourth(q, order, unit, rows, valid_rows, FROM: tl.constexpr, PLANE: tl.constexpr, KEYS: tl.constexpr):
    """Those of places FROM, FROM + 4, ..., two neighbours in the last dimension."""
    return tl.join(
        every_eighth(q, order, unit, rows, valid_rows, FROM, PLANE, KEYS),
        every_eighth(q, order, unit, rows, valid_rows, FROM + 4, PLANE, KEYS),
    )


@triton.jit
def plane_query(q, order, unit, rows, valid_rows, PLANE: tl.constexpr, KEYS: tl.constexpr):
    """Query rows [ROWS, places] in ``unit`` for the codes of a plane, float16.

    Joined of eight parts, so that a thread has eight neighbours: they go to shared memory, times scales, each tile.
    """
    if PLANE[WORDS] == 0:
        return tl.zeros((1, 1), tl.float16)
    else:
        zero = every_fourth(q, order, unit, rows, valid_rows, 0, PLANE, KEYS)
        two = every_fourth(q, order, unit, rows, valid_rows, 2, PLANE, KEYS)
        one = every_fourth(q, order, unit, rows, valid_rows, 1, PLANE, KEYS)
        three = every_fourth(q, order, unit, rows, valid_rows, 3, PLANE, KEYS)
        x = tl.join(tl.join(zero, two), tl.join(one, three))
        return tl.reshape(x, (rows.shape[0], PLANE[WORDS] * (32 // PLANE[WIDTH])))


@triton.jit
def quad_order(COUNT: tl.constexpr):
    """Elements 0, 2, 1, 3 of each four, as scales come out of their words."""
    i = tl.arange(0, COUNT)
    return i // 4 * 4 + i % 2 * 2 + i // 2 % 2


@triton.jit
def interior_query(q, rows, valid_rows, order, center, CHANNELS_TILE: tl.constexpr,
                   KEYS: tl.constexpr):  # fmt: skip
    """Query rows for whole groups: by rank or channel, those of each plane, their unit, times centers."""
    rank = quad_order(CHANNELS_TILE)
    in_bounds = rank < KEYS[DIM]
    channel = tl.load(order + rank, mask=in_bounds, other=0) if KEYS[RANKED] else rank
    mask = in_bounds[None, :] & valid_rows[:, None]
    x = tl.load(q + rows[:, None] * KEYS[DIM] + channel[None, :], mask=mask, other=0.0).to(tl.float32)
    unit = power_above(tl.maximum(tl.max(tl.abs(x), 1), LEAST_UNIT)) * 0.5
    if KEYS[RANKED]:
        from_center = tl.sum(x * tl.load(center + rank, mask=in_bounds, other=0.0)[None, :], 1)
    else:
        from_center = tl.zeros((x.shape[0],), tl.float32)
    four = plane_query(q, order, unit, rows, valid_rows, KEYS[PLANES][0], KEYS)
    two = plane_query(q, order, unit, rows, valid_rows, KEYS[PLANES][1], KEYS)
    one = plane_query(q, order, unit, rows, valid_rows, KEYS[PLANES][2], KEYS)
    x = (x * inverse_power(unit)[:, None]).to(tl.float16)
    return x, four, two, one, unit, from_center


@triton.jit
def plane_words(codes, t0, TILE: tl.constexpr, PLANE: tl.constexpr, KEYS: tl.constexpr):
    """Words [words, TILE] of a plane, as they lie in memory; of 2 words the halves, of 1 the bytes."""
    parts: tl.constexpr = 4 // PLANE[WORDS] if PLANE[WORDS] < 4 else 1
    if parts == 2:
        codes = codes.to(tl.pointer_type(tl.uint16), bitcast=True)
    elif parts == 4:
        codes = codes.to(tl.pointer_type(tl.uint8), bitcast=True)
    w, tokens = tl.arange(0, PLANE[WORDS]), code_slot(t0, KEYS) * parts + tl.arange(0, TILE * parts)
    pointers = codes + (PLANE[FIRST] + w)[:, None] * (KEYS[TOKENS] * parts) + tokens[None, :]
    exact: tl.constexpr = (PLANE[FIELDS] * PLANE[WIDTH] + 31) // 32
    if exact == PLANE[WORDS]:
        return tl.load(pointers)
    else:
        return tl.load(pointers, mask=(w < exact)[:, None], other=0)


@triton.jit
def words_of_ones(ROWS: tl.constexpr, COUNT: tl.constexpr, WORDS: tl.constexpr):
    """COUNT words [ROWS, COUNT], or of WORDS < 4 all parts of them, in which every field is its largest."""
    if WORDS >= 4:
        return tl.full((ROWS, COUNT), -1, tl.int32)
    else:
        most: tl.constexpr = 0xFFFF if WORDS == 2 else 0xFF
        return tl.full((ROWS, COUNT * (4 // WORDS)), most, tl.uint16 if WORDS == 2 else tl.uint8)


@triton.jit
def add_plane(sums, levels, codes, t0, q, s, factor, V_BITS: tl.constexpr, BYTES: tl.constexpr,
              PLANE: tl.constexpr, KEYS: tl.constexpr):  # fmt: skip
    """``sums`` and ``levels`` with the products of a plane's codes, and of its largest codes."""
    if PLANE[WORDS] == 0:
        return sums, levels
    else:
        words = words_in_order(plane_words(codes, t0, sums.shape[0], PLANE, KEYS), PLANE[WORDS], V_BITS, False)
        run: tl.constexpr = 4 if PLANE[WORDS] >= 4 else PLANE[WORDS]
        qs = tl.trans(q * (halves_of_run(s, run, BYTES, False) * factor)[None, :])
        sums = tl.dot(fragment(words, PLANE[WIDTH], PLANE[WORDS]), qs, acc=sums)
        if KEYS[RANKED]:
            ones = words_of_ones(LEAST_ROWS, PLANE[WORDS], PLANE[WORDS])
            levels = tl.dot(fragment(ones, PLANE[WIDTH], PLANE[WORDS]), qs, acc=levels)
        return sums, levels


@triton.jit
def interior_logits(q, keys, scales, t0, TILE: tl.constexpr, V_BITS: tl.constexpr, SM_SCALE: tl.constexpr,
                    BYTES: tl.constexpr, KEYS: tl.constexpr):  # fmt: skip
    """(r [TILE, ROWS], factor [ROWS], offset [ROWS]): logits, times log2(e), are r * factor + offset.

    Tokens are in the order of places of values.
    """
    codes, _, _, _ = keys
    x, q_four, q_two, q_one, q_unit, from_center = q
    s, mid, s_four, s_two, s_one = scales
    s, mid = halves_of_run(s, 4, BYTES, False), halves_of_run(mid, 4, BYTES, True)
    unit = tl.maximum(power_above(tl.max(tl.abs(s), 0).to(tl.float32)) * 0.5, LEAST_SCALES)
    factor = (inverse_power(unit) * SCALED).to(tl.float16)
    sums = tl.zeros((TILE, x.shape[0]), tl.float32)
    levels = tl.zeros((LEAST_ROWS, x.shape[0]), tl.float32)
    # Parts of words that are bytes take a register each until their product: that comes first.
    FIRST_ONES: tl.constexpr = KEYS[PLANES][2][WORDS] == 1
    if FIRST_ONES:
        sums, levels = add_plane(sums, levels, codes, t0, q_one, s_one, factor, V_BITS, BYTES, KEYS[PLANES][2], KEYS)
    sums, levels = add_plane(sums, levels, codes, t0, q_four, s_four, factor, V_BITS, BYTES, KEYS[PLANES][0], KEYS)
    sums, levels = add_plane(sums, levels, codes, t0, q_two, s_two, factor, V_BITS, BYTES, KEYS[PLANES][1], KEYS)
    if not FIRST_ONES:
        sums, levels = add_plane(sums, levels, codes, t0, q_one, s_one, factor, V_BITS, BYTES, KEYS[PLANES][2], KEYS)
    if KEYS[RANKED]:
        scale_unit: tl.constexpr = UNIT_OF_SCALES if BYTES else 1.0
        of_scale = unit * (scale_unit / SCALED)
        # float16 mid points, too, are brought to where a scale times them is a float16.
        z = (s * factor) * (mid if BYTES else mid * tl.full((1,), 1.0 / UNIT_OF_MIDS, tl.float16))
    else:
        of_scale = unit * (1.0 / SCALED)
        z = mid
    offset = tl.dot(tl.broadcast_to(z[None, :], (LEAST_ROWS, z.shape[0])), tl.trans(x))
    if KEYS[RANKED]:
        offset = (of_scale * UNIT_OF_MIDS) * offset - (of_scale * (0.5 * SUBNORMAL)) * levels
    scaled: tl.constexpr = SM_SCALE * LOG2_E
    q_unit = q_unit * scaled
    offset = tl.max(offset, 0) * q_unit + from_center * scaled
    # No 0, which would make NaN of the logits of what is masked.
    return sums, tl.maximum(q_unit * (of_scale * SUBNORMAL), LEAST_FACTOR), offset
