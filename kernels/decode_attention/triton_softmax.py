"""From logits to weights: softcap, sliding window, mask, and the online softmax.

Logits are [tokens, ROWS]; a row is one query token of one query head. What a row may attend to is
known from ``view`` = (mask rows, positions), what belongs to a tile from ``zone`` = (low, high, first
sink). Sums over tokens are (top, total, acc): the largest logit of each row, the sum of the
exponentials above it, and the sum of values with these weights, [channels, ROWS].
"""

from __future__ import annotations

import triton
import triton.language as tl

# What a kernel knows of its logits before it runs is one tuple, LOGITS, and these are the places in it (see
# ``triton_codes.py`` on why it has no names).
SM_SCALE = tl.constexpr(0)
SOFTCAP = tl.constexpr(1)  # 0.0: none
WINDOW = tl.constexpr(2)  # tokens that a row sees, itself included; 0: all
MASK = tl.constexpr(3)  # "none", "bool" (True attends) or "float" (is added)
SINKS = tl.constexpr(4)  # first tokens that are kept in full precision


@triton.jit
def tanh(x):
    """Accurate to some float32 roundings, relative to the result, from arithmetic that every target has."""
    x2 = x * x
    small = x * (1 + x2 * (-1 / 3 + x2 * (2 / 15 + x2 * (-17 / 315 + x2 * (62 / 2835)))))
    large = 1 - 2 / (tl.exp(2 * tl.abs(x)) + 1)
    return tl.where(tl.abs(x) < 0.3, small, tl.where(x < 0, -large, large))


@triton.jit
def load_mask(mask_rows, tokens, in_bounds, MASK_KIND: tl.constexpr):
    """The mask [tokens, ROWS or 1], as it is; nothing of use without one."""
    if MASK_KIND == "none":
        return tl.zeros((1, 1), tl.int1)
    else:
        return tl.load(mask_rows[None, :] + tokens[:, None], mask=in_bounds[:, None], other=0)


@triton.jit
def add_mask(logits, bias, visible, MASK_KIND: tl.constexpr):
    """Logits [tokens, ROWS] with the mask on them; -inf where ``visible`` [tokens, ROWS or 1] is false."""
    if MASK_KIND == "bool":
        visible = visible & bias.to(tl.int1)
    elif MASK_KIND == "float":
        logits += bias.to(tl.float32)
    return tl.where(visible, logits, float("-inf"))


@triton.jit
def finish_logits(logits, bias, tokens, valid_tokens, positions, LOGITS: tl.constexpr):
    """Softcap, sliding window and mask. ``valid_tokens`` [tokens] says which tokens belong to this tile."""
    if LOGITS[SOFTCAP] != 0.0:
        logits = LOGITS[SOFTCAP] * tanh(logits * (1.0 / LOGITS[SOFTCAP]))
    visible = valid_tokens[:, None]
    if LOGITS[WINDOW] > 0:
        visible = visible & (tokens[:, None] > positions[None, :] - LOGITS[WINDOW])
    return add_mask(logits, bias, visible, LOGITS[MASK])


@triton.jit
def online_softmax_step(logits, top):
    """(p, factor for what was summed so far, new top)."""
    new_top = tl.maximum(top, tl.max(logits, 0))
    base = tl.where(new_top == float("-inf"), 0.0, new_top)
    return tl.exp(logits - base[None, :]), tl.exp(top - base), new_top


@triton.jit
def in_zone(tokens, zone, SINK_TOKENS: tl.constexpr):
    """Which ``tokens`` belong to ``zone``, from low to below high: sinks belong to a zone of their own."""
    low, high, first_sink = zone
    valid_tokens = (tokens >= low) & (tokens < high)
    if SINK_TOKENS > 0:
        valid_tokens = valid_tokens & ((tokens < first_sink) | (tokens >= first_sink + SINK_TOKENS))
    return valid_tokens


@triton.jit
def unwritten_sums(mask_rows, low, high, MASK_KIND: tl.constexpr, TAIL: tl.constexpr):
    """(top, total) of the logits of tokens [low, high), whose keys are zero: that of the mask alone."""
    top = tl.full(mask_rows.shape, float("-inf"), tl.float32)
    total = tl.zeros(mask_rows.shape, tl.float32)
    for t0 in tl.range(low, high, TAIL):
        tokens = t0 + tl.arange(0, TAIL)
        bias = load_mask(mask_rows, tokens, tokens < high, MASK_KIND)
        logits = tl.zeros((TAIL, mask_rows.shape[0]), tl.float32)
        logits = add_mask(logits, bias, (tokens < high)[:, None], MASK_KIND)
        p, alpha, top = online_softmax_step(logits, top)
        total = total * alpha + tl.sum(p, 0)
    return top, total
