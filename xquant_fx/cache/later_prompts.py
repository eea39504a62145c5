"""Later prompts of a ``DynamicCache`` or a ``StaticCache``: as a compiled function's first one was quantized.

From a graph, of that prompt or of the step behind it, came a plan, and which layers are stored. A prompt of a new cache
of as many layers is stored by the same plan, without a graph (``new_prompts.py``).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from xquant_fx.cache.convert import quantize_in_place
from xquant_fx.cache.group import CacheGroup
from xquant_fx.cache.growing import GrowingKV
from xquant_fx.cache.growth import Growth, first_room, with_lasting_room
from xquant_fx.cache.kv_tensor import QuantizedKV
from xquant_fx.cache.new_prompts import NewPrompt, may_be_new, storing
from xquant_fx.cache.prompts import GROWING_WINDOW
from xquant_fx.cache.state import KVState
from xquant_fx.errors import ConfigError
from xquant_fx.plan.plan import Plan
from xquant_fx.plan.spec import KVSpec

_STATIC = "StaticLayer"
#: Names of layers' classes to what their keys and values are, once they are stored.
_STORED: dict[str, type[GrowingKV] | type[QuantizedKV]] = {
    "DynamicLayer": GrowingKV, GROWING_WINDOW: GrowingKV, _STATIC: QuantizedKV,
}  # fmt: skip


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
    layers: dict[int, Layer] = {}
    groups: set[CacheGroup] = set()
    for index, layer in enumerate(cache.layers):
        name, pair = type(layer).__name__, [getattr(layer, side, None) for side in ("keys", "values")]
        if not any(isinstance(x, GrowingKV | QuantizedKV) for x in pair):
            continue  # it is in full precision, and stays so, or reads another's
        key, value = pair
        if not (name in _STORED and type(key) is type(value) is _STORED[name]):
            return None
        growth = getattr(key, "growth", None)
        layers[index] = Layer(name, key.live.spec, value.live.spec, growth is not None and growth.any_room)
        groups |= {key.live.group, value.live.group}
    if len(groups) != 1 or any(spec.ragged for layer in layers.values() for spec in (layer.key, layer.value)):
        return None
    return Known(groups.pop().plan, layers, len(cache.layers))


def begin(cache: Any, known: Known) -> LaterPrompt | None:
    """Have the first prompt of a new ``cache`` stored as ``known``; None: it has other layers."""
    layers, replicated, made = cache.layers, cache.layer_class_to_replicate, 0
    if not layers and replicated is not None:  # made one by one otherwise, each when it is needed
        made = known.all_layers
        layers.extend(replicated() for _ in range(made))
    as_many = len(layers) == known.all_layers
    if as_many and all(_is_such(layers[i], one) for i, one in known.layers.items()) and may_be_new(storing(cache)):
        return LaterPrompt(known, cache, made)
    del layers[len(layers) - made :]
    return None


def _is_such(layer: Any, known: Layer) -> bool:
    """Whether ``layer`` keeps tokens as that did."""
    static = known.kind == _STATIC
    return type(layer).__name__ == known.kind and (not static or layer.max_cache_len == known.key.shape[2])


class LaterPrompt(NewPrompt):
    """One prompt of a new cache, stored as ``known``."""

    def __init__(self, known: Known, cache: Any, made: int) -> None:
        self.known, self.cache, self.made = known, cache, made
        self.group: CacheGroup | None = None
        self.states: dict[tuple[int, str], KVState] = {}
        self.stored: set[int] = set()
        """Places of layers that were stored so."""
        super().__init__(storing(cache))

    def end(self) -> None:
        """From now on, layers are what their class says, and those that were ``made`` for nothing are gone."""
        super().end()
        if self.group is not None:
            self.group.drop()  # nobody reads the prompt in full precision any more
        layers = self.cache.layers
        while self.made and not layers[-1].is_initialized:
            layers.pop()
            self.made -= 1

    @property
    def fitted(self) -> bool:
        """Whether every layer was stored so."""
        return self.stored == self.known.layers.keys()

    def store(self, index: int, keys: Tensor, values: Tensor, update: Callable[[], Any]) -> Callable[[Tensor], None]:
        """As codes, if the layer was, and these keys and values can be."""
        layer, known = self.layers[index], self.known.layers.get(index)
        pair = None if known is None else self._pair(known, layer, keys, values)
        if known is None or pair is None:
            update()
            return _ignored
        layer.lazy_initialization(keys, values)
        (_fill if known.kind == _STATIC else _grow)(layer, pair, (keys, values), known.any_room)
        self.stored.add(index)
        return pair[0].note_queries

    def _pair(self, known: Layer, layer: Any, keys: Tensor, values: Tensor) -> tuple[KVState, KVState] | None:
        """Empty states for both sides; None: there can be none beside those that there are."""
        device = keys.device if self.group is None else self.group.start.device
        if {keys.device, values.device} != {device}:
            return None
        specs = [self._spec(known, spec, layer, x) for spec, x in ((known.key, keys), (known.value, values))]
        if any(spec is None or keys.shape[2] > spec.shape[2] for spec in specs):
            return None
        if self.group is None:
            self.group = CacheGroup(self.known.plan, keys.shape[0], device)
        key, value = (self._state(spec) for spec in specs if spec is not None)
        return key, value

    def _spec(self, known: Layer, stored: KVSpec, layer: Any, x: Tensor) -> KVSpec | None:
        """That of such ``x`` [B, H, q, D], planned as what was ``stored``; None: settings are not for its head_dim."""
        entry, static = self.known.plan.layers[stored.layer].of(stored.role), known.kind == _STATIC
        room = layer.max_cache_len if static else first_room(x.shape[2], known.any_room)
        lower = None if entry.partner is None else self.states.get((entry.partner, entry.role))
        below, shape = None if lower is None else lower.spec, (*x.shape[:2], room, x.shape[3])
        is_rotary = stored.bits != entry.bits  # the one thing that changes them
        try:
            spec = entry.bind(stored.layer, shape, x.dtype, below, is_rotary, stored.window)
        except ConfigError:
            return None
        return spec if static else with_lasting_room(spec, room)

    def _state(self, spec: KVSpec) -> KVState:
        assert self.group is not None
        lower = self.states[spec.partner, spec.role] if spec.partner is not None else None
        self.states[spec.layer, spec.role] = state = KVState(spec, self.group, lower)
        return state


def _grow(layer: Any, pair: tuple[KVState, KVState], new: tuple[Tensor, Tensor], any_room: bool) -> None:
    """Store ``new`` keys and values [B, H, q, D] as the first tokens of an empty layer that grows."""
    tokens, slides = new[0].shape[2], type(layer).__name__ == GROWING_WINDOW
    first = max(tokens - layer.sliding_window + 1, 0) if slides else 0  # that the layer keeps
    # Before they are stored: keys wait for their queries, no longer than until somebody asks for them.
    grown = [GrowingKV.of(Growth(state, tokens, any_room), begin=first) for state in pair]
    _store(pair, new)
    layer.keys, layer.values = grown
    if slides:
        layer.cumulative_length += tokens


def _fill(layer: Any, pair: tuple[KVState, KVState], new: tuple[Tensor, Tensor], _any_room: bool) -> None:
    """The same of a static one, whose buffers are as a takeover leaves them."""
    for state, buffer in zip(pair, (layer.keys, layer.values), strict=True):
        state.group.taken_over.append(weakref.ref(quantize_in_place(buffer, state)))
    _store(pair, new)
    layer.cumulative_length.add_(new[0].shape[2])


def _store(pair: tuple[KVState, KVState], new: tuple[Tensor, Tensor]) -> None:
    for state, x in zip(pair, new, strict=True):
        state.store(x, torch.arange(x.shape[2], device=x.device))


def _ignored(query: Tensor) -> None:
    """What keys in full precision do with the query that reads them."""
