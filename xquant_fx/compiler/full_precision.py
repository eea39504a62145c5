"""The inputs of a graph with their caches rebuilt at 16 bits, of what they hold at the moment: for a self-check.

A cache that is quantized holds dequantized numbers as far as any program can tell. So both sides of a comparison start
from those: the program's own graph with ordinary tensors of them, the rewritten one with caches that store them as
they are. Nothing of the cache itself is touched.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from xquant_fx.cache.group import CacheGroup
from xquant_fx.cache.growing import STORED_KV, GrowingKV
from xquant_fx.cache.growth import Growth
from xquant_fx.cache.kv_tensor import QuantizedKV
from xquant_fx.cache.ragged import make_state
from xquant_fx.cache.sliding import SlidingKV
from xquant_fx.cache.state import KVState
from xquant_fx.plan.config import XQuantConfig
from xquant_fx.plan.plan import make_plan
from xquant_fx.plan.spec import KVSpec

#: Groups keep the plan that their states were made by; nothing here asks for it.
_ANY_PLAN = make_plan(XQuantConfig.preset("full"), 1)


def full(spec: KVSpec) -> KVSpec:
    """The same buffer in full precision, with codes of its own, and all tokens of a sliding window."""
    return dataclasses.replace(spec, bits=16, partner=None, window=0)


class Rebuilt:
    """The arguments of one call, from which each run gets its own copies.

    Args:
        given: the graph's inputs.
        written: numbers of those that the graph writes to.
        ordinary: specs of ordinary buffers [B, H, N, D] that are to be stored as well, and the numbers of their caches,
            by the numbers of the inputs.
        sliding: numbers of ordinary ones among them that are windows which move.
    """

    def __init__(
        self,
        given: list[Any],
        written: Iterable[int],
        ordinary: Mapping[int, tuple[KVSpec, int]],
        sliding: Iterable[int] = (),
    ) -> None:
        self.given, self.written = [_number(value) for value in given], frozenset(written)
        self.ordinary = {i: (_of_numbers(spec), cache) for i, (spec, cache) in ordinary.items()}
        self.sliding = {i for i, value in enumerate(given) if isinstance(value, SlidingKV)} | set(sliding)
        self.contents = {i: _contents(given[i]) for i in (*self._stored(), *ordinary)}
        self.groups: dict[int, CacheGroup] = {}

    def _stored(self) -> list[int]:
        return [i for i, value in enumerate(self.given) if isinstance(value, STORED_KV)]

    def plain(self) -> list[Any]:
        """Arguments for the graph as the program has it: ordinary tensors, copies of what it writes to."""
        values = list(self.given)
        for i, (tokens, length) in self.contents.items():
            values[i] = torch.nn.functional.pad(tokens, (0, 0, 0, length - tokens.shape[2]))
        for i in self.written - set(self.contents):
            values[i] = values[i].clone() if isinstance(values[i], Tensor) else values[i]
        return values

    def stored(self) -> list[Any]:
        """Arguments for the rewritten graph: caches of 16 bits, copies of what else it writes to."""
        values, self.groups = self.plain(), {}
        for i, (tokens, _) in self.contents.items():
            old = self.given[i]
            spec, cache = self.ordinary[i] if i in self.ordinary else (old.live.spec, id(old.live.group))
            start = None if i in self.ordinary else old.live.group.start
            state = self._filled(full(spec), tokens, cache, start)
            if spec.ragged:
                state.owned["length"].copy_(torch.tensor(_row_lengths(old))[:, None])
            values[i] = self._standing_for(i, state, tokens.shape[2])
        return values

    def _standing_for(self, i: int, state: KVState, tokens: int) -> Tensor:
        old = self.given[i]
        if isinstance(old, GrowingKV):
            return GrowingKV.of(Growth(state, tokens))
        return SlidingKV.last(state, old.shape[2]) if i in self.sliding else QuantizedKV.of(state)

    def _filled(self, spec: KVSpec, tokens: Tensor, cache: int, start: Tensor | None) -> KVState:
        held = tokens.shape[2]
        if cache not in self.groups:
            self.groups[cache] = CacheGroup(_ANY_PLAN, spec.shape[0], tokens.device, start)
        state = make_state(spec, self.groups[cache])
        state.owned["codes"][:, :, :held] = tokens
        state.owned["length"].fill_(held)
        state.at_most = held
        return state

    @property
    def fault(self) -> bool:
        """Whether a store of the last rewritten run found positions that do not follow what is stored."""
        return any(bool(group.faults.tensor.any()) for group in self.groups.values())


def _of_numbers(spec: KVSpec) -> KVSpec:
    """``spec`` at the sizes of this call: Dynamo leaves that of a buffer open whose like had another."""
    batch, heads, tokens, dim = (_number(size) for size in spec.shape)
    return dataclasses.replace(spec, shape=(batch, heads, tokens, dim))


def _number(value: Any) -> Any:
    return value.node.hint if isinstance(value, torch.SymInt | torch.SymFloat) else value


def _contents(buffer: Tensor) -> tuple[Tensor, int]:
    """The tokens that ``buffer`` holds as numbers [B, H, n, D], and the length of the tensor that a program sees."""
    if isinstance(buffer, GrowingKV):
        return buffer.dequantize(), buffer.shape[2]
    if isinstance(buffer, SlidingKV):
        return buffer.dequantize(), buffer.shape[2]
    if isinstance(buffer, QuantizedKV):
        return buffer.live.load(buffer.live.length), buffer.shape[2]
    used = (buffer != 0).any(3).any(1).any(0).nonzero()
    return buffer[:, :, : int(used[-1]) + 1 if len(used) else 0].clone(), buffer.shape[2]


def _row_lengths(buffer: Tensor) -> list[int]:
    """Tokens of each row of a buffer whose rows have lengths of their own, stored or ordinary."""
    if isinstance(buffer, QuantizedKV):
        return buffer.live.row_lengths
    used = (buffer != 0).any(3).any(1)  # [B, N]
    found: list[int] = (used * torch.arange(1, used.shape[1] + 1, device=used.device)).amax(1).tolist()
    return found


def contents_of(buffer: Any, tokens: int) -> Tensor:
    """The first ``tokens`` that a cache of :meth:`Rebuilt.stored` holds, and zeros where it holds fewer; the last of
    what grows or slides."""
    codes: Tensor = buffer.live.owned["codes"]
    if isinstance(buffer, GrowingKV | SlidingKV):
        return codes[:, :, : buffer.live.length][:, :, -tokens:]
    return held_of(buffer, codes)[:, :, :tokens]


def held_of(buffer: Any, tokens: Tensor) -> Tensor:
    """``tokens`` [B, H, n, D], with zeros behind those that each row of ``buffer`` holds."""
    lengths = torch.tensor(buffer.live.row_lengths, device=tokens.device)
    held = torch.arange(tokens.shape[2], device=tokens.device) < lengths[:, None]  # [B, n]
    return torch.where(held[:, None, :, None], tokens, 0)
