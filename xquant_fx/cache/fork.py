"""A copy of a cache that shares what both hold until one of the two writes to it (``pages.py``)."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, TypeVar

from xquant_fx.cache.group import CacheGroup
from xquant_fx.cache.pages import can_be_shared, share, why_not
from xquant_fx.cache.state import KVState
from xquant_fx.warn_once import warn_once

T = TypeVar("T")


def forked(cache: T, states: Sequence[KVState], group: CacheGroup) -> T:
    """``copy.deepcopy(cache)``, whose ``states`` of one ``group`` share memory with those of the copy.

    Raises:
        CacheStateError: another thread is in a step of this cache.
    """
    with group.turn:  # tensors are replaced, and a step would write to the old ones
        return copy.deepcopy(cache, _shared(states, group))


def _shared(states: Sequence[KVState], group: CacheGroup) -> dict[int, Any]:
    """What a deep copy need not copy: by the ``id`` of ours, which the caller keeps alive, what the copy gets."""
    held = [tensor for chunk in group.chunks.values() for tensor in (chunk.x, *chunk.before.values())]
    memo: dict[int, Any] = {id(tensor): tensor for tensor in held if tensor is not None}  # nobody writes to these
    where = [(state, name) for state in states for name, tensor in state.owned.items() if can_be_shared(tensor)]
    reason = why_not() if group.start.device.type == "cpu" else f"it shares memory of CPUs, not of {group.start.device}"
    if reason:
        warn_once(f"cache.fork() copies the whole cache: {reason}", key="fork copies")
    if reason or not where:
        return memo
    ours, others = share([state.owned[name] for state, name in where])
    for (state, name), mine, other in zip(where, ours, others, strict=True):
        state.owned[name] = mine
        memo[id(mine)] = other
    group.collected.clear()
    return memo
