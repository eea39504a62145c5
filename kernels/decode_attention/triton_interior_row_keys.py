"""Keys for ``triton_interior_rows.py``: queries as the left operand of 16 rows, times the scales of a group of tokens.

Channels are not ranked, and scales float16.

Queries stay in registers as operands, each plane in the order of places. What Triton needs for that: the product with
zero points comes first and takes the same queries, and what it multiplies them by went through ``tl.join``, so that
both products want the same order (``triton_fragments.py``). Then scales are brought to the operand, not the product
of both to shared memory.
"""

from __future__ import annotations

import triton
import triton.language as tl

from xquant_fx.kernels.decode_attention.triton_fragments import (
    fragment,
    inverse_power,
    operand_of_pairs,
    pairs_of_halves,
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
)
from xquant_fx.kernels.decode_attention.triton_interior_scales import WIDTH, WORDS, even_and_odd, fields_of_runs
from xquant_fx.kernels.decode_attention.triton_products import SUBNORMAL
from xquant_fx.kernels.decode_attention.triton_unpack import CHANNELS, DIM, GROUP, PLANES, STRIDE, code_slot

# Columns of a product at least.
LEAST_COLUMNS = tl.constexpr(8)


@triton.jit
def most_of(x):
    """The largest magnitude of ``x``, which one instruction finds among a warp's integers; NaN is the largest."""
    return tl.max(x.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF, 0).to(tl.float32, bitcast=True)


@triton.jit
def most_of_pairs(x):
    """float32: the largest magnitude of float16 numbers, two in each int32; NaN is the largest."""
    most = tl.max(tl.maximum(x & 0x7FFF, (x >> 16) & 0x7FFF), 0)
    return most.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def rows_of_plane(q, unit, rows, valid_rows, PLANE: tl.constexpr, KEYS: tl.constexpr):
    """Query rows [ROWS, places] in ``unit`` for the codes of a plane, float16."""
    if PLANE[WORDS] == 0:
        return tl.zeros((1, 1), tl.float16)
    else:
        channel, weight = place_weights(tl.arange(0, PLANE[WORDS] * (32 // PLANE[WIDTH])), PLANE, KEYS)
        mask = valid_rows[:, None] & (weight != 0)[None, :]
        x = tl.load(q + rows[:, None] * KEYS[DIM] + channel[None, :], mask=mask, other=0.0)
        return (x.to(tl.float32) * inverse_power(unit)[:, None]).to(tl.float16)


@triton.jit
def rows_query(q, rows, valid_rows, CHANNELS_TILE: tl.constexpr, KEYS: tl.constexpr):
    """Query rows for whole groups: those of each plane, all but one of which are empty, and their unit."""
    channel = tl.arange(0, CHANNELS_TILE)
    mask = (channel < KEYS[DIM])[None, :] & valid_rows[:, None]
    x = tl.load(q + rows[:, None] * KEYS[DIM] + channel[None, :], mask=mask, other=0.0).to(tl.float32)
    unit = power_above(tl.maximum(tl.max(tl.abs(x), 1), LEAST_UNIT)) * 0.5
    four = rows_of_plane(q, unit, rows, valid_rows, KEYS[PLANES][0], KEYS)
    two = rows_of_plane(q, unit, rows, valid_rows, KEYS[PLANES][1], KEYS)
    one = rows_of_plane(q, unit, rows, valid_rows, KEYS[PLANES][2], KEYS)
    return four, two, one, unit


@triton.jit
def plane_numbers(numbers, PLANE: tl.constexpr, KEYS: tl.constexpr):
    """Scales (or zero points) of a plane in the order of places, as stored: an integer for each run of neighbours."""
    if PLANE[WORDS] == 0:
        return tl.zeros((1,), tl.int32)
    else:
        run: tl.constexpr = 4 if PLANE[WORDS] >= 4 else PLANE[WORDS]
        kind: tl.constexpr = tl.int64 if run == 4 else tl.int32 if run == 2 else tl.int16
        return tl.load(numbers.to(tl.pointer_type(kind), bitcast=True) + fields_of_runs(run, PLANE) // run)


@triton.jit
def plane_pairs(x, PLANE: tl.constexpr):
    """What ``plane_numbers`` gave as float16 numbers, two places in each int32: [places / 2]."""
    run: tl.constexpr = 4 if PLANE[WORDS] >= 4 else PLANE[WORDS]
    if run == 1:
        x = pairs_of_halves(x.to(tl.float16, bitcast=True)[None, :])
        return tl.reshape(x, (x.shape[1],))
    elif run == 2:
        return x
    else:
        return tl.reshape(even_and_odd(x), (2 * x.shape[0],))


@triton.jit
def group_scales(keys, t0, KEYS: tl.constexpr):
    """(scales, zero points), as stored, of each plane for the group of ``t0``, and all scales, two in each int32."""
    _codes, scale, zero, _norms = keys
    at = code_slot(t0, KEYS) // KEYS[GROUP] * KEYS[STRIDE]
    s, z = scale + at, zero + at
    four = plane_numbers(s, KEYS[PLANES][0], KEYS), plane_numbers(z, KEYS[PLANES][0], KEYS)
    two = plane_numbers(s, KEYS[PLANES][1], KEYS), plane_numbers(z, KEYS[PLANES][1], KEYS)
    one = plane_numbers(s, KEYS[PLANES][2], KEYS), plane_numbers(z, KEYS[PLANES][2], KEYS)
    pair = tl.arange(0, KEYS[CHANNELS] // 2)
    pair = tl.where(pair * 2 < KEYS[DIM], pair, 0)
    # A load of their own, for the largest: what nothing else wants Triton brings to the operand once.
    return four, two, one, tl.load(s.to(tl.pointer_type(tl.int32), bitcast=True) + pair)


@triton.jit
def scaled_plane(offset, q, s, z, factor, PLANE: tl.constexpr, KEYS: tl.constexpr, ASM: tl.constexpr):
    """Queries times scales, and ``offset`` with the products of queries and zero points."""
    if PLANE[WORDS] == 0:
        return q, offset
    else:
        places: tl.constexpr = PLANE[WORDS] * (32 // PLANE[WIDTH])
        _channel, weight = place_weights(tl.arange(0, places // 2) * 2, PLANE, KEYS)  # neighbours weigh the same
        z = operand_of_pairs(plane_pairs(z, PLANE)[None, :])
        z = tl.trans(tl.broadcast_to(z, (LEAST_COLUMNS, places)))
        offset = tl.dot(q, z, acc=offset)
        s = times_pairs(plane_pairs(s, PLANE), times_pairs(twice(weight.to(tl.float16)), factor, ASM), ASM)
        return times(q, s, ASM), offset


@triton.jit
def rows_of_group(q, scales, SM_SCALE: tl.constexpr, KEYS: tl.constexpr, ASM: tl.constexpr):
    """(queries times scales of each plane, factor [ROWS], offset [ROWS]) of a group of tokens.

    What codes give with them, times factor, plus offset, are logits times log2(e).
    """
    s4, s2, s1 = scales[0][0], scales[1][0], scales[2][0]
    z4, z2, z1 = scales[0][1], scales[1][1], scales[2][1]
    q_four, q_two, q_one, q_unit = q
    unit = tl.maximum(power_above(most_of_pairs(scales[3])) * 0.5, LEAST_SCALES)
    factor = twice_power(inverse_power(unit) * SCALED)
    offset = tl.zeros((q_unit.shape[0], LEAST_COLUMNS), tl.float32)
    q_four, offset = scaled_plane(offset, q_four, s4, z4, factor, KEYS[PLANES][0], KEYS, ASM)
    q_two, offset = scaled_plane(offset, q_two, s2, z2, factor, KEYS[PLANES][1], KEYS, ASM)
    q_one, offset = scaled_plane(offset, q_one, s1, z1, factor, KEYS[PLANES][2], KEYS, ASM)
    q_unit = q_unit * (SM_SCALE * LOG2_E)
    # No 0, which would make NaN of the logits of what is masked.
    factor = tl.maximum(q_unit * (unit * (SUBNORMAL / SCALED)), LEAST_FACTOR)
    return (q_four, q_two, q_one), factor, tl.max(offset, 1) * q_unit  # all columns are the same


@triton.jit
def add_codes(sums, qs, codes, t0, V_BITS: tl.constexpr, PLANE: tl.constexpr, KEYS: tl.constexpr):
    """``sums`` [ROWS, tokens] with the products of a plane's codes from ``t0`` on."""
    if PLANE[WORDS] == 0:
        return sums
    else:
        words = words_in_order(plane_words(codes, t0, sums.shape[1], PLANE, KEYS), PLANE[WORDS], V_BITS, True)
        return tl.dot(qs, tl.trans(fragment(words, PLANE[WIDTH], PLANE[WORDS])), acc=sums)
