"""Where tokens live: the ring of full-precision tokens, and what is quantized at which length.

Token t of a sequence sits in ring slot ``t % ring_tokens`` until that slot is needed again. With
``past`` tokens before the step and residual length R (XQuant, as in the paper's release):

    keys    tokens below floor(past / R) * R are quantized: whole blocks, flushed when full
    values  tokens below past - R are quantized: the one that leaves the window, each step

Both limits are those *before* the step: a step attends first and flushes afterwards. The rings
hold STEP_TOKENS tokens more than R, so that after a store of up to that many tokens every token
that was in full precision before the step still is, and load may come after store.
"""

from __future__ import annotations

from torch import Tensor

#: How many new tokens one decode step may bring and still find every token that was in full
#: precision before the step. The residual windows hold this many tokens more than
#: ``residual_length``, which also makes rolling back that many tokens exact.
STEP_TOKENS = 8


def quantized_limit(past: Tensor, side: str, residual: int) -> Tensor:
    """Number of quantized tokens when ``past`` tokens are stored (may be negative for values)."""
    return past // residual * residual if side == "key" else past - residual


def ring_slots(tokens: Tensor, ring: Tensor) -> Tensor:
    """Ring slots of ``tokens``; negative tokens map to some slot, whose content is not used."""
    return tokens % ring.shape[2]
