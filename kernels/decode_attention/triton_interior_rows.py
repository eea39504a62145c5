"""The loop of ``triton_interior.py`` for more than 8 query rows: 16 are the left operand, codes the right one.

    logits [rows, tokens] = (q s) [rows, channels] @ K^T [channels, tokens]
    out [rows, channels] += p [rows, tokens] @ V [tokens, channels]

Codes are decoded once for 16 rows, scales applied once for a tile, which is taken in steps of fewer tokens. A row's
top is not its largest logit: it moves, to one above that, only when a weight would be 1 or more, so that most steps
find no maximum and scale nothing. Whether it does is asked before weights are computed, which then fill the gaps
between products with values. Sums of weights and of zero points are products, too.
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
    power_above,
    times,
)
from xquant_fx.kernels.decode_attention.triton_interior_keys import LOG2_E
from xquant_fx.kernels.decode_attention.triton_interior_loop import (
    LARGEST_LOG2,
    LN_2,
    NOTHING,
    bits_of_rows,
    mask_words,
    token_bits,
    value_scales,
    value_words,
)
from xquant_fx.kernels.decode_attention.triton_interior_row_keys import (
    LEAST_COLUMNS,
    add_codes,
    group_scales,
    most_of,
    rows_of_group,
)
from xquant_fx.kernels.decode_attention.triton_products import LARGEST, SUBNORMAL
from xquant_fx.kernels.decode_attention.triton_softmax import MASK, SM_SCALE, SOFTCAP, tanh
from xquant_fx.kernels.decode_attention.triton_unpack import BITS, CHANNELS, PLANES, ROTATION
from xquant_fx.kernels.triton_small_floats import UNIT_OF_SCALES, scale_in_units


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
def exp2_of_sum(r, factor, offset, ASM: tl.constexpr):
    """``exp2`` of r [rows, tokens] * factor [rows] + offset [rows]: in assembly, or LLVM would keep earlier sums."""
    factor, offset = factor[:, None], offset[:, None]
    if ASM:
        _, factor = tl.broadcast(r, factor)
        _, offset = tl.broadcast(r, offset)
        return tl.inline_asm_elementwise(
            "{ .reg .f32 x; fma.rn.f32 x, $1, $2, $3; ex2.approx.ftz.f32 $0, x; }", "=f,f,f,f", [r, factor, offset],
            dtype=tl.float32, is_pure=True, pack=1,
        )  # fmt: skip
    else:
        return exp2(r * factor + offset, ASM)


@triton.jit
def scales_in_order(s, z, weight, WIDTH: tl.constexpr, CENTRED: tl.constexpr):
    """(float16 [tokens] of zero points, CENTRED: scales; int32 [tokens / 2] of pairs of weighted scales), in order."""
    z = numbers_in_order((s if CENTRED else z).to(tl.float16), WIDTH, True)
    s = numbers_in_order((s * weight).to(tl.float16), WIDTH, True)
    return z, tl.reshape(pairs_of_halves(s[None, :]), (s.shape[0] // 2,))


@triton.jit
def step_scales(values, masks, t0, STEP: tl.constexpr, VALUES: tl.constexpr,
                MASK_KIND: tl.constexpr, FOURS: tl.constexpr):  # fmt: skip
    """(scales, zero points, what rows see) of the tokens of a step, as stored: of a mask bits are seldom wanted."""
    s, z = value_scales(values, t0, STEP, VALUES)
    seen = mask_words(masks[0], t0, STEP, MASK_KIND, FOURS), mask_words(masks[1], t0, STEP, MASK_KIND, FOURS)
    return s, z, seen


@triton.jit
def tile_scales(keys, values, masks, t0, STEPS: tl.constexpr, STEP: tl.constexpr, KEYS: tl.constexpr,
                VALUES: tl.constexpr, MASK_KIND: tl.constexpr, FOURS: tl.constexpr):  # fmt: skip
    """``group_scales``, and ``step_scales`` of all steps of a tile, two at most."""
    of_group = group_scales(keys, t0, KEYS)
    first = step_scales(values, masks, t0, STEP, VALUES, MASK_KIND, FOURS)
    if STEPS == 1:
        return of_group, first, first
    else:
        return of_group, first, step_scales(values, masks, t0 + STEP, STEP, VALUES, MASK_KIND, FOURS)


@triton.jit
def row_logits(group, codes, t0, STEP: tl.constexpr, V_BITS: tl.constexpr, KEYS: tl.constexpr,
               LOGITS: tl.constexpr):  # fmt: skip
    """(r [ROWS, STEP], factor [ROWS], offset [ROWS]): logits, times log2(e), are r * factor + offset."""
    qs, factor, offset = group
    r = tl.zeros((factor.shape[0], STEP), tl.float32)
    r = add_codes(r, qs[0], codes, t0, V_BITS, KEYS[PLANES][0], KEYS)
    r = add_codes(r, qs[1], codes, t0, V_BITS, KEYS[PLANES][1], KEYS)
    r = add_codes(r, qs[2], codes, t0, V_BITS, KEYS[PLANES][2], KEYS)
    if LOGITS[SOFTCAP] != 0.0:
        capped: tl.constexpr = LOGITS[SOFTCAP] * LOG2_E
        r = capped * tanh((r * factor[:, None] + offset[:, None]) * (1.0 / capped))
        factor, offset = tl.full(factor.shape, 1.0, tl.float32), tl.zeros(offset.shape, tl.float32)
    return r, factor, offset


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
    ROWS: tl.constexpr = q[3].shape[0]
    BYTES: tl.constexpr = values[1].dtype.element_ty == tl.uint8
    WIDTH: tl.constexpr = VALUES[BITS]
    # A step has four words of values at least.
    STEP: tl.constexpr = 64 if WIDTH > 1 else 128
    STEPS: tl.constexpr = TILE // STEP
    ALL_SEE: tl.constexpr = 0x01010101 if FOURS else 1
    last = tl.maximum(high - TILE, 0)
    top = tl.full((ROWS,), NOTHING, tl.float32)
    total = tl.zeros((ROWS, LEAST_COLUMNS), tl.float32)
    from_zeros = tl.zeros((ROWS, LEAST_COLUMNS), tl.float32)
    acc = tl.zeros((ROWS, VALUES[CHANNELS]), tl.float32)
    unit = tl.full((), 2.0**-100, tl.float32)  # of values' scales: a power of two above all so far
    plane = tl.arange(0, STEP) // 4 % (8 // WIDTH)
    weight = tl.exp2((-WIDTH * plane).to(tl.float32) + (LARGEST_LOG2 + 1.0))
    ones = tl.full((STEP, LEAST_COLUMNS), 1.0, tl.float16)
    at = tl.minimum(low, last)
    next_scales = tile_scales(keys, values, masks, at, STEPS, STEP, KEYS, VALUES, LOGITS[MASK], FOURS)
    for t0 in tl.range(low, high, TILE):
        scales, at = next_scales, tl.minimum(t0 + TILE, last)
        next_scales = tile_scales(keys, values, masks, at, STEPS, STEP, KEYS, VALUES, LOGITS[MASK], FOURS)
        group = rows_of_group(q, scales[0], LOGITS[SM_SCALE], KEYS, ASM)
        for step in tl.static_range(STEPS):
            s, z, seen = scales[1] if step == 0 else scales[2]
            t = t0 + step * STEP
            r, factor, offset = row_logits(group, keys[0], t, STEP, WIDTH, KEYS, LOGITS)
            if LOGITS[MASK] == "bool":
                # It is seldom applied: a mask hides what is padded, or to come.
                hidden = (seen[0] & seen[1]) ^ ALL_SEE
                if tl.max(tl.reshape(hidden, (hidden.shape[0] * hidden.shape[1],)), 0) != 0:
                    r = tl.where(many_rows_that_see(seen, ROWS, QUERY, WIDTH, FOURS) != 0, r, float("-inf"))
            s = scale_in_units(s)
            new_unit = tl.maximum(unit, power_above(most_of(s)))
            if WIDTH > 1:
                # Before the branch, after which ``unit`` is ``new_unit``: nothing but weights is waited for then.
                z, s = scales_in_order(s, z, weight * inverse_power(new_unit), WIDTH, VALUES[ROTATION] != -1)
            if WIDTH == 2:  # other widths have no registers for that
                words = value_words(values[0], t, 0, STEP, WIDTH, STEP * WIDTH // 32, VALUES)
            x = r * factor[:, None] + (offset - top)[:, None]
            if (common_sign(x, ASM) >= 0) | (new_unit > unit):
                new_top = tl.maximum(top, tl.max(r, 1) * factor + (offset + 1.0))
                x = r * factor[:, None] + (offset - new_top)[:, None]
                alpha = exp2(top - new_top, ASM)[:, None]
                total, from_zeros = total * alpha, from_zeros * alpha
                acc = acc * (alpha * (unit * inverse_power(new_unit)))
                top, unit = new_top, new_unit
            if WIDTH != 2:
                words = value_words(values[0], t, 0, STEP, WIDTH, STEP * WIDTH // 32, VALUES)
            if WIDTH == 1:  # no registers for that before, nor to keep ``x`` beside ``r``
                z, s = scales_in_order(s, z, weight * inverse_power(unit), WIDTH, VALUES[ROTATION] != -1)
                p = exp2_of_sum(r, factor, offset - top, ASM).to(tl.float16)
            else:
                p = exp2(x, ASM).to(tl.float16)
            total = tl.dot(p, ones, acc=total)
            from_zeros = tl.dot(p, tl.broadcast_to(z[:, None], (STEP, LEAST_COLUMNS)), acc=from_zeros)
            ps = columns_to_places(times(p, s, ASM))
            acc = tl.dot(ps, tl.trans(fragment(words, WIDTH, STEP * WIDTH // 32)), acc=acc)
    scale_unit: tl.constexpr = UNIT_OF_SCALES if BYTES else 1.0
    # Values about zero have zero point -n / 2 times their scale.
    middle: tl.constexpr = -0.5 * ((1 << WIDTH) - 1) * scale_unit if VALUES[ROTATION] != -1 else 1.0
    total = tl.max(total, 1)  # all columns are the same
    acc = acc * (unit * (SUBNORMAL * scale_unit / (2.0 * LARGEST))) + (tl.max(from_zeros, 1) * middle)[:, None]
    return tl.where(total == 0, float("-inf"), top * LN_2), total, tl.trans(acc)
