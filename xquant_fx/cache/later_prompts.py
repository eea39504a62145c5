"""Later prompts of a ``DynamicCache``: as a compiled function's first one was quantized, without a graph that says how.

Dynamo traces the first prompt, and from its graph comes how each layer is stored (``GrowingKV``). A prompt of a new
cache of the same layers is stored alike: each layer's ``update`` is, for that one call, a function that stores keys and
values and gives them back as they came, as an ``XQuantCache`` does. What does not fit stays in full precision, and the
next step is traced, as if nobody had known.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from xquant_fx.cache.group import CacheGroup
from xquant_fx.cache.growing import GrowingKV
from xquant_fx.cache.growth import AHEAD, Growth, room_for, with_lasting_room
from xquant_fx.cache.prompt_keys import PromptKeys
from xquant_fx.cache.state import KVState
from xquant_fx.plan.plan import Plan
from xquant_fx.plan.spec import KVSpec

_WINDOW = "DynamicSlidingWindowLayer"
_LAYERS = ("DynamicLayer", _WINDOW)


class Layer(NamedTuple):
    """How keys and values of one layer were stored."""

    kind: str
    """Name of its class."""
    key: KVSpec
    value: KVSpec
    any_room: bool
    """Whether graphs of steps serve any room (``Growth``)."""


class Known(NamedTuple):
    """How a compiled function stored a cache: its plan, and the layers, by their place."""

    plan: Plan
    layers: dict[int, Layer]
    all_layers: int
    """How many layers the cache has, of whatever kind."""


def learned(cache: Any) -> Known | None:
    """How the first prompt of ``cache`` was stored; None: no layer as codes, or not all those as one cache."""
    found = {i: layer for i, layer in enumerate(cache.layers) if isinstance(getattr(layer, "keys", None), GrowingKV)}
    layers: dict[int, Layer] = {}
    groups: set[CacheGroup] = set()
    for index, layer in found.items():
        name = type(layer).__name__
        if name not in _LAYERS or not isinstance(layer.values, GrowingKV):
            return None
        key, value = layer.keys.live, layer.values.live
        layers[index] = Layer(name, key.spec, value.spec, layer.keys.growth.any_room)
        groups |= {key.group, value.group}
    if len(groups) != 1 or any(spec.ragged for layer in layers.values() for spec in (layer.key, layer.value)):
        return None
    return Known(groups.pop().plan, layers, len(cache.layers))


def begin(cache: Any, known: Known) -> LaterPrompt | None:
    """Have the first prompt of a new ``cache`` stored as ``known``; None: it has other layers."""
    layers, replicated = cache.layers, cache.layer_class_to_replicate
    if not layers and replicated is not None:  # made one by one otherwise, each when it is needed
        layers.extend(replicated() for _ in range(known.all_layers))
    fits = len(layers) == known.all_layers and all(_is_such(layers[i], one) for i, one in known.layers.items())
    return LaterPrompt(known, layers) if fits else None


def _is_such(layer: Any, known: Layer) -> bool:
    """Whether ``layer`` keeps tokens as that did."""
    return type(layer).__name__ == known.kind and not getattr(layer, "record_past", False)


class LaterPrompt:
    """One prompt of a new cache, stored as ``known``."""

    def __init__(self, known: Known, layers: Sequence[Any]) -> None:
        self.known, self.layers = known, layers
        self.group: CacheGroup | None = None
        self.states: dict[tuple[int, str], KVState] = {}
        self.tokens: dict[int, int] = {}
        """Of each layer that was stored."""
        for index in known.layers:
            layers[index].update = self._stored_by(index)

    def end(self) -> None:
        """From now on, layers are updated by their class."""
        for index in self.known.layers:
            vars(self.layers[index]).pop("update", None)
        if self.group is not None:
            self.group.drop()  # nobody reads the prompt in full precision any more

    @property
    def fitted(self) -> bool:
        """Whether every layer was stored so."""
        return self.tokens.keys() == self.known.layers.keys()

    @property
    def was_alone(self) -> bool:
        """Whether nothing came behind it."""
        return all(self.layers[index].get_seq_length() == n for index, n in self.tokens.items())

    def _stored_by(self, index: int) -> Callable[..., tuple[Tensor, Tensor]]:
        def update(key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            layer = self.layers[index]
            del layer.update
            pair = self._pair(self.known.layers[index], key_states, value_states)
            if pair is None:
                return layer.update(key_states, value_states, *args, **kwargs)  # type: ignore[no-any-return]
            keys, values = key_states.contiguous(), value_states.contiguous()
            layer.lazy_initialization(keys, values)
            tokens, known = keys.shape[2], self.known.layers[index]
            first = max(tokens - layer.sliding_window + 1, 0) if known.kind == _WINDOW else 0  # that the layer keeps
            # Before they are stored: keys wait for their queries, no longer than until somebody asks for them.
            grown = [GrowingKV.of(Growth(state, tokens, known.any_room), begin=first) for state in pair]
            for state, x in zip(pair, (keys, values), strict=True):
                state.store(x, torch.arange(tokens, device=x.device))
            layer.keys, layer.values = grown
            if known.kind == _WINDOW:
                layer.cumulative_length += tokens
            self.tokens[index] = tokens
            return PromptKeys.of(keys, pair[0].note_queries), values

        return update

    def _pair(self, known: Layer, keys: Tensor, values: Tensor) -> tuple[KVState, KVState] | None:
        """Empty states for both sides; None: these keys and values are not such as were known."""
        device = keys.device if self.group is None else self.group.start.device
        if {keys.device, values.device} != {device}:
            return None
        group = CacheGroup(self.known.plan, keys.shape[0], device) if self.group is None else self.group
        key, value = (self._state(spec, x, known, group) for spec, x in ((known.key, keys), (known.value, values)))
        if key is None or value is None:
            return None
        self.group = group
        self.states |= {key.name: key, value.name: value}
        return key, value

    def _state(self, spec: KVSpec, x: Tensor, known: Layer, group: CacheGroup) -> KVState | None:
        """An empty state for ``x`` [B, H, q, D]; None: ``spec`` is for others, or borrows codes that are not here."""
        room = room_for(x.shape[2], any_room=True) if known.any_room else room_for(x.shape[2], AHEAD)
        spec = with_lasting_room(dataclasses.replace(spec, shape=(x.shape[0], *spec.shape[1:])), room)
        lower = None if spec.partner is None else self.states.get((spec.partner, spec.role))
        fits = not spec.why_not(x) and (lower is not None) == spec.borrowed
        return KVState(spec, group, lower) if fits else None
