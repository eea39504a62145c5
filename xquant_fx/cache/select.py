"""Batch rows of a whole cache, selected buffer by buffer, as beam search does it on caches that know no quantization.

``keys.index_select(0, rows)`` on every buffer of a cache makes another cache of the same codes: nothing is dequantized,
layers that share codes go on sharing them, and what all buffers have in common is selected once.
"""

from __future__ import annotations

import dataclasses
import weakref

import torch
from torch import Tensor

from xquant_fx.cache.group import CacheGroup
from xquant_fx.cache.ragged import make_state
from xquant_fx.cache.state import KVState


class Selection:
    """The cache that ``rows`` (int64 [new batch]) of ``group`` become, made as its buffers ask for their part."""

    def __init__(self, group: CacheGroup, rows: Tensor) -> None:
        self.rows = rows
        start = group.start.index_select(0, rows)
        self.group = CacheGroup(group.plan, rows.shape[0], group.start.device, start)
        is_ragged = bool(group.rows and self.group.row_groups())
        self.group.faults.tensor.copy_(group.faults.tensor[rows] if is_ragged else group.faults.tensor)
        self.made: weakref.WeakKeyDictionary[KVState, KVState] = weakref.WeakKeyDictionary()
        self.given: weakref.WeakSet[KVState] = weakref.WeakSet()

    def part(self, state: KVState) -> KVState:
        """What ``state`` becomes. A layer that borrows codes brings the one that lends them."""
        if state in self.made:
            return self.made[state]
        lower = None if state.lower is None else self.part(state.lower)
        spec = dataclasses.replace(state.spec, shape=(self.rows.shape[0], *state.spec.shape[1:]))
        new = self.made[state] = make_state(spec, self.group, lower)
        for name, tensor in new.owned.items():
            old, is_common = state.owned[name], name == "length" and not spec.ragged
            tensor.copy_(old if is_common else old.index_select(0, self.rows))
        return new


def select(state: KVState, index: Tensor) -> KVState:
    """Rows ``index`` [new batch] of ``state``, in one cache with what other states of its cache became by the same."""
    group = state.group
    rows = index.to(device=group.start.device, dtype=torch.int64)
    known = group.selection
    if not isinstance(known, Selection) or state in known.given or not torch.equal(known.rows, rows):
        known = group.selection = Selection(group, rows)
        group.collected.clear()  # the old cache goes as soon as its buffers are replaced
    known.given.add(state)
    return known.part(state)


def reorder(state: KVState, chosen: KVState | None) -> bool:
    """Whether ``state`` became ``chosen``, rows of it, in place: ``keys.copy_(keys[rows])``, as beam search may do it.

    Not where layers share codes, which one layer alone must not reorder.
    """
    group = state.group
    known = group.selection
    if chosen is None or not isinstance(known, Selection) or known.made.get(state) is not chosen:
        return False
    members = [member for ref in group.members if (member := ref()) is not None]
    is_plain = chosen.spec == state.spec and not state.spec.window and state.behind is None
    if not is_plain or group.rows or any(getattr(member, "lower", None) is not None for member in members):
        return False
    group.forget(state)
    for name, tensor in state.owned.items():
        tensor.copy_(chosen.owned[name])
    group.start.copy_(known.group.start)
    return True
