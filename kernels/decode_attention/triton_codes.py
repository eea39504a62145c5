"""Products of tiles of codes: logits of keys, outputs of values.

Scales and zero points never meet the codes. With one scale per channel and token group, keys give

    sum_d q_d (c_td s_d + z_d) = sum_d (q_d s_d) c_td + sum_d q_d z_d

so a tile needs q * s and one number per row; with one scale per token, values do the same with p * s
and sum_t p_t z_t. What goes to float16 is divided by its largest number first, so that neither range
nor precision of float16 depends on the model's scales. Where a tile does not lie in one group (FOLD
false), codes are dequantized element by element. Rotated values have zero point -n / 2 times their scale.
A code of two fields is high * 2**bits of low + low, so that each plane of fields is a product of its own.
"""

from __future__ import annotations

import triton
import triton.language as tl

from xquant_fx.kernels.decode_attention.triton_products import (
    LARGEST,
    SUBNORMAL,
    add_product,
    product,
    rounded,
    scaled_to_largest,
)
from xquant_fx.kernels.decode_attention.triton_ranked import ranked_logits, ranked_scales, ranked_words
from xquant_fx.kernels.decode_attention.triton_softmax import in_zone
from xquant_fx.kernels.decode_attention.triton_unpack import (
    BITCAST,
    BITS,
    CHANNELS,
    DIM,
    FOLD,
    GROUP,
    LOWER,
    MODEL,
    RANKED,
    ROTATION,
    STRIDE,
    TOKENS,
    code_slot,
    to_word_order,
    unpack,
    word_order,
)
from xquant_fx.kernels.triton_small_floats import decode_scale


@triton.jit
def key_words(keys, t0, KEYS: tl.constexpr, TILE: tl.constexpr):
    """Words of a tile of keys [TILE, words of a token], plane by plane where there are several.

    Masked by the bounds of the storage, which are known here, so that loads stay vectors; what is
    outside the zone is masked in the logits.
    """
    codes, _, _, _ = keys
    t0 = code_slot(t0, KEYS)
    if KEYS[RANKED]:
        return ranked_words(codes, t0, KEYS, TILE)
    elif KEYS[LOWER][BITS] > 0:
        first: tl.constexpr = (KEYS[DIM] * KEYS[BITS] + 31) // 32
        high = words_of_fields(codes, t0, KEYS, TILE)
        return high, words_of_fields(codes + first * KEYS[TOKENS], t0, KEYS[LOWER], TILE)
    else:
        return words_of_fields(codes, t0, KEYS, TILE)


@triton.jit
def words_of_fields(codes, t0, KEYS: tl.constexpr, TILE: tl.constexpr):
    """Words of a plane of a tile of keys."""
    tokens, w = t0 + tl.arange(0, TILE), tl.arange(0, KEYS[CHANNELS] * KEYS[BITS] // 32)
    in_bounds = (tokens < KEYS[TOKENS])[:, None] & (w < (KEYS[DIM] * KEYS[BITS] + 31) // 32)[None, :]
    return tl.load(codes + w[None, :] * KEYS[TOKENS] + tokens[:, None], mask=in_bounds, other=0)


@triton.jit
def key_scales(keys, t0, limit, KEYS: tl.constexpr, TILE: tl.constexpr):
    """(scales, zeros) [CHANNELS] of a tile that is one group; zeros if ``t0`` is not below ``limit``."""
    _, scale, zero, norm = keys
    if KEYS[RANKED]:
        return ranked_scales(scale, zero, norm, t0, limit, KEYS, TILE)
    elif KEYS[FOLD]:
        slot, in_use = code_slot(t0, KEYS), t0 + tl.arange(0, 1) < limit
        s = numbers_of_group(scale, slot, in_use, KEYS)
        z = numbers_of_group(zero, slot, in_use, KEYS)
        if KEYS[LOWER][BITS] > 0:
            return s, z, numbers_of_group(scale, slot, in_use, KEYS[LOWER])
        else:
            return s, z
    else:
        return tl.zeros((1,), tl.float32), tl.zeros((1,), tl.float32)


@triton.jit
def numbers_of_group(numbers, slot, in_use, KEYS: tl.constexpr):
    """Scales or zeros [CHANNELS] of the group in ``slot``."""
    d = tl.arange(0, KEYS[CHANNELS])
    in_bounds = (d < KEYS[DIM]) & in_use
    return tl.load(numbers + slot // KEYS[GROUP] * KEYS[STRIDE] + d, mask=in_bounds, other=0.0)


@triton.jit
def folded_logits(c, scales, q, SM_SCALE: tl.constexpr, KEYS: tl.constexpr):
    """Logits of codes ``c`` [TILE, CHANNELS] that have one scale per channel: the query takes the scales."""
    s, z = scales
    _d, factor = word_order(KEYS[CHANNELS], KEYS)
    s = to_word_order(s.to(tl.float32)[:, None], KEYS)
    z = to_word_order(z.to(tl.float32)[:, None], KEYS) / factor[:, None]
    from_zeros = tl.sum(q * z, 0)
    qs = q * s
    qs, undo = scaled_to_largest(qs, tl.max(tl.abs(qs), 0)[None, :])
    unit: tl.constexpr = SUBNORMAL if KEYS[BITCAST] else 1.0
    dtype: tl.constexpr = "fp32" if KEYS[MODEL] == "fp32" else "fp16"
    return product(c, qs, dtype) * (undo * (unit * SM_SCALE)) + (from_zeros * SM_SCALE)[None, :]


@triton.jit
def folded_logits_of_planes(high, low, scales, q, SM_SCALE: tl.constexpr, KEYS: tl.constexpr):
    """The same of codes of two fields, of which each plane has the query in its own order."""
    s, z, s_low = scales
    q_high, q_low = q
    _d, factor = word_order(KEYS[CHANNELS], KEYS)
    z = to_word_order(z.to(tl.float32)[:, None], KEYS) / factor[:, None]
    from_zeros = tl.sum(q_high * z, 0)
    weight: tl.constexpr = 1 << KEYS[LOWER][BITS]
    qs = q_high * (to_word_order(s.to(tl.float32)[:, None], KEYS) * weight)
    qs_low = q_low * to_word_order(s_low.to(tl.float32)[:, None], KEYS[LOWER])
    largest = tl.maximum(tl.max(tl.abs(qs), 0), tl.max(tl.abs(qs_low), 0))[None, :]
    qs, undo = scaled_to_largest(qs, largest)
    qs_low, undo = scaled_to_largest(qs_low, largest)
    unit: tl.constexpr = SUBNORMAL if KEYS[BITCAST] else 1.0
    dtype: tl.constexpr = "fp32" if KEYS[MODEL] == "fp32" else "fp16"
    sums = add_product(product(high, qs, dtype), low, qs_low, dtype)
    return sums * (undo * (unit * SM_SCALE)) + (from_zeros * SM_SCALE)[None, :]


@triton.jit
def dequantized_logits(c, scale, zero, slots, valid_tokens, q, SM_SCALE: tl.constexpr, KEYS: tl.constexpr):
    """Logits of codes ``c`` [TILE, CHANNELS] in ``slots``, each dequantized by the scale of its group."""
    d, factor = word_order(KEYS[CHANNELS], KEYS)
    offsets = (slots // KEYS[GROUP] * KEYS[STRIDE])[:, None] + d[None, :]
    in_bounds = valid_tokens[:, None] & (d < KEYS[DIM])[None, :]
    s = tl.load(scale + offsets, mask=in_bounds, other=0.0).to(tl.float32)
    z = tl.load(zero + offsets, mask=in_bounds, other=0.0).to(tl.float32)
    unit: tl.constexpr = SUBNORMAL if KEYS[BITCAST] else 1.0
    k = c.to(tl.float32) * (factor * unit)[None, :] * s + z
    return product(k, q, KEYS[MODEL]) * SM_SCALE


@triton.jit
def dequantized_low(c, scale, slots, valid_tokens, q, SM_SCALE: tl.constexpr, KEYS: tl.constexpr):
    """What the plane of lower fields adds to them; the upper ones count as codes that are so many times larger."""
    d, factor = word_order(KEYS[CHANNELS], KEYS)
    offsets = (slots // KEYS[GROUP] * KEYS[STRIDE])[:, None] + d[None, :]
    s = tl.load(scale + offsets, mask=valid_tokens[:, None] & (d < KEYS[DIM])[None, :], other=0.0).to(tl.float32)
    unit: tl.constexpr = SUBNORMAL if KEYS[BITCAST] else 1.0
    return product(c.to(tl.float32) * (factor * unit)[None, :] * s, q, KEYS[MODEL]) * SM_SCALE


@triton.jit
def code_logits(q, words, keys, scales, tokens, valid_tokens, SM_SCALE: tl.constexpr, KEYS: tl.constexpr):
    """Scaled logits [TILE, ROWS] of keys in codes. ``q`` [CHANNELS, ROWS] is float32, in word order, with the
    factors if FOLD; ``words`` and ``scales`` are those of ``key_words`` and ``key_scales``."""
    _, scale, zero, _ = keys
    slots = code_slot(tokens, KEYS)
    if KEYS[RANKED]:
        return ranked_logits(q, words, scales, tokens.shape[0], SM_SCALE, KEYS)
    elif KEYS[LOWER][BITS] > 0:
        high, low = unpack(words[0], KEYS), unpack(words[1], KEYS[LOWER])
        if KEYS[FOLD]:
            return folded_logits_of_planes(high, low, scales, q, SM_SCALE, KEYS)
        else:
            high = high.to(tl.float32) * (1 << KEYS[LOWER][BITS])
            logits = dequantized_logits(high, scale, zero, slots, valid_tokens, q[0], SM_SCALE, KEYS)
            return logits + dequantized_low(low, scale, slots, valid_tokens, q[1], SM_SCALE, KEYS[LOWER])
    elif KEYS[FOLD]:
        return folded_logits(unpack(words, KEYS), scales, q, SM_SCALE, KEYS)
    else:
        return dequantized_logits(unpack(words, KEYS), scale, zero, slots, valid_tokens, q, SM_SCALE, KEYS)


@triton.jit
def value_words(codes, t0, VALUES: tl.constexpr, TILE: tl.constexpr):
    """Words of a plane of a tile of values [CHANNELS, TILE * BITS / 32], masked as in ``key_words``."""
    w = t0 // (32 // VALUES[BITS]) + tl.arange(0, TILE * VALUES[BITS] // 32)
    d = tl.arange(0, VALUES[CHANNELS])
    in_bounds = (d < VALUES[DIM])[:, None] & (w < VALUES[TOKENS] * VALUES[BITS] // 32)[None, :]
    return tl.load(codes + w[None, :] * VALUES[DIM] + d[:, None], mask=in_bounds, other=0)


@triton.jit
def value_scales(values, t0, limit, VALUES: tl.constexpr, TILE: tl.constexpr):
    """(scales, zeros) [TILE] of a tile with one group per token; zeros if ``t0`` is not below ``limit``."""
    _, scale, zero = values
    if VALUES[FOLD]:
        slots = code_slot(t0, VALUES) + tl.arange(0, TILE)
        in_bounds = (slots < VALUES[STRIDE]) & (t0 + tl.arange(0, 1) < limit)
        s = tl.load(scale + slots, mask=in_bounds, other=0.0)
        z = s if VALUES[ROTATION] != -1 else tl.load(zero + slots, mask=in_bounds, other=0.0)
    else:
        s, z = tl.zeros((1,), tl.float32), tl.zeros((1,), tl.float32)
    return s, z


@triton.jit
def about_zero(s, VALUES: tl.constexpr):
    """(scales, zero points) in float32 of rotated values."""
    s = decode_scale(s)
    return s, s * (-0.5 * ((1 << (VALUES[BITS] + VALUES[LOWER][BITS])) - 1))


@triton.jit
def plane_values(c, p, s, tokens, WEIGHT: tl.constexpr, VALUES: tl.constexpr):
    """sum_t p_t s_t c_t of a plane of fields ``c``, each of which counts 2**WEIGHT."""
    plane = tokens % (32 // VALUES[BITS]) // 4
    s = s * tl.exp2((-VALUES[BITS] * plane + WEIGHT).to(tl.float32))  # the factor of ``word_order``
    dtype: tl.constexpr = "fp32" if VALUES[MODEL] == "fp32" else "fp16"
    return product(c, to_word_order(rounded(p * s[:, None], dtype), VALUES), dtype)


@triton.jit
def folded_values(c, low, scales, p, t0, zone, VALUES: tl.constexpr, TILE: tl.constexpr, SINK_TOKENS: tl.constexpr):
    """``code_values`` of codes ``c`` that have one scale per token: the probabilities take the scales."""
    s, z = scales
    if VALUES[ROTATION] != -1:
        s, z = about_zero(s, VALUES)
    tokens = t0 + tl.arange(0, TILE)
    valid_tokens = in_zone(tokens, zone, SINK_TOKENS)
    s = tl.where(valid_tokens, s.to(tl.float32), 0.0)
    z = tl.where(valid_tokens, z.to(tl.float32), 0.0)
    from_zeros = p * z[:, None]
    s, undo = scaled_to_largest(s, tl.max(tl.abs(s), 0))
    unit: tl.constexpr = SUBNORMAL if VALUES[BITCAST] else 1.0
    out = plane_values(c, p, s, tokens, VALUES[LOWER][BITS], VALUES)
    if VALUES[LOWER][BITS] > 0:
        out += plane_values(low, p, s, tokens, 0, VALUES[LOWER])
    return out * (undo * unit), from_zeros


@triton.jit
def dequantized_values(
    c, scale, zero, p, t0, slot, zone, VALUES: tl.constexpr, TILE: tl.constexpr, SINK_TOKENS: tl.constexpr
):
    """``code_values`` of codes ``c``, each dequantized by the scale of its group."""
    place, factor = word_order(TILE, VALUES)
    tokens, d = t0 + place, tl.arange(0, VALUES[CHANNELS])
    in_bounds = (d < VALUES[DIM])[:, None] & in_zone(tokens, zone, SINK_TOKENS)[None, :]
    offsets = (d // VALUES[GROUP] * VALUES[STRIDE])[:, None] + (slot + place)[None, :]
    if VALUES[ROTATION] != -1:
        s, z = about_zero(tl.load(scale + offsets, mask=in_bounds, other=0), VALUES)
    else:
        s = tl.load(scale + offsets, mask=in_bounds, other=0.0).to(tl.float32)
        z = tl.load(zero + offsets, mask=in_bounds, other=0.0).to(tl.float32)
    unit: tl.constexpr = SUBNORMAL if VALUES[BITCAST] else 1.0
    v = c.to(tl.float32) * (factor * unit)[None, :] * s + z
    ps = to_word_order(rounded(p * LARGEST, VALUES[MODEL]), VALUES)
    return product(v, ps, VALUES[MODEL]) * (1.0 / LARGEST), tl.zeros((1, 1), tl.float32)


@triton.jit
def dequantized_low_values(
    c, scale, p, t0, slot, zone, VALUES: tl.constexpr, TILE: tl.constexpr, SINK_TOKENS: tl.constexpr
):
    """What the plane of lower fields adds to them; the upper ones count as codes that are so many times larger."""
    place, factor = word_order(TILE, VALUES)
    tokens, d = t0 + place, tl.arange(0, VALUES[CHANNELS])
    in_bounds = (d < VALUES[DIM])[:, None] & in_zone(tokens, zone, SINK_TOKENS)[None, :]
    offsets = (d // VALUES[GROUP] * VALUES[STRIDE])[:, None] + (slot + place)[None, :]
    if VALUES[ROTATION] != -1:
        s = decode_scale(tl.load(scale + offsets, mask=in_bounds, other=0))
    else:
        s = tl.load(scale + offsets, mask=in_bounds, other=0.0).to(tl.float32)
    unit: tl.constexpr = SUBNORMAL if VALUES[BITCAST] else 1.0
    v = c.to(tl.float32) * (factor * unit)[None, :] * s
    ps = to_word_order(rounded(p * LARGEST, VALUES[MODEL]), VALUES)
    return product(v, ps, VALUES[MODEL]) * (1.0 / LARGEST)


@triton.jit
def code_values(p, values, scales, t0, zone, VALUES: tl.constexpr, TILE: tl.constexpr, SINK_TOKENS: tl.constexpr):
    """sum_t p_t v_t of values in codes [CHANNELS, ROWS], and p_t z_t [TILE, ROWS], whose sum goes to every channel."""
    codes, scale, zero = values
    slot = code_slot(t0, VALUES)
    c = unpack(value_words(codes, slot, VALUES, TILE), VALUES)
    low = c
    if VALUES[LOWER][BITS] > 0:
        lower: tl.constexpr = VALUES[TOKENS] * VALUES[BITS] // 32 * VALUES[DIM]
        low = unpack(value_words(codes + lower, slot, VALUES[LOWER], TILE), VALUES[LOWER])
    if VALUES[FOLD]:
        return folded_values(c, low, scales, p, t0, zone, VALUES, TILE, SINK_TOKENS)
    elif VALUES[LOWER][BITS] > 0:
        c = c.to(tl.float32) * (1 << VALUES[LOWER][BITS])
        out, p_zeros = dequantized_values(c, scale, zero, p, t0, slot, zone, VALUES, TILE, SINK_TOKENS)
        low = dequantized_low_values(low, scale, p, t0, slot, zone, VALUES[LOWER], TILE, SINK_TOKENS)
        return out + low, p_zeros
    else:
        return dequantized_values(c, scale, zero, p, t0, slot, zone, VALUES, TILE, SINK_TOKENS)
