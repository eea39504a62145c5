"""Quantizing a group of tokens of keys: one scale per channel.

A group that is not complete is not touched. Tokens before ``first_valid`` are padding or attention sinks:
they take no part in ranges and fits. ``source`` is explained in ``triton_window.py``. Codes of BITS bits have a field
of LOW bits, if it is not 0, in a plane of their own at ``low_codes`` (``kernels/packing.py``).
"""

from __future__ import annotations

import triton
import triton.language as tl

from xquant_fx.kernels.quantize_store.triton_quantizer import (
    code_shift,
    encode,
    fitted,
    range_of,
    relaxed,
    step_of_range,
    store_scales,
)
from xquant_fx.kernels.quantize_store.triton_window import full_tokens
from xquant_fx.kernels.triton_small_floats import decode_scale


@triton.jit
def load_key_codes(codes, tokens, d, in_bounds, BITS: tl.constexpr, TOKENS: tl.constexpr):
    """Fields of BITS bits [tokens, channels] of keys as float32."""
    words = tl.load(codes + (d // (32 // BITS))[None, :] * TOKENS + tokens[:, None], mask=in_bounds, other=0)
    return ((words >> code_shift(d, BITS)[None, :]) & ((1 << BITS) - 1)).to(tl.float32)


@triton.jit
def load_key_planes(
    codes, low_codes, tokens, d, in_bounds, BITS: tl.constexpr, LOW: tl.constexpr, TOKENS: tl.constexpr
):
    """Codes of both planes."""
    c = load_key_codes(codes, tokens, d, in_bounds, BITS - LOW, TOKENS)
    if LOW > 0:
        c = c * (1 << LOW) + load_key_codes(low_codes, tokens, d, in_bounds, LOW, TOKENS)
    return c


@triton.jit
def store_key_codes(
    codes, shifted, tokens, d0, valid_tokens, BITS: tl.constexpr, DIM: tl.constexpr, TOKENS: tl.constexpr
):
    """Put fields [tokens, channels], each at its place in a word, together and store the words."""
    per_word: tl.constexpr = 32 // BITS
    count: tl.constexpr = shifted.shape[1] // per_word
    words = tl.sum(tl.reshape(shifted, (shifted.shape[0], count, per_word)), 2)
    w = d0 // per_word + tl.arange(0, count)
    in_bounds = valid_tokens[:, None] & (w < (DIM + per_word - 1) // per_word)[None, :]
    tl.store(codes + w[None, :] * TOKENS + tokens[:, None], words, mask=in_bounds)


@triton.jit
def tile_of_group(source, i, t0, d, DIM: tl.constexpr, RING: tl.constexpr, GROUP: tl.constexpr, TILE: tl.constexpr):
    """(tokens, where they lie within the group and the head, keys) of TILE tokens from the ``i``-th of a group on."""
    j = i + tl.arange(0, TILE)
    in_bounds = (j < GROUP)[:, None] & (d < DIM)[None, :]
    x = full_tokens(source, t0 + j, d, in_bounds, DIM, RING)
    if len(source) > 3:  # keys are divided by norms
        norm = tl.where(
            j < GROUP, decode_scale(tl.load(source[3] + (t0 + j) % source[4], mask=j < GROUP, other=0)), 1.0
        )
        x = tl.div_rn(x, tl.broadcast_to(norm[:, None], x.shape))
    return t0 + j, in_bounds, x


@triton.jit
def range_of_keys(
    source, first_valid, t0, d, DIM: tl.constexpr, RING: tl.constexpr, GROUP: tl.constexpr, TILE: tl.constexpr
):
    """(low, high) per channel ``d`` of the group of tokens at ``t0``."""
    low = tl.full(d.shape, float("inf"), tl.float32)
    high = tl.full(d.shape, float("-inf"), tl.float32)
    for i in range(0, GROUP, TILE):
        tokens, in_bounds, x = tile_of_group(source, i, t0, d, DIM, RING, GROUP, TILE)
        low, high = range_of(x, in_bounds & (tokens >= first_valid)[:, None], low, high, 0)
    return low, high


@triton.jit
def encode_keys(
    source,
    codes,
    low_codes,
    low,
    step,
    t0,
    d0,
    DIM: tl.constexpr,
    RING: tl.constexpr,
    GROUP: tl.constexpr,
    TILE: tl.constexpr,
    BITS: tl.constexpr,
    LOW: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """Write the codes of the group of tokens at ``t0``, channels from ``d0`` on."""
    d = d0 + tl.arange(0, low.shape[0])
    for i in range(0, GROUP, TILE):
        tokens, in_bounds, x = tile_of_group(source, i, t0, d, DIM, RING, GROUP, TILE)
        c = tl.where(in_bounds, encode(x, low[None, :], step[None, :], BITS), 0)
        in_group = i + tl.arange(0, TILE) < GROUP
        if LOW > 0:
            low_fields = (c & ((1 << LOW) - 1)) << code_shift(d, LOW)[None, :]
            store_key_codes(low_codes, low_fields, tokens, d0, in_group, LOW, DIM, TOKENS)
            c = c >> LOW
        HIGH: tl.constexpr = BITS - LOW
        store_key_codes(codes, c << code_shift(d, HIGH)[None, :], tokens, d0, in_group, HIGH, DIM, TOKENS)


@triton.jit
def key_means(
    source,
    codes,
    low_codes,
    first_valid,
    t0,
    d,
    DIM: tl.constexpr,
    RING: tl.constexpr,
    GROUP: tl.constexpr,
    TILE: tl.constexpr,
    BITS: tl.constexpr,
    LOW: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """(mean of keys, mean of codes) per channel ``d`` over the valid tokens of the group at ``t0``."""
    sum_x, sum_c, count = tl.zeros(d.shape, tl.float32), tl.zeros(d.shape, tl.float32), tl.zeros(d.shape, tl.float32)
    for i in range(0, GROUP, TILE):
        tokens, in_bounds, x = tile_of_group(source, i, t0, d, DIM, RING, GROUP, TILE)
        valid = in_bounds & (tokens >= first_valid)[:, None]
        c = load_key_planes(codes, low_codes, tokens, d, in_bounds, BITS, LOW, TOKENS)
        sum_x += tl.sum(tl.where(valid, x, 0.0), 0)
        sum_c += tl.sum(tl.where(valid, c, 0.0), 0)
        count += tl.sum(valid.to(tl.float32), 0)
    count = tl.maximum(count, 1.0)
    return tl.div_rn(sum_x, count), tl.div_rn(sum_c, count)


@triton.jit
def fit_keys(
    source,
    codes,
    low_codes,
    first_valid,
    t0,
    d,
    DIM: tl.constexpr,
    RING: tl.constexpr,
    GROUP: tl.constexpr,
    TILE: tl.constexpr,
    BITS: tl.constexpr,
    LOW: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """Scale and zero point per channel ``d`` that fit the group of tokens at ``t0`` to borrowed codes."""
    mean_x, mean_c = key_means(source, codes, low_codes, first_valid, t0, d, DIM, RING, GROUP, TILE, BITS, LOW, TOKENS)
    cov, var = tl.zeros(d.shape, tl.float32), tl.zeros(d.shape, tl.float32)
    for i in range(0, GROUP, TILE):
        tokens, in_bounds, x = tile_of_group(source, i, t0, d, DIM, RING, GROUP, TILE)
        valid = in_bounds & (tokens >= first_valid)[:, None]
        c = load_key_planes(codes, low_codes, tokens, d, in_bounds, BITS, LOW, TOKENS)
        off_x = tl.where(valid, x - mean_x[None, :], 0.0)
        off_c = tl.where(valid, c - mean_c[None, :], 0.0)
        cov += tl.sum(off_c * off_x, 0)
        var += tl.sum(off_c * off_c, 0)
    return fitted(cov, var, mean_x, mean_c)


@triton.jit
def flush_keys(
    source,
    codes,
    low_codes,
    scale,
    zero,
    first_valid,
    t0,
    d0,
    DIM: tl.constexpr,
    RING: tl.constexpr,
    GROUP: tl.constexpr,
    TILE: tl.constexpr,
    CHUNK: tl.constexpr,
    BITS: tl.constexpr,
    LOW: tl.constexpr,
    TOKENS: tl.constexpr,
    ETA: tl.constexpr,
    FIT: tl.constexpr,
):
    """Quantize CHUNK channels from ``d0`` on of the group of tokens at ``t0``, or make scales for their codes."""
    d = d0 + tl.arange(0, CHUNK)
    if FIT == "least_squares":
        s, z = fit_keys(source, codes, low_codes, first_valid, t0, d, DIM, RING, GROUP, TILE, BITS, LOW, TOKENS)
    else:
        low, high = range_of_keys(source, first_valid, t0, d, DIM, RING, GROUP, TILE)
        low, step = step_of_range(low, high, BITS)
        if FIT == "own":
            encode_keys(source, codes, low_codes, low, step, t0, d0, DIM, RING, GROUP, TILE, BITS, LOW, TOKENS)
        s, z = relaxed(low, step, BITS, ETA)
    store_scales(scale, zero, t0 // GROUP * DIM + d, s, z, d < DIM)
