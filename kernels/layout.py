"""The ring of full-precision tokens, which every scheme keeps.

Token t of a sequence sits in ring slot ``t % ring_tokens`` until that slot is needed again. What is quantized at
which length is the scheme's affair (``kernels/schemes``); its limit is that *before* the step: a step attends first
and flushes afterwards. The rings hold ``rollback_tokens`` more than the residual length, STEP_TOKENS at least, so that
after a store of up to STEP_TOKENS tokens every token that was in full precision before the step still is, and load may
come after store; and so that as many tokens can be rolled back exactly.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

#: How many new tokens one decode step may bring and still find every token that was in full
#: precision before the step: what the rings hold at least beyond ``residual_length``.
STEP_TOKENS = 8

#: Where codes start over in a storage that holds a sliding window alone, token t sits in slot t modulo a multiple of
#: this: a tile or a word of codes never lies across the end.
WRAP_TOKENS = 128
#: Tokens before the first one that is seen, which kernels may read with it: they begin at whole words.
WORD_TOKENS = 32


def wrap_tokens(tokens: int, unit: int) -> int:
    """Room for ``tokens`` where codes may start over, which units of ``unit`` tokens divide."""
    step = math.lcm(WRAP_TOKENS, unit)
    return math.ceil(tokens / step) * step


def code_slots(tokens: Tensor, end: Tensor, wrap: int, spare: int) -> Tensor:
    """Slots of codes that start over after ``wrap`` tokens, when those before ``end`` are quantized.

    Tokens that are not, and those that later ones of the same chunk overwrite, go to ``spare`` slots behind the last.
    """
    kept = (tokens < end) & (tokens >= end - wrap)
    return torch.where(kept, tokens % wrap, wrap + tokens % spare)


def ring_slots(tokens: Tensor, ring: Tensor) -> Tensor:
    """Ring slots of ``tokens``; negative tokens map to some slot, whose content is not used."""
    return tokens % ring.shape[2]


def full_precision(x: Tensor, ring: Tensor, tokens: Tensor, past: Tensor, in_ring: bool) -> Tensor:
    """Full-precision ``tokens`` as fp32, from the ring and, unless ``in_ring``, from the chunk ``x``."""
    slots = ring_slots(tokens, ring)
    if in_ring:
        return ring.index_select(2, slots).to(torch.float32)
    inside = ring.shape[2] + (tokens - past).clamp(0, x.shape[2] - 1)
    index = torch.where(tokens < past, slots, inside)
    return torch.cat([ring, x], 2).index_select(2, index).to(torch.float32)
