"""First prompts of new caches of transformers: the ``update`` of each layer is, for one call, a function of ours.

Attention gets the prompt's own keys and values, whatever the layer has room for, as it does of an ``XQuantCache``, and
masks are made for as many (those made before the call are cut: ``compiler/untraced.py``). The keys tell of the queries
that read them (``prompt_keys.py``).

Relied on: that a cache calls ``update`` and ``get_mask_sizes`` of the objects in its ``layers``, and that a layer
without tokens has ``is_initialized`` False. Checked on transformers 5.17 and 5.23.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import Tensor

from xquant_fx.cache.prompt_keys import PromptKeys
from xquant_fx.cache.prompts import without_views
from xquant_fx.cache.queries import note

_OVERRIDDEN = ("update", "get_mask_sizes")
#: Layers that give attention keys and values, and nothing else that is as long as those.
_KINDS = ("DynamicLayer", "DynamicSlidingWindowLayer", "StaticLayer", "StaticSlidingWindowLayer")
#: A layer that stores nothing: it has no attention, or reads another's keys and values.
_DUMMY = "DummyLayer"


def storing(cache: Any) -> dict[int, Any]:
    """The layers of ``cache`` that store anything, by their place."""
    return {i: layer for i, layer in enumerate(cache.layers) if type(layer).__name__ != _DUMMY}


def first_storing(cache: Any) -> Any:
    """The first of them; None: there is none yet."""
    return next((layer for layer in cache.layers if type(layer).__name__ != _DUMMY), None)


def is_new(cache: Any) -> bool:
    """Whether no layer of ``cache`` that stores anything has begun. Each step asks, and the first layer answers."""
    return not any(type(layer).__name__ != _DUMMY and getattr(layer, "is_initialized", True) for layer in cache.layers)


def may_be_new(layers: Mapping[int, Any]) -> bool:
    """Whether a ``NewPrompt`` may take these layers, all of a cache: masks are made for all by what one says."""
    return all(type(layer).__name__ in _KINDS and not getattr(layer, "record_past", False) for layer in layers.values())


class NewPrompt:
    """One prompt: ``layers`` are new ones, by their place in the cache."""

    def __init__(self, layers: Mapping[int, Any]) -> None:
        self.layers = layers
        self.tokens: dict[int, int] = {}
        """Of each layer that has got some."""
        for index, layer in layers.items():
            layer.update, layer.get_mask_sizes = partial(self._update, index), _of_prompt

    @property
    def widths(self) -> frozenset[int]:
        """How many tokens layers have room for, where that is a number."""
        return frozenset(layer.max_cache_len for layer in self.layers.values() if hasattr(layer, "max_cache_len"))

    def end(self) -> None:
        """From now on, layers are what their class says."""
        for layer in self.layers.values():
            _give_back(layer)
        without_views(self.layers.values())

    @property
    def was_alone(self) -> bool:
        """Whether nothing came behind it (of static layers, waits for the device)."""
        return all(int(self.layers[index].get_seq_length()) == n for index, n in self.tokens.items())

    def _update(
        self, index: int, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        layer = self.layers[index]
        _give_back(layer)
        # As a buffer would give them back: attention reads them faster.
        keys, values = key_states.contiguous(), value_states.contiguous()
        takes_query = self.store(index, keys, values, lambda: layer.update(keys, values, *args, **kwargs))
        self.tokens[index] = keys.shape[2]
        return PromptKeys.of(keys, takes_query, getattr(layer, "max_cache_len", 0)), values

    def store(self, index: int, keys: Tensor, values: Tensor, update: Callable[[], Any]) -> Callable[[Tensor], None]:
        """Store keys and values [B, H, q, D] in layer ``index``, by its own ``update`` maybe; returns what takes the
        query [B, heads, q, D] that reads them."""
        raise NotImplementedError


class FirstPrompt(NewPrompt):
    """The first prompt of a cache that nobody knows how to store: it stays in full precision until a step comes.

    Of a static one nothing is to be learned from its graph, whose buffers are made in it. Its queries are noted, for
    who quantizes it.
    """

    def store(self, index: int, keys: Tensor, values: Tensor, update: Callable[[], Any]) -> Callable[[Tensor], None]:
        """By the layer itself."""
        update()
        layer = self.layers[index]
        return partial(note, (layer, layer.keys), layer.keys, keys.shape[2])


def _give_back(layer: Any) -> None:
    for name in _OVERRIDDEN:
        vars(layer).pop(name, None)


def _of_prompt(query_length: int) -> tuple[int, int]:
    """Mask sizes of a layer whose attention is given the prompt alone."""
    return query_length, 0
