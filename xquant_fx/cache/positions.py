"""Which positions tokens may be stored at, and how far back a state can go: the rules of eager code, and their errors.

Kernels hold the same rules of positions by themselves, and raise a fault (``kernels/faults.py``).
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from xquant_fx.cache.group import CacheGroup
from xquant_fx.errors import CacheStateError
from xquant_fx.kernels.faults import FAULTS, Fault, may_wrap
from xquant_fx.plan.spec import KVSpec


class Stored(Protocol):
    """A ``KVState``."""

    spec: KVSpec
    group: CacheGroup

    @property
    def lower(self) -> Stored | None:
        """Whose codes it reads."""

    @property
    def owned(self) -> dict[str, Tensor]:
        """Its stored tensors."""

    @property
    def length(self) -> int:
        """Tokens stored."""


def checked_past(state: Stored, x: Tensor, pos: Tensor) -> int:
    """How many tokens come before ``x`` [B, H, q, D], to be stored at ``pos`` [q] (waits for the device).

    Raises:
        CacheStateError: the positions do not follow what is stored, or ``x`` does not fit.
    """
    spec = state.spec
    if reason := spec.why_not(x):
        raise CacheStateError(reason)
    if pos.shape[0] == 0 or pos.shape[0] != x.shape[2]:
        raise CacheStateError(
            f"layer {spec.layer} {spec.role}s: a step needs one position per token and at least one, got "
            f"{pos.shape[0]} for {x.shape[2]} tokens"
        )
    positions = pos.to(torch.int64).tolist()
    past, new = positions[0], len(positions)
    length, furthest = state.owned["length"].tolist()
    state.group.faults.check(wait=True)
    if reason := _why_not_at(state, positions, length, furthest):
        raise CacheStateError(
            f"layer {spec.layer} {spec.role}s: {reason} (position {past} to {past + new - 1}, {length} tokens stored, "
            f"max_cache_len {spec.shape[2]})"
        )
    return past


def _why_not_at(state: Stored, positions: list[int], length: int, furthest: int) -> str:
    """Why no step can have these positions behind ``length`` tokens, in words; "" if it can."""
    past, new, room = positions[0], len(positions), state.spec.shape[2]
    if past + new > room:
        return FAULTS[Fault.FULL]
    if past > length or past < 0:
        return FAULTS[Fault.NOT_APPENDED]
    if past and not goes_back_exactly(state, past, furthest):
        return FAULTS[Fault.ROLLED_BACK_TOO_FAR]
    if past == 0 and may_wrap(length, new, room):
        return FAULTS[Fault.RESTARTED]
    if positions != list(range(past, past + new)):
        return FAULTS[Fault.NOT_CONSECUTIVE]
    if state.lower is not None and state.lower.length < past + new:
        return f"layer {state.spec.partner} lends its codes and must be written first"
    return ""


def goes_back_exactly(state: Stored, length: int, furthest: int) -> bool:
    """Whether what was stored after ``length`` tokens, up to ``furthest``, has overwritten none of them."""
    return state.spec.is_exact_back or furthest - length <= state.spec.rollback_tokens


def check_back(state: Stored, length: int) -> None:
    """Whether the tokens from ``length`` on can be forgotten: at most ``rollback_tokens``, or all.

    Raises:
        CacheStateError: more tokens than that, whose neighbours are already quantized; or fewer are stored.
    """
    spec, (stored, furthest) = state.spec, state.owned["length"].tolist()
    if length and not goes_back_exactly(state, length, furthest):
        most, why = spec.rollback_tokens, "quantized" if spec.quantized else "overwritten by what followed the window"
        raise CacheStateError(
            f"layer {spec.layer}: at most {most} tokens can be rolled back exactly (the ones before them are {why}), "
            f"asked for {furthest - length} of {furthest}: set num_assistant_tokens or prompt_lookup_num_tokens to "
            f"{most} or less, or rollback_tokens of the cache's config to more"
        )
    if length > stored:
        raise CacheStateError(
            f"layer {spec.layer} holds {stored} {spec.role}s, fewer than the {length} tokens to keep: a step was "
            f"interrupted between layers; crop {length - stored} more, or reset()"
        )
