"""The zones that tokens are stored in (``kernels/layout.py``), each a loop over tiles of tokens.

    attend_codes       keys and values in codes, divided over the first SPLITS programs
    attend_mixed       keys in codes and values in the residual window, in the next program
    attend_late_keys   values in codes and keys in the residual window, in that program, too
    attend_window      both in the residual window, in the last program, as all that follows
    attend_new_tokens  a chunk's own tokens: more than the window takes, so that the step brings them
    attend_sinks       the first tokens, kept in full precision
    attend_unwritten   up to ``MAX_LEN`` are tokens not written yet, which read as zero and count in the softmax as
                       far as the mask lets them: only the mask is read, by all programs

A chunk's query rows alone keep a GPU busy, so that the last split of its codes goes on to the other zones.

Each takes and returns sums = (top, total, acc); ``triton_softmax.py`` explains these, ``view`` and ``zone``.
``full`` and ``residual`` are (keys, values) in full precision, RINGS the tokens that the windows of both have room for,
and TILES is (tokens of a tile, tiles in flight at a time). A program that is not ``active`` leaves a zone to others:
its loop ends where it starts. Keep it so: with an end of 0 in ``attend_window``, Triton 3.9 takes 210 registers a
thread in the place of 166 (sm_90, head_dim 128).
"""

from __future__ import annotations

import triton
import triton.language as tl

from xquant_fx.kernels.decode_attention.triton_codes import (
    code_logits,
    code_values,
    key_scales,
    key_words,
    value_scales,
)
from xquant_fx.kernels.decode_attention.triton_products import full_values, product
from xquant_fx.kernels.decode_attention.triton_softmax import (
    MASK,
    SINKS,
    SM_SCALE,
    finish_logits,
    in_zone,
    load_mask,
    online_softmax_step,
    unwritten_sums,
)
from xquant_fx.kernels.decode_attention.triton_unpack import CHANNELS, DIM, MODEL


@triton.jit
def attend_codes(
    q,
    keys,
    values,
    view,
    zone,
    split_range,
    KEYS: tl.constexpr,
    VALUES: tl.constexpr,
    LOGITS: tl.constexpr,
    TILE: tl.constexpr,
    STAGES: tl.constexpr,
):
    """The part of ``split_range`` = (low, high) of the tokens whose keys and values are in codes: their sums.

    Codes are loaded ahead by the compiler's pipelining, which leaves small loads alone: those of scales and mask
    are carried from one tile to the next. Sums over tokens are kept per token of the tile until the end.
    """
    mask_rows, positions = view
    low, high = split_range
    rows: tl.constexpr = positions.shape[0]
    top = tl.full((rows,), float("-inf"), tl.float32)
    acc = tl.zeros((VALUES[CHANNELS], rows), tl.float32)
    for_keys = key_scales(keys, low, high, KEYS, TILE)
    for_values = value_scales(values, low, high, VALUES, TILE)
    tokens = low + tl.arange(0, TILE)
    bias = load_mask(mask_rows, tokens, tokens < high, LOGITS[MASK])
    totals = tl.zeros((TILE, rows), tl.float32)
    from_zeros = tl.zeros((TILE, rows), tl.float32)
    for t0 in tl.range(low, high, TILE, num_stages=STAGES):
        next_tokens = t0 + TILE + tl.arange(0, TILE)
        next_for_keys = key_scales(keys, t0 + TILE, high, KEYS, TILE)
        next_for_values = value_scales(values, t0 + TILE, high, VALUES, TILE)
        next_bias = load_mask(mask_rows, next_tokens, next_tokens < high, LOGITS[MASK])
        tokens = t0 + tl.arange(0, TILE)
        valid_tokens = in_zone(tokens, zone, LOGITS[SINKS])
        words = key_words(keys, t0, KEYS, TILE)
        logits = code_logits(q, words, keys, for_keys, tokens, valid_tokens, LOGITS[SM_SCALE], KEYS)
        logits = finish_logits(logits, bias, tokens, valid_tokens, positions, LOGITS)
        p, alpha, top = online_softmax_step(logits, top)
        out, p_zeros = code_values(p, values, for_values, t0, zone, VALUES, TILE, LOGITS[SINKS])
        acc = acc * alpha[None, :] + out
        totals = totals * alpha[None, :] + p
        from_zeros = from_zeros * alpha[None, :] + p_zeros
        for_keys, for_values, bias = next_for_keys, next_for_values, next_bias
    return top, tl.sum(totals, 0), acc + tl.sum(from_zeros, 0)[None, :]


@triton.jit
def attend_mixed(
    q,
    keys,
    residual,
    view,
    zone,
    active,
    sums,
    KEYS: tl.constexpr,
    VALUES: tl.constexpr,
    LOGITS: tl.constexpr,
    RINGS: tl.constexpr,
    TILES: tl.constexpr,
):
    """Tokens of ``zone``, whose keys are in codes and whose values are in the residual window."""
    mask_rows, positions = view
    top, total, acc = sums
    low, high, _ = zone
    _, v_ring = residual
    TILE: tl.constexpr = TILES[0]
    begin = low // TILE * TILE  # a tile of codes lies in one group, here too
    for t0 in tl.range(begin, tl.where(active, high, begin), TILE, num_stages=TILES[1]):
        tokens = t0 + tl.arange(0, TILE)
        valid_tokens = in_zone(tokens, zone, LOGITS[SINKS])
        words = key_words(keys, t0, KEYS, TILE)
        for_keys = key_scales(keys, t0, high, KEYS, TILE)
        logits = code_logits(q, words, keys, for_keys, tokens, valid_tokens, LOGITS[SM_SCALE], KEYS)
        bias = load_mask(mask_rows, tokens, valid_tokens, LOGITS[MASK])
        logits = finish_logits(logits, bias, tokens, valid_tokens, positions, LOGITS)
        p, alpha, top = online_softmax_step(logits, top)
        total = total * alpha + tl.sum(p, 0)
        acc = acc * alpha[None, :] + full_values(v_ring, tokens % RINGS[1], valid_tokens, p, acc.shape[0], VALUES)
    return top, total, acc


@triton.jit
def attend_late_keys(
    q,
    values,
    residual,
    view,
    zone,
    active,
    sums,
    KEYS: tl.constexpr,
    VALUES: tl.constexpr,
    LOGITS: tl.constexpr,
    RINGS: tl.constexpr,
    TILES: tl.constexpr,
):
    """Tokens of ``zone``, whose values are in codes and whose keys are in the residual window."""
    mask_rows, positions = view
    top, total, acc = sums
    low, high, _ = zone
    k_ring, _ = residual
    TILE: tl.constexpr = TILES[0]
    begin = low // TILE * TILE  # whole words of values
    for t0 in tl.range(begin, tl.where(active, high, begin), TILE, num_stages=TILES[1]):
        tokens = t0 + tl.arange(0, TILE)
        valid_tokens = in_zone(tokens, zone, LOGITS[SINKS])
        for_values = value_scales(values, t0, high, VALUES, TILE)
        logits = full_logits(q, k_ring, tokens % RINGS[0], valid_tokens, KEYS, LOGITS[SM_SCALE])
        bias = load_mask(mask_rows, tokens, valid_tokens, LOGITS[MASK])
        logits = finish_logits(logits, bias, tokens, valid_tokens, positions, LOGITS)
        p, alpha, top = online_softmax_step(logits, top)
        out, p_zeros = code_values(p, values, for_values, t0, zone, VALUES, TILE, LOGITS[SINKS])
        total = total * alpha + tl.sum(p, 0)
        acc = acc * alpha[None, :] + out + tl.sum(p_zeros, 0)[None, :]
    return top, total, acc


@triton.jit
def full_logits(q, keys, slots, valid_tokens, KEYS: tl.constexpr, SCALE: tl.constexpr):
    """Scaled logits [tokens, ROWS] of keys in full precision, which are in rows ``slots`` of ``keys``."""
    d = tl.arange(0, q.shape[0])
    in_bounds = valid_tokens[:, None] & (d < KEYS[DIM])[None, :]
    k = tl.load(keys + slots[:, None] * KEYS[DIM] + d[None, :], mask=in_bounds, other=0.0)
    return product(k, q, KEYS[MODEL]) * SCALE


@triton.jit
def attend_rows(
    q,
    full,
    slots,
    tokens,
    valid_tokens,
    view,
    sums,
    KEYS: tl.constexpr,
    VALUES: tl.constexpr,
    LOGITS: tl.constexpr,
):
    """A tile of ``tokens`` whose keys and values are in the rows ``slots`` = (keys, values) of ``full``."""
    keys, values = full
    k_slots, v_slots = slots
    mask_rows, positions = view
    top, total, acc = sums
    bias = load_mask(mask_rows, tokens, valid_tokens, LOGITS[MASK])
    logits = full_logits(q, keys, k_slots, valid_tokens, KEYS, LOGITS[SM_SCALE])
    logits = finish_logits(logits, bias, tokens, valid_tokens, positions, LOGITS)
    p, alpha, top = online_softmax_step(logits, top)
    acc = acc * alpha[None, :] + full_values(values, v_slots, valid_tokens, p, acc.shape[0], VALUES)
    return top, total * alpha + tl.sum(p, 0), acc


@triton.jit
def attend_window(
    q,
    full,
    view,
    zone,
    active,
    sums,
    KEYS: tl.constexpr,
    VALUES: tl.constexpr,
    LOGITS: tl.constexpr,
    RINGS: tl.constexpr,
    TILES: tl.constexpr,
):
    """Tokens of ``zone``, whose keys and values are in the residual window."""
    low, high, _ = zone
    TILE: tl.constexpr = TILES[0]
    for t0 in tl.range(low, tl.where(active, high, low), TILE, num_stages=TILES[1]):
        tokens = t0 + tl.arange(0, TILE)
        valid_tokens = in_zone(tokens, zone, LOGITS[SINKS])
        slots = tokens % RINGS[0], tokens % RINGS[1]
        sums = attend_rows(q, full, slots, tokens, valid_tokens, view, sums, KEYS, VALUES, LOGITS)
    return sums


@triton.jit
def attend_new_tokens(
    q,
    full,
    view,
    zone,
    active,
    sums,
    KEYS: tl.constexpr,
    VALUES: tl.constexpr,
    LOGITS: tl.constexpr,
    NEW_TOKENS: tl.constexpr,
    TILES: tl.constexpr,
):
    """A chunk's own NEW_TOKENS tokens, which are those of ``zone``."""
    past, _, _ = zone
    TILE: tl.constexpr = TILES[0]
    for slot in tl.range(0, tl.where(active, NEW_TOKENS, 0), TILE, num_stages=TILES[1]):
        slots = slot + tl.arange(0, TILE)
        tokens = past + slots
        valid_tokens = in_zone(tokens, zone, LOGITS[SINKS])
        sums = attend_rows(q, full, (slots, slots), tokens, valid_tokens, view, sums, KEYS, VALUES, LOGITS)
    return sums


@triton.jit
def attend_sinks(
    q,
    full,
    view,
    zone,
    active,
    sums,
    KEYS: tl.constexpr,
    VALUES: tl.constexpr,
    LOGITS: tl.constexpr,
    TILES: tl.constexpr,
):
    """The attention sinks, which are kept in full precision for good; those of ``zone`` are written already."""
    first_sink, stored, _ = zone
    TILE: tl.constexpr = TILES[0]
    for slot in tl.range(0, tl.where(active, LOGITS[SINKS], 0), TILE, num_stages=TILES[1]):
        slots = slot + tl.arange(0, TILE)
        tokens = first_sink + slots
        valid_tokens = (slots < LOGITS[SINKS]) & (tokens < stored)
        sums = attend_rows(q, full, (slots, slots), tokens, valid_tokens, view, sums, KEYS, VALUES, LOGITS)
    return sums


@triton.jit
def attend_unwritten(
    mask_rows,
    stored,
    split,
    sums,
    LOGITS: tl.constexpr,
    MAX_LEN: tl.constexpr,
    PARTS: tl.constexpr,
    TAIL: tl.constexpr,
):
    """Tokens from ``stored`` to MAX_LEN, not written yet: keys and values of zero, to which a mask may add."""
    top, total, acc = sums
    unwritten = tl.maximum(MAX_LEN - stored, 0)
    if LOGITS[MASK] == "none":  # each has logit 0, and the last program counts them
        count = tl.where(split == PARTS - 1, unwritten, 0).to(tl.float32)
        tail_top = tl.where(count > 0, tl.zeros(top.shape, tl.float32), float("-inf"))
        tail_total = tl.zeros(top.shape, tl.float32) + count
    else:
        share = tl.cdiv(tl.cdiv(unwritten, PARTS), TAIL) * TAIL
        low = stored + split * share
        tail_top, tail_total = unwritten_sums(mask_rows, low, tl.minimum(low + share, MAX_LEN), LOGITS[MASK], TAIL)
    new_top = tl.maximum(top, tail_top)
    base = tl.where(new_top == float("-inf"), 0.0, new_top)
    alpha = tl.exp(top - base)
    return new_top, total * alpha + tail_total * tl.exp(tail_top - base), acc * alpha[None, :]
