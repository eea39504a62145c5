"""The loop of ``triton_interior.py`` for more than 8 query rows: 16 are the left operand, codes the right one.

    logits [rows, tokens] = (q s) [rows, channels] @ K^T [channels, tokens]
    out [rows, channels] += p [rows, tokens] @ V [tokens, channels]

Codes are decoded once for 16 rows. A row's top is not its largest logit: it moves, to one above that, only when a
weight would be 1 or more, so that most tiles find no maximum and scale nothing. Whether it does is asked before weights
are computed, which then fill the gaps between products with values. Sums of weights, and of zero points or the largest
codes, are products, too. The order of statements decides what is in registers at a time, of which there are 255.
"""

from __future__ import annotations

import triton
import triton.language as tl

from xquant_fx.kernels.decode_attention.triton_fragments import (
    exp2,
    fragment,
    inverse_power,
    numbers_in_order,
    pairs_of_halves,
    plane_at,
    power_above,
    times,
    twice,
)
from xquant_fx.kernels.decode_attention.triton_interior_keys import LOG2_E, words_of_ones
from xquant_fx.kernels.decode_attention.triton_interior_loop import (
    LARGEST_LOG2,
    LN_2,
    NOTHING,
    bits_of_rows,
    mask_words,
    token_bits,
    token_norms,
    value_scales,
    value_words,
)
from xquant_fx.kernels.decode_attention.triton_interior_row_keys import LEAST_COLUMNS, row_logits
from xquant_fx.kernels.decode_attention.triton_interior_row_scales import group_scales, most_of
from xquant_fx.kernels.decode_attention.triton_products import LARGEST, SUBNORMAL
from xquant_fx.kernels.decode_attention.triton_softmax import MASK, SM_SCALE, SOFTCAP, tanh
from xquant_fx.kernels.decode_attention.triton_unpack import (
    BITS,
    CHANNELS,
    LOWER,
    NORMS,
    RANKED,
    ROTATION,
    TOKENS,
)
from xquant_fx.kernels.triton_small_floats import UNIT_OF_SCALES, decode_scale, scale_in_units


@triton.jit
def columns_to_places(p):
    """``p`` [rows, tokens] from the order of columns of logits to that of places of values: no thread gives any."""
    rows: tl.constexpr = p.shape[0]
    count: tl.constexpr = p.shape[1]
    p = tl.reshape(p, (rows, count // 16, 2, 4, 2))
    return tl.reshape(tl.permute(p, (0, 1, 3, 2, 4)), (rows, count))


@triton.jit
def both(a, b):
    """Bits that both have."""
    return a & b


@triton.jit
def common_sign(x, ASM: tl.constexpr):
    """An int32 that is negative if all of ``x`` are, 0 or more if any is 0 or more."""
    bits = tl.reshape(x.to(tl.int32, bitcast=True), (x.shape[0] * x.shape[1],))
    # The interpreter is slow to reduce by a function.
    return tl.reduce(bits, 0, both) if ASM else tl.max(bits, 0)


@triton.jit
def many_rows_that_see(seen, ROWS: tl.constexpr, QUERY: tl.constexpr, WIDTH: tl.constexpr, FOURS: tl.constexpr):
    """[ROWS, tokens] of two ``mask_words``, of 8 rows each; with QUERY, rows of a query token see the same."""
    low, high = bits_of_rows(seen[0]), bits_of_rows(seen[1])
    if FOURS:
        low, high = token_bits(low), token_bits(high)
    bit = tl.arange(0, ROWS) % QUERY if QUERY > 0 else tl.arange(0, ROWS)
    both = numbers_in_order((low & 255) | ((high & 255) << 8), WIDTH, True)
    return (both[None, :] >> bit[:, None]) & 1


@triton.jit
def scales_in_order(s, z, weight, WIDTH: tl.constexpr):
    """(float16 [tokens] of zero points, int32 [tokens / 2] of pairs of weighted scales), in order."""
    z = numbers_in_order(z.to(tl.float16), WIDTH, True)
    s = numbers_in_order((s * weight).to(tl.float16), WIDTH, True)
    return z, tl.reshape(pairs_of_halves(s[None, :]), (s.shape[0] // 2,))


@triton.jit
def tile_scales(keys, values, masks, t0, TILE: tl.constexpr, KEYS: tl.constexpr, VALUES: tl.constexpr,
                MASK_KIND: tl.constexpr, FOURS: tl.constexpr):  # fmt: skip
    """(``group_scales``, norms of keys, scales and zero points of values, what rows see) of a tile, as stored."""
    s, z = value_scales(values, t0, TILE, VALUES)
    seen = mask_words(masks[0], t0, TILE, MASK_KIND, FOURS), mask_words(masks[1], t0, TILE, MASK_KIND, FOURS)
    return group_scales(keys, t0, KEYS), token_norms(keys, t0, TILE, KEYS), s, z, seen


@triton.jit
def above(r, factor, offset, norms, base, V_BITS: tl.constexpr, KEYS: tl.constexpr, LOGITS: tl.constexpr):
    """Logits [ROWS, tokens] times log2(e), less ``base`` [ROWS], of what ``row_logits`` gave."""
    if KEYS[NORMS] or LOGITS[SOFTCAP] != 0.0:
        r = r * factor[:, None] + offset[:, None]
        norms = numbers_in_order(decode_scale(norms), V_BITS, True)[None, :] if KEYS[NORMS] else 1.0
        if LOGITS[SOFTCAP] != 0.0:
            capped: tl.constexpr = LOGITS[SOFTCAP] * LOG2_E
            return capped * tanh(r * (norms * (1.0 / capped))) - base[:, None]
        else:
            return r * norms - base[:, None]
    else:
        return r * factor[:, None] + (offset - base)[:, None]


@triton.jit
def attend_rows(
    q,
    keys,
    values,
    masks,
    tile_range,
    KEYS: tl.constexpr,
    VALUES: tl.constexpr,
    LOGITS: tl.constexpr,
    QUERY: tl.constexpr,
    TILE: tl.constexpr,
    FOURS: tl.constexpr,
    ASM: tl.constexpr,
):
    """Sums (top [ROWS], total [ROWS], acc [channels, ROWS]) of tokens of ``tile_range`` = (low, high), whole tiles.

    ``masks``: where masks of the first 8 rows begin, and of the others; with QUERY, the first have all that differ.
    """
    low, high = tile_range
    ROWS: tl.constexpr = q[4].shape[0]
    BYTES: tl.constexpr = values[1].dtype.element_ty == tl.uint8
    K_BYTES: tl.constexpr = keys[1].dtype.element_ty == tl.uint8
    # Of two planes, fields of a token are in the order of the lower.
    LOW: tl.constexpr = VALUES[LOWER]
    WIDTH: tl.constexpr = LOW if LOW > 0 else VALUES[BITS]
    UPPER: tl.constexpr = VALUES[BITS] - LOW
    UPPER_WORDS: tl.constexpr = VALUES[TOKENS] * UPPER // 32
    V_WORDS: tl.constexpr = TILE * WIDTH // 32
    CENTRED: tl.constexpr = VALUES[ROTATION] != -1
    ALL_SEE: tl.constexpr = 0x01010101 if FOURS else 1
    LATE: tl.constexpr = KEYS[RANKED] or KEYS[LOWER] > 0 or LOW > 0  # scales ahead: no registers for them before
    last = tl.maximum(high - TILE, 0)
    top = tl.full((ROWS,), NOTHING, tl.float32)
    unseen = low >= 0  # whether any row has seen nothing yet
    total = tl.zeros((ROWS, LEAST_COLUMNS), tl.float32)
    from_zeros = tl.zeros((ROWS, LEAST_COLUMNS), tl.float32)
    acc = tl.zeros((ROWS, VALUES[CHANNELS]), tl.float32)
    unit = tl.full((), 2.0**-100, tl.float32)  # of values' scales: a power of two above all so far
    plane = tl.arange(0, TILE) // 4 % (8 // UPPER)
    weight = tl.exp2((-UPPER * plane).to(tl.float32) + (LARGEST_LOG2 + 1.0))
    ones = tl.full((TILE, LEAST_COLUMNS), 1.0, tl.float16)
    largest = fragment(words_of_ones(LEAST_COLUMNS, TILE * UPPER // 32, V_WORDS), UPPER, V_WORDS)
    pair = tl.arange(0, TILE // 2) * 2
    # What a lower field weighs where one of the upper plane weighs 1.
    lower = UPPER * plane_at(pair, UPPER, V_WORDS) - WIDTH * plane_at(pair, WIDTH, V_WORDS) - LOW
    lower = twice(tl.exp2(lower.to(tl.float32)).to(tl.float16))
    next_scales = tile_scales(keys, values, masks, tl.minimum(low, last), TILE, KEYS, VALUES, LOGITS[MASK], FOURS)
    for t0 in tl.range(low, high, TILE):
        for_keys, norms, s, z, seen = next_scales
        if not LATE:
            next_scales = tile_scales(
                keys, values, masks, tl.minimum(t0 + TILE, last), TILE, KEYS, VALUES, LOGITS[MASK], FOURS
            )
        r, factor, offset = row_logits(q, keys[0], for_keys, t0, TILE, WIDTH, LOGITS[SM_SCALE], K_BYTES, KEYS, ASM)
        # What is left of logits keeps their digits: while a row has seen nothing, they are taken as they are.
        base = tl.where(top > NOTHING, top, 0.0)
        x = above(r, factor, offset, norms, base, WIDTH, KEYS, LOGITS)
        if LOGITS[MASK] == "bool":
            # It is seldom applied: a mask hides what is padded, or to come.
            hidden = (seen[0] & seen[1]) ^ ALL_SEE
            if tl.max(tl.reshape(hidden, (hidden.shape[0] * hidden.shape[1],)), 0) != 0:
                x = tl.where(many_rows_that_see(seen, ROWS, QUERY, WIDTH, FOURS) != 0, x, float("-inf"))
        s = scale_in_units(s)
        new_unit = tl.maximum(unit, power_above(most_of(s)))
        if WIDTH > 1:
            # Before the branch, after which ``unit`` is ``new_unit``: nothing but weights is waited for then.
            z, s = scales_in_order(s, z, weight * inverse_power(new_unit), WIDTH)
        if WIDTH == 2:  # other widths have no registers for that
            words = value_words(values[0], t0, 0, TILE, UPPER, V_WORDS, VALUES)
        if LOW > 0:  # computed anew, so that it takes no register over the tile
            unseen = tl.min(top, 0) <= NOTHING
        if (common_sign(x, ASM) >= 0) | (new_unit > unit) | unseen:
            new_top = tl.maximum(top, tl.max(x, 1) + (base + 1.0))
            x += (base - tl.where(new_top > NOTHING, new_top, 0.0))[:, None]
            alpha = exp2(top - new_top, ASM)[:, None]
            back = alpha * (unit * inverse_power(new_unit))
            total, from_zeros = total * alpha, from_zeros * (back if CENTRED else alpha)
            acc = acc * back
            top, unit, unseen = new_top, new_unit, tl.min(new_top, 0) <= NOTHING
        if WIDTH != 2:
            words = value_words(values[0], t0, 0, TILE, UPPER, V_WORDS, VALUES)
        if WIDTH == 1:  # no registers for that before
            z, s = scales_in_order(s, z, weight * inverse_power(unit), WIDTH)
        p = exp2(x, ASM).to(tl.float16)
        total = tl.dot(p, ones, acc=total)
        ps = columns_to_places(times(p, s, ASM))
        if CENTRED:
            from_zeros = tl.dot(ps, tl.trans(largest), acc=from_zeros)
        else:
            from_zeros = tl.dot(p, tl.broadcast_to(z[:, None], (TILE, LEAST_COLUMNS)), acc=from_zeros)
        acc = tl.dot(ps, tl.trans(fragment(words, UPPER, V_WORDS)), acc=acc)
        if LOW > 0:
            ps = times(ps, lower, ASM)
            words = value_words(values[0], t0, UPPER_WORDS, TILE, WIDTH, V_WORDS, VALUES)
            acc = tl.dot(ps, tl.trans(fragment(words, WIDTH, V_WORDS)), acc=acc)
        if LATE:
            next_scales = tile_scales(
                keys, values, masks, tl.minimum(t0 + TILE, last), TILE, KEYS, VALUES, LOGITS[MASK], FOURS
            )
    scale_unit: tl.constexpr = UNIT_OF_SCALES if BYTES else 1.0
    total, from_zeros = tl.max(total, 1), tl.max(from_zeros, 1)  # all columns are the same
    factor = unit * ((1 << LOW) * SUBNORMAL * scale_unit / (2.0 * LARGEST))
    # Levels of values about zero are about half of the largest code, of which ``largest`` has the upper field.
    half: tl.constexpr = -0.5 * ((1 << VALUES[BITS]) - 1) / (((1 << UPPER) - 1) << LOW)
    acc = acc * factor + (from_zeros * (factor * half) if CENTRED else from_zeros)[:, None]
    return tl.where(total == 0, float("-inf"), top * LN_2), total, tl.trans(acc)
