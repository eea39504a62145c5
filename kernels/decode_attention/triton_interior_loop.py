"""The loop of ``triton_interior.py`` over whole groups.

Tokens of logits are in the order in which values come out of their words, so probabilities are the right operand of
the next product as they are. A tile lies in one group and every row sees all of it but for a mask of bool. Sums
are as in ``triton_softmax.py``, times 2**14, and logits in base 2.
"""

from __future__ import annotations

import triton
import triton.language as tl

from xquant_fx.kernels.decode_attention.triton_fragments import (
    exp2,
    fragment,
    inverse_power,
    numbers_to_places,
    plane_at,
    power_above,
)
from xquant_fx.kernels.decode_attention.triton_interior_keys import (
    LOG2_E,
    interior_logits,
)
from xquant_fx.kernels.decode_attention.triton_interior_scales import interior_scales
from xquant_fx.kernels.decode_attention.triton_products import LARGEST, SUBNORMAL
from xquant_fx.kernels.decode_attention.triton_softmax import MASK, SM_SCALE, SOFTCAP, tanh
from xquant_fx.kernels.decode_attention.triton_unpack import (
    BITS,
    CHANNELS,
    DIM,
    LOWER,
    NORMS,
    ROTATION,
    TOKENS,
    code_slot,
)
from xquant_fx.kernels.triton_small_floats import UNIT_OF_SCALES, decode_scale, scale_in_units

# Top of a row that has seen nothing yet: finite, so that differences are numbers.
NOTHING = tl.constexpr(-1e30)
LARGEST_LOG2 = tl.constexpr(14.0)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def value_scales(values, t0, TILE: tl.constexpr, VALUES: tl.constexpr):
    """(scales, zero points) [TILE] of a tile, as stored."""
    _, scale, zero = values
    slots = code_slot(t0, VALUES) + tl.arange(0, TILE)
    s = tl.load(scale + slots)
    return s, s if VALUES[ROTATION] != -1 else tl.load(zero + slots)


@triton.jit
def token_norms(keys, t0, TILE: tl.constexpr, KEYS: tl.constexpr):
    """The norms [TILE] of a tile's keys, as stored; nothing of use where there are none."""
    if KEYS[NORMS]:
        return tl.load(keys[3] + code_slot(t0, KEYS) + tl.arange(0, TILE))
    else:
        return tl.zeros((1,), tl.uint8)


@triton.jit
def mask_words(mask_rows, t0, TILE: tl.constexpr, MASK_KIND: tl.constexpr, FOURS: tl.constexpr):
    """What each row of a mask sees of a tile, as stored: 1 or 0, with FOURS in each byte of an int32."""
    if MASK_KIND == "none":
        return tl.zeros((1, 1), tl.int32)
    elif FOURS:
        rows = mask_rows.to(tl.pointer_type(tl.int32), bitcast=True)
        return tl.load(rows[:, None] + (t0 // 4 + tl.arange(0, TILE // 4))[None, :])
    else:
        return tl.load(mask_rows[:, None] + (t0 + tl.arange(0, TILE))[None, :]).to(tl.int32)


@triton.jit
def bits_of_rows(seen):
    """``mask_words`` of all rows, 8 at most, in one: a byte a token, of which bit r says whether row r sees it."""
    if seen.shape[0] == 1:
        return tl.reshape(seen, (seen.shape[1],)) * 255
    else:
        return tl.xor_sum(seen << tl.arange(0, seen.shape[0])[:, None], 0)


@triton.jit
def mask_bits(mask_rows, t0, TILE: tl.constexpr, MASK_KIND: tl.constexpr, FOURS: tl.constexpr):
    """``bits_of_rows`` of a tile, so that a mask ahead of its tile takes a register or two."""
    return bits_of_rows(mask_words(mask_rows, t0, TILE, MASK_KIND, FOURS))


@triton.jit
def token_bits(bits):
    """``mask_bits`` of four tokens each as those of one: a byte, and what is above it."""
    return tl.reshape(bits[:, None] >> (tl.arange(0, 4) * 8)[None, :], (bits.shape[0] * 4,))


@triton.jit
def rows_that_see(bits, ROWS: tl.constexpr, WIDTH: tl.constexpr, FOURS: tl.constexpr):
    """[tokens, ROWS] of ``mask_bits``, tokens in the order of places of values."""
    if FOURS:
        bits = token_bits(bits)
    return (numbers_to_places(bits, WIDTH) >> tl.arange(0, ROWS)[None, :]) & 1


@triton.jit
def eighth_sums(x):
    """[8, rows]: sums over tokens of ``x`` [tokens, rows], of what each of eight threads has."""
    return tl.sum(tl.reshape(x, (x.shape[0] // 8, 8, x.shape[1])), 0)


@triton.jit
def value_words(codes, t0, FROM: tl.constexpr, TILE: tl.constexpr, WIDTH: tl.constexpr, WORDS: tl.constexpr,
                VALUES: tl.constexpr):  # fmt: skip
    """Words [channels, words] of a tile of fields of values of WIDTH bits, whose plane begins at word FROM.

    WORDS: of the plane of narrower fields. Where these are 2 each word is halves, and of the upper plane of two both
    words of 32 tokens belong to one thread.
    """
    parts: tl.constexpr = 4 // WORDS if WORDS < 4 else 1
    count: tl.constexpr = TILE * WIDTH // 32
    if parts == 2:
        codes = codes.to(tl.pointer_type(tl.uint16), bitcast=True)
    w = tl.arange(0, count)
    if count > WORDS:
        threads: tl.constexpr = 4 // parts
        w = 2 * (w // (2 * threads) * threads + w % threads) + w // threads % 2
    w += FROM + code_slot(t0, VALUES) // (32 // WIDTH)
    d = tl.arange(0, VALUES[CHANNELS] * parts)
    pointers = codes + w[:, None] * (VALUES[DIM] * parts) + d[None, :]
    if VALUES[CHANNELS] == VALUES[DIM]:
        words = tl.load(pointers)
    else:
        words = tl.load(pointers, mask=(d < VALUES[DIM] * parts)[None, :], other=0)
    if parts > 1:
        words = tl.permute(tl.reshape(words, (count, VALUES[CHANNELS], parts)), (1, 0, 2))
        return tl.reshape(words, (VALUES[CHANNELS], count * parts))
    else:
        return tl.trans(words)


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
    FOURS: tl.constexpr,
    ASM: tl.constexpr,
):
    """Sums (top [ROWS], total [ROWS], acc [channels, ROWS]) of tokens of ``tile_range`` = (low, high), whole tiles."""
    low, high = tile_range
    ROWS: tl.constexpr = q[4].shape[0]
    # What a tile wants besides codes is loaded a tile ahead, but where masks of rows leave no registers for that.
    AHEAD: tl.constexpr = mask_rows.shape[0] == 1
    BYTES: tl.constexpr = values[1].dtype.element_ty == tl.uint8
    # Of two planes, fields of a token are in the order of the lower.
    WIDTH: tl.constexpr = VALUES[LOWER] if VALUES[LOWER] > 0 else VALUES[BITS]
    UPPER: tl.constexpr = VALUES[BITS] - VALUES[LOWER]
    UPPER_WORDS: tl.constexpr = VALUES[TOKENS] * UPPER // 32
    ALL_SEE: tl.constexpr = -1 if FOURS else 255
    last = tl.maximum(high - TILE, 0)
    top = tl.full((ROWS,), NOTHING, tl.float32)
    total = tl.zeros((8, ROWS), tl.float32)
    from_zeros = tl.zeros((8, ROWS), tl.float32)
    acc = tl.zeros((VALUES[CHANNELS], ROWS), tl.float32)
    unit = tl.full((1,), 2.0**-100, tl.float32)  # of values' scales: a power of two above all so far
    WORDS: tl.constexpr = TILE * WIDTH // 32
    place = tl.arange(0, TILE)
    upper = VALUES[LOWER] - UPPER * plane_at(place, UPPER, WORDS)
    factor = tl.exp2(upper.to(tl.float32))
    # What a lower field weighs where one of the upper plane weighs 1.
    lower = tl.exp2((-WIDTH * plane_at(place, WIDTH, WORDS) - upper).to(tl.float32)).to(tl.float16)
    next_keys = interior_scales(keys, tl.minimum(low, last), VALUES[CHANNELS], KEYS)
    next_s, next_z = value_scales(values, tl.minimum(low, last), TILE, VALUES)
    next_norms = token_norms(keys, tl.minimum(low, last), TILE, KEYS)
    next_seen = mask_bits(mask_rows, tl.minimum(low, last), TILE, LOGITS[MASK], FOURS)
    for t0 in tl.range(low, high, TILE):
        for_keys, s, z, norms, seen = next_keys, next_s, next_z, next_norms, next_seen
        t1 = tl.minimum(t0 + TILE, last)
        next_keys = interior_scales(keys, t1, VALUES[CHANNELS], KEYS)
        if AHEAD:
            next_s, next_z = value_scales(values, t1, TILE, VALUES)
            next_norms = token_norms(keys, t1, TILE, KEYS)
            next_seen = mask_bits(mask_rows, t1, TILE, LOGITS[MASK], FOURS)
        r, of_row, offset = interior_logits(q, keys, for_keys, t0, TILE, WIDTH, LOGITS[SM_SCALE], BYTES, KEYS)
        if KEYS[NORMS] or LOGITS[SOFTCAP] != 0.0:
            r = r * of_row[None, :] + offset[None, :]
            if KEYS[NORMS]:
                if not AHEAD:
                    norms = token_norms(keys, t0, TILE, KEYS)
                r = r * numbers_to_places(decode_scale(norms), WIDTH)
            if LOGITS[SOFTCAP] != 0.0:
                capped: tl.constexpr = LOGITS[SOFTCAP] * LOG2_E
                r = capped * tanh(r * (1.0 / capped))
            of_row, offset = tl.full((ROWS,), 1.0, tl.float32), tl.zeros((ROWS,), tl.float32)
        if not AHEAD:
            s, z = value_scales(values, t0, TILE, VALUES)
            seen = mask_bits(mask_rows, t0, TILE, LOGITS[MASK], FOURS)
        if LOGITS[MASK] == "bool":  # noqa: SIM102 - known before the kernel runs
            # It is seldom applied: a mask hides what is padded, or to come.
            if tl.max((seen != ALL_SEE).to(tl.int32), 0) != 0:
                r = tl.where(rows_that_see(seen, ROWS, WIDTH, FOURS) != 0, r, float("-inf"))
        new_top = tl.maximum(top, tl.max(r, 0) * of_row + offset)
        p = exp2(r * of_row[None, :] + (offset + LARGEST_LOG2 - new_top)[None, :], ASM)
        alpha = exp2(top - new_top, ASM)
        top = new_top
        s = numbers_to_places(scale_in_units(s), WIDTH)
        new_unit = tl.maximum(unit, power_above(tl.max(tl.max(tl.abs(s), 0), 0)))
        ps = p.to(tl.float16) * (s * (factor * inverse_power(new_unit))[:, None]).to(tl.float16)
        z = s if VALUES[ROTATION] != -1 else numbers_to_places(z.to(tl.float32), WIDTH)
        total = total * alpha[None, :] + eighth_sums(p)
        from_zeros = from_zeros * alpha[None, :] + eighth_sums(p * z)
        back = alpha * (unit * inverse_power(new_unit))
        unit = new_unit
        words = value_words(values[0], t0, 0, TILE, UPPER, WORDS, VALUES)
        acc = tl.dot(fragment(words, UPPER, WORDS), ps, acc=acc * back[None, :])
        if VALUES[LOWER] > 0:
            words = value_words(values[0], t0, UPPER_WORDS, TILE, WIDTH, WORDS, VALUES)
            acc = tl.dot(fragment(words, WIDTH, WORDS), ps * lower[:, None], acc=acc)
    scale_unit: tl.constexpr = UNIT_OF_SCALES if BYTES else 1.0
    down: tl.constexpr = 1.0 / LARGEST
    # Values about zero have zero point -n / 2 times their scale.
    middle: tl.constexpr = -0.5 * ((1 << VALUES[BITS]) - 1) * scale_unit if VALUES[ROTATION] != -1 else 1.0
    acc = acc * (unit * (SUBNORMAL * scale_unit * down))[:, None] + (tl.sum(from_zeros, 0) * (middle * down))[None, :]
    total = tl.sum(total, 0) * down
    return tl.where(total == 0, float("-inf"), top * LN_2), total, acc
