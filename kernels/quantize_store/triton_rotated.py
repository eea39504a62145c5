"""Appending values that are rotated before they are quantized (``schemes/per_token_rotated.py``), or come rotated.

A program has a batch row, a head and a group of channels. It rotates whole tokens, few as they are, and quantizes its
own channels of them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from xquant_fx.kernels.quantize_store.triton_kernels import begin_step
from xquant_fx.kernels.quantize_store.triton_values import leaving_tokens, store_value_planes, value_slots
from xquant_fx.kernels.quantize_store.triton_window import full_tokens, write_step
from xquant_fx.kernels.triton_rotation import rotate
from xquant_fx.kernels.triton_small_floats import encode_scale


@triton.jit
def encode_about_zero(y, mine, GROUP: tl.constexpr, BITS: tl.constexpr, STEP: tl.constexpr):
    """(codes, scale) of the channels ``mine`` of rotated tokens ``y`` [tokens, channels], by a scale without bias."""
    n: tl.constexpr = (1 << BITS) - 1
    square = tl.sum(tl.where(mine, y * y, 0.0), 1)
    step = STEP * tl.sqrt_rn(tl.div_rn(square, tl.full(square.shape, GROUP, tl.float32)))
    step = tl.where(step > 0, step, 1.0)
    exact = tl.floor(tl.div_rn(y, step[:, None] + tl.zeros(y.shape, tl.float32)) + (n + 1) * 0.5)
    c = tl.minimum(tl.maximum(tl.where(mine & (exact == exact), exact, 0.0), 0.0), n * 1.0)
    aligned = tl.sum(tl.where(mine, y * (c - n * 0.5), 0.0), 1)
    return c.to(tl.int32), tl.where(square == 0, 0.0, tl.div_rn(square, tl.where(square == 0, 1.0, aligned)))


@triton.jit
def flush_rotated(
    source,
    codes,
    low_codes,
    scale,
    d,
    in_group,
    NEW_TOKENS: tl.constexpr,
    NEW_TILE: tl.constexpr,
    DIM: tl.constexpr,
    RING: tl.constexpr,
    RESIDUAL: tl.constexpr,
    GROUP: tl.constexpr,
    WRAP: tl.constexpr,
    BITS: tl.constexpr,
    LOW: tl.constexpr,
    STEP: tl.constexpr,
    LEVELS: tl.constexpr,
):
    """Quantize channels ``in_group`` of each token that leaves the window."""
    _, _, past = source
    tokens, due = leaving_tokens(past, NEW_TOKENS, NEW_TILE, RESIDUAL)
    v = full_tokens(source, tokens, d, due[:, None] & (d < DIM)[None, :], DIM, RING)
    y = v.to(tl.float32)
    if LEVELS >= 0:  # else it came rotated
        y = tl.trans(rotate(tl.trans(v), LEVELS))
    c, s = encode_about_zero(y, due[:, None] & in_group[None, :], GROUP, BITS, STEP)
    tl.store(scale + value_slots(tokens, WRAP), encode_scale(s, scale.dtype.element_ty), mask=due)
    store_value_planes(codes, low_codes, c, tokens, due, past - RESIDUAL, d, in_group, NEW_TOKENS, DIM, WRAP, BITS, LOW)


@triton.jit
def append_rotated(
    program, x, pos, codes, scale, ring, sink, start, length, fault,
    HEADS: tl.constexpr, NEW_TOKENS: tl.constexpr, NEW_TILE: tl.constexpr, DIM: tl.constexpr, RING: tl.constexpr,
    SINK_TOKENS: tl.constexpr, RESIDUAL: tl.constexpr, GROUP: tl.constexpr, MAX_LEN: tl.constexpr,
    WRAP: tl.constexpr, RAGGED: tl.constexpr, BITS: tl.constexpr, LOW: tl.constexpr, STEP: tl.constexpr,
    LEVELS: tl.constexpr, WORDS: tl.constexpr, STRIDE: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """A program has a batch row and head, and a group of channels: it quantizes each token that leaves the window."""
    row, group = program // (DIM // GROUP), program % (DIM // GROUP)
    head, first_token, pos, source = begin_step(
        program, row, x, ring, pos, start, length, fault,
        DIM // GROUP, HEADS, NEW_TOKENS, NEW_TILE, DIM, RING, RESIDUAL, MAX_LEN, RAGGED,
    )  # fmt: skip
    codes += head * (WORDS * DIM)
    scale += (head * (DIM // GROUP) + group) * STRIDE
    d = tl.arange(0, CHANNELS)
    in_group = d // GROUP == group
    write_step(source, pos, sink, head, first_token, d, in_group, NEW_TOKENS, NEW_TILE, DIM, RING, SINK_TOKENS)
    flush_rotated(
        source, codes, codes + STRIDE * (BITS - LOW) // 32 * DIM, scale, d, in_group,
        NEW_TOKENS, NEW_TILE, DIM, RING, RESIDUAL, GROUP, WRAP, BITS, LOW, STEP, LEVELS,
    )  # fmt: skip
