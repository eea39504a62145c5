"""Quantizing the tokens of values that leave the residual window: one scale per token and group of channels.

``source`` is explained in ``triton_window.py``. Codes of BITS bits have a field of LOW bits, if it is not 0, in a plane
of their own at ``low_codes`` (``kernels/packing.py``).
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


@triton.jit
def value_slots(tokens, WRAP: tl.constexpr):
    """Slots of ``tokens`` where codes start over after WRAP tokens, which are whole words; 0: they do not."""
    return tokens % WRAP if WRAP > 0 else tokens


@triton.jit
def load_value_codes(codes, tokens, d, in_bounds, DIM: tl.constexpr, BITS: tl.constexpr):
    """Fields of BITS bits [tokens, channels] of values as float32."""
    words = tl.load(codes + (tokens // (32 // BITS))[:, None] * DIM + d[None, :], mask=in_bounds, other=0)
    return ((words >> code_shift(tokens, BITS)[:, None]) & ((1 << BITS) - 1)).to(tl.float32)


@triton.jit
def fit_values(
    x,
    codes,
    low_codes,
    tokens,
    d,
    in_bounds,
    DIM: tl.constexpr,
    GROUP: tl.constexpr,
    BITS: tl.constexpr,
    LOW: tl.constexpr,
):
    """Scale and zero point per token that fit values ``x`` [tokens, channels] to borrowed codes."""
    c = load_value_codes(codes, tokens, d, in_bounds, DIM, BITS - LOW)
    if LOW > 0:
        c = c * (1 << LOW) + load_value_codes(low_codes, tokens, d, in_bounds, DIM, LOW)
    n = tl.full(tokens.shape, GROUP, tl.float32)
    mean_x, mean_c = tl.div_rn(tl.sum(x, 1), n), tl.div_rn(tl.sum(tl.where(in_bounds, c, 0.0), 1), n)
    off_x = tl.where(in_bounds, x - mean_x[:, None], 0.0)
    off_c = tl.where(in_bounds, c - mean_c[:, None], 0.0)
    return fitted(tl.sum(off_c * off_x, 1), tl.sum(off_c * off_c, 1), mean_x, mean_c)


@triton.jit
def store_value_codes(
    codes,
    c,
    tokens,
    due,
    first_due,
    d,
    valid_channels,
    NEW_TOKENS: tl.constexpr,
    DIM: tl.constexpr,
    WRAP: tl.constexpr,
    BITS: tl.constexpr,
):
    """Put fields [tokens, channels] of the ``due`` among ``tokens``, which begin at ``first_due``, into their words.

    The tokens of a step are in few words, each of which is read, changed and written once.
    """
    per_word: tl.constexpr = 32 // BITS
    shift = code_shift(tokens, BITS)
    for w in tl.static_range((NEW_TOKENS - 1) // per_word + 2):
        word = tl.maximum(first_due, 0) // per_word + w
        in_word = due & (tokens // per_word == word)
        touched = valid_channels & ((word + tl.arange(0, 1)) * per_word < first_due + NEW_TOKENS)
        row = codes + (word % (WRAP // per_word) if WRAP > 0 else word) * DIM
        old = tl.load(row + d, mask=touched, other=0)
        cleared = tl.sum(tl.where(in_word, ((1 << BITS) - 1) << shift, 0), 0)
        bits = tl.sum(tl.where(in_word[:, None], c << shift[:, None], 0), 0)
        tl.store(row + d, (old & ~cleared) | bits, mask=touched)


@triton.jit
def store_value_planes(
    codes,
    low_codes,
    c,
    tokens,
    due,
    first_due,
    d,
    valid_channels,
    NEW_TOKENS: tl.constexpr,
    DIM: tl.constexpr,
    WRAP: tl.constexpr,
    BITS: tl.constexpr,
    LOW: tl.constexpr,
):
    """The same of codes, plane by plane."""
    if LOW > 0:
        low = c & ((1 << LOW) - 1)
        store_value_codes(low_codes, low, tokens, due, first_due, d, valid_channels, NEW_TOKENS, DIM, WRAP, LOW)
        c = c >> LOW
    store_value_codes(codes, c, tokens, due, first_due, d, valid_channels, NEW_TOKENS, DIM, WRAP, BITS - LOW)


@triton.jit
def leaving_tokens(past, NEW_TOKENS: tl.constexpr, NEW_TILE: tl.constexpr, RESIDUAL: tl.constexpr):
    """(tokens, which of them a step pushes out of the window): NEW_TILE of them, 0 for those that it does not."""
    j = tl.arange(0, NEW_TILE)
    tokens = past - RESIDUAL + j
    due = (j < NEW_TOKENS) & (tokens >= 0)
    return tl.where(due, tokens, 0), due


@triton.jit
def flush_values(
    source,
    codes,
    low_codes,
    scale,
    zero,
    d,
    valid_channels,
    NEW_TOKENS: tl.constexpr,
    NEW_TILE: tl.constexpr,
    DIM: tl.constexpr,
    RING: tl.constexpr,
    RESIDUAL: tl.constexpr,
    GROUP: tl.constexpr,
    WRAP: tl.constexpr,
    BITS: tl.constexpr,
    LOW: tl.constexpr,
    ETA: tl.constexpr,
    FIT: tl.constexpr,
):
    """Quantize channels ``d``, one group, of each token that leaves the window, or make scales for their codes."""
    _, _, past = source
    tokens, due = leaving_tokens(past, NEW_TOKENS, NEW_TILE, RESIDUAL)
    in_bounds = due[:, None] & valid_channels[None, :]
    x = full_tokens(source, tokens, d, in_bounds, DIM, RING)
    slots = value_slots(tokens, WRAP)
    if FIT == "least_squares":
        s, z = fit_values(x, codes, low_codes, slots, d, in_bounds, DIM, GROUP, BITS, LOW)
    else:
        low = tl.full((NEW_TILE,), float("inf"), tl.float32)
        low, high = range_of(x, in_bounds, low, tl.full((NEW_TILE,), float("-inf"), tl.float32), 1)
        low, step = step_of_range(low, high, BITS)
        s, z = relaxed(low, step, BITS, ETA)
    store_scales(scale, zero, slots, s, z, due)
    if FIT == "own":
        c = tl.where(in_bounds, encode(x, low[:, None], step[:, None], BITS), 0)
        store_value_planes(
            codes, low_codes, c, tokens, due, past - RESIDUAL, d, valid_channels, NEW_TOKENS, DIM, WRAP, BITS, LOW
        )
