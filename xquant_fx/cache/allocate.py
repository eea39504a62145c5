"""Allocation of quantized buffers: of whole caches, and of one buffer inside a compiled region.

Dynamo puts one call to :func:`quantized_empty` per buffer into the graph of a cold, compiled prefill and takes the
result for an ordinary tensor. The backend runs such a graph, which is a cache's first step, as it stands, without
compiling it; the buffers it returns are quantized, and the next step is compiled for them.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

import xquant_fx.cache.flex  # registers how flex attention reads the buffers made here
import xquant_fx.cache.row_appends  # noqa: F401  (registers appends at a position per row)
from xquant_fx.cache.group import CacheGroup
from xquant_fx.cache.kv_tensor import QuantizedKV
from xquant_fx.cache.ragged import make_state
from xquant_fx.cache.state import KVState
from xquant_fx.errors import CacheStateError
from xquant_fx.plan.buffer_plan import BufferPlan
from xquant_fx.plan.plan import Plan
from xquant_fx.plan.spec import KVSpec, Role


class Geometry(NamedTuple):
    """Shape [B, H, N, D] and dtype of a KV buffer."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    rotary: bool = False
    """Whether it holds the rotary part of keys that are computed from latents."""
    window: int = 0
    """Tokens that a query sees (a sliding window); 0: all."""
    ragged: bool = False
    """Whether each row has a length of its own."""


@dataclasses.dataclass(frozen=True)
class Slot:
    """Which buffer of a cache one call of ``quantized_empty`` allocates."""

    layer: int
    entry: BufferPlan
    """What is planned for it."""
    rotary: bool = False
    """Whether it holds the rotary part of keys that are computed from latents."""
    window: int = 0
    """Tokens that a query sees (a sliding window); 0: all."""

    @classmethod
    def of(cls, plan: Plan, layer: int, role: Role, rotary: bool = False, window: int = 0) -> Slot:
        """The slot of ``layer`` in a cache that was made by ``plan``."""
        return cls(layer, plan.layers[layer].of(role), rotary, window)

    @functools.lru_cache(maxsize=1024)  # noqa: B019 - each new cache writes its own
    def to_json(self) -> str:
        """The slot as text, which a graph can hold."""
        return json.dumps([self.layer, self.entry.to_dict(), self.rotary, self.window])

    @classmethod
    @functools.lru_cache(maxsize=1024)
    def from_json(cls, text: str) -> Slot:
        """The slot that :meth:`to_json` wrote."""
        layer, entry, rotary, window = json.loads(text)
        return cls(layer, BufferPlan.from_dict(entry, f"layer {layer}"), rotary, window)

    @property
    def name(self) -> str:
        """Layer and role, for people."""
        return f"layer {self.layer} {self.entry.role}s"

    def bind(self, like: Tensor, max_len: int, lower: KVSpec | None) -> KVSpec:
        """The spec of a buffer for ``max_len`` tokens such as ``like`` [B, H, any, D]."""
        shape = (like.shape[0], like.shape[1], max_len, like.shape[3])
        return self.entry.bind(self.layer, shape, like.dtype, lower, self.rotary, self.window)


def quantized_empty(
    like: Tensor,
    first: Tensor | None,
    lower: Tensor | None,
    start: Tensor | None,
    slot: str,
    max_len: int,
    plan: str,
    spare: Tensor | None = None,
    lockstep: bool = False,
) -> Tensor:
    """An empty quantized buffer [B, H, max_len, D].

    Args:
        like: new keys or values [B, H, q, D]: batch, heads, head_dim, dtype and device of the buffer.
        first: the first buffer of the same cache; None for the first itself, which brings the ``plan``.
        lower: the buffer of the same role of the layer below, where there is a pair.
        start: int64 [B], padding tokens in front of each sequence; None: none.
        slot: which buffer this is (``Slot.to_json``).
        max_len: tokens that it can hold. A number of its own: Dynamo leaves it open where it differs from cache to
            cache.
        plan: the cache's plan (``Plan.to_json``); "" where ``first`` is given.
        spare: the buffer that this one replaces after ``reset()``; it is taken again where it fits.
        lockstep: whether each step writes all buffers of the cache (``CacheGroup``).
    """
    if isinstance(like, FunctionalTensor):
        raise CacheStateError(
            'an XQuantCache must be compiled with backend="xquant", not with plain Inductor '
            "(or initialised before: run one eager step)"
        )
    wanted = Slot.from_json(slot)
    if isinstance(like, FakeTensor):
        return like.new_empty((*like.shape[:2], max_len, like.shape[3]))
    below = lower.live if isinstance(lower, QuantizedKV) else None
    spec = wanted.bind(like, max_len, below.spec if below is not None else None)
    old = spare.live if isinstance(spare, QuantizedKV) else None
    if old is not None and (old.spec != spec or old.group.start.device != like.device):
        old = None
    group = first.live.group if isinstance(first, QuantizedKV) else _group(old, plan, like, start, lockstep)
    below = below if spec.borrowed else None
    if old is not None and old.group is group and old.lower is below:
        assert spare is not None
        return spare
    return QuantizedKV.of(KVState(spec, group, below))


def _group(old: KVState | None, plan: str, like: Tensor, start: Tensor | None, lockstep: bool) -> CacheGroup:
    """The group of the first buffer's ``old`` state, emptied, or a new one."""
    if old is None:
        return CacheGroup(Plan.from_json(plan), like.shape[0], like.device, start, lockstep=lockstep)
    old.group.start.zero_() if start is None else old.group.start.copy_(start)
    old.group.lockstep = lockstep
    return old.group


torch.compiler.allow_in_graph(quantized_empty)


def bind_all(plan: Plan, buffers: Sequence[tuple[int, Role, Geometry]]) -> list[KVSpec]:
    """Specs of buffers (layer, role, geometry), in order; a partner must come before who borrows of it."""
    specs: dict[tuple[int, str], KVSpec] = {}
    for layer, role, geometry in buffers:
        entry = plan.layers[layer].of(role)
        lower = None if entry.partner is None else specs.get((entry.partner, role))
        spec = entry.bind(layer, geometry.shape, geometry.dtype, lower, geometry.rotary, geometry.window)
        specs[layer, role] = dataclasses.replace(spec, ragged=geometry.ragged)
    return list(specs.values())


def allocate(group: CacheGroup, specs: Sequence[KVSpec]) -> list[KVState]:
    """Empty states of one cache, in the order of ``specs``."""
    states: dict[tuple[int, str], KVState] = {}
    for spec in specs:
        lower = states[cast(int, spec.partner), spec.role] if spec.borrowed else None
        states[spec.layer, spec.role] = make_state(spec, group, lower)
    return list(states.values())
