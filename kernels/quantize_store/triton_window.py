"""Tokens in full precision: a step's own, and those of the residual window.

``source`` is (x, ring, past): the step's tokens, which follow ``past`` older ones, and the ring that holds the latest.
Of keys that are divided by the norms of their tokens (``triton_ranks.py``), the norms are its fourth part,
and its fifth is after how many tokens they start over.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def source_of(
    x, ring, pos, head, NEW_TOKENS: tl.constexpr, DIM: tl.constexpr, RING: tl.constexpr, MAX_LEN: tl.constexpr
):
    """The ``source`` of one ``head`` of a batch row; ``past`` is within bounds, wherever the step was asked for."""
    past = tl.maximum(tl.minimum(tl.load(pos), MAX_LEN - NEW_TOKENS), 0).to(tl.int32)
    return x + head * (NEW_TOKENS * DIM), ring + head * (RING * DIM), past


@triton.jit
def turns_before(t0, WRAP: tl.constexpr):
    """Tokens from the slot of token ``t0`` to ``t0``, where codes start over after WRAP tokens (0: they do not).

    Whole groups of tokens stay together: a group's pointers are moved back by this many.
    """
    return t0 // WRAP * WRAP if WRAP > 0 else t0 * 0


@triton.jit
def write_step(
    source,
    pos,
    sink,
    head,
    first_token,
    d,
    valid_channels,
    NEW_TOKENS: tl.constexpr,
    NEW_TILE: tl.constexpr,
    DIM: tl.constexpr,
    RING: tl.constexpr,
    SINK_TOKENS: tl.constexpr,
):
    """Channels ``d`` of the new tokens of ``head`` into the ring and the sinks."""
    x, ring, past = source
    j = tl.arange(0, NEW_TILE)
    in_bounds = (j < NEW_TOKENS)[:, None] & valid_channels[None, :]
    tokens = tl.load(x + j[:, None] * DIM + d[None, :], mask=in_bounds, other=0.0).to(ring.dtype.element_ty)
    tl.store(ring + ((past + j) % RING)[:, None] * DIM + d[None, :], tokens, mask=in_bounds)
    if SINK_TOKENS > 0:
        slots = tl.load(pos + j, mask=j < NEW_TOKENS, other=0) - first_token
        is_sink = in_bounds & ((slots >= 0) & (slots < SINK_TOKENS))[:, None]
        rows = sink + head * ((SINK_TOKENS + 1) * DIM)
        tl.store(rows + slots[:, None] * DIM + d[None, :], tokens, mask=is_sink)


@triton.jit
def full_tokens(source, tokens, d, in_bounds, DIM: tl.constexpr, RING: tl.constexpr):
    """Full-precision ``tokens`` [tokens, channels] as float32: the step's own from ``x``, others from the ring."""
    x, ring, past = source[0], source[1], source[2]
    is_old = in_bounds & (tokens < past)[:, None]
    is_new = in_bounds & (tokens >= past)[:, None]
    old = tl.load(ring + (tokens % RING)[:, None] * DIM + d[None, :], mask=is_old, other=0.0)
    new = tl.load(x + (tokens - past)[:, None] * DIM + d[None, :], mask=is_new, other=0.0).to(ring.dtype.element_ty)
    return tl.where(is_old, old.to(tl.float32), new.to(tl.float32))
