"""Quantize what a cache of transformers holds before any graph says that it can be, so that it can be taken back.

As what, a takeover by its step would say (``compiler/takeover.py``, ``compiler/growing_takeover.py``): if the graph is
the usual one, keys and values of each layer in turn, each appended to behind as many tokens as the layer says. What
they were is kept until the step has ended (``compiler/trial.py``). Sliding windows are stored so while all tokens are
in them yet; those that a takeover would leave alone stay in full precision.

Relied on: ``keys``, ``values``, ``get_seq_length`` of the layers in ``_PARTS``, ``cumulative_length`` of all but
``DynamicLayer``, ``max_cache_len`` of static ones, ``sliding_window`` of ``DynamicSlidingWindowLayer``,
``cumulative_length_int`` of ``StaticSlidingWindowLayer``. Checked on transformers 5.17 and 5.23.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from xquant_fx.cache.allocate import Geometry, allocate, bind_all
from xquant_fx.cache.convert import quantize_keeping, restore
from xquant_fx.cache.group import CacheGroup
from xquant_fx.cache.growing import GrowingKV
from xquant_fx.cache.growth import Growth, first_room, with_lasting_room
from xquant_fx.cache.new_prompts import first_storing, storing
from xquant_fx.cache.queries import Notes
from xquant_fx.cache.state import KVState
from xquant_fx.plan.config import XQuantConfig
from xquant_fx.plan.plan import Plan
from xquant_fx.plan.spec import KVSpec, Role, why_not_fused
from xquant_fx.plan.windows import why_not_window

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_SIDES: dict[str, Role] = {"keys": "key", "values": "value"}
#: Where a static window counts its tokens once more.
_COUNTER = "cumulative_length_int"


class StaticPart:
    """One side of a layer whose buffer becomes a quantized one, as the same object."""

    window_of = staticmethod(lambda layer: 0)
    room_of = staticmethod(lambda buffer, any_room: buffer.shape[2])
    #: Most tokens that a layer has all of.
    holds = staticmethod(lambda layer: layer.max_cache_len)

    def __init__(self, layer: Any, side: str, state: KVState, any_room: bool) -> None:
        self.state, self.quantized = state, getattr(layer, side)
        self.notes = Notes(layer, self.quantized)
        self.original = quantize_keeping(self.quantized, state)
        state.group.taken_over.append(weakref.ref(self.quantized))

    def take_back(self) -> None:
        """Make it what it was."""
        restore(self.quantized, self.original)
        self.notes.put_back()


class GrowingPart:
    """One side of a layer that gets another tensor with each step: now a quantized one."""

    window_of = staticmethod(lambda layer: 0)
    holds = staticmethod(lambda layer: math.inf)
    room_of = staticmethod(lambda buffer, any_room: first_room(buffer.shape[2], any_room))

    def __init__(self, layer: Any, side: str, state: KVState, any_room: bool) -> None:
        self.layer, self.side, self.state, self.original = layer, side, state, getattr(layer, side)
        self.notes = Notes(layer)
        self.quantized: Tensor = GrowingKV.of(Growth(state, self.original.shape[2], any_room))
        setattr(layer, side, self.quantized)

    def take_back(self) -> None:
        """Have the layer hold what it did, unless it holds something else by now, and whoever has it from there."""
        if getattr(self.layer, self.side) is self.quantized:
            setattr(self.layer, self.side, self.original)
        restore(self.quantized, self.original.detach())
        self.notes.put_back()


class GrowingWindow(GrowingPart):
    """The same of a sliding window: specs know of it, since it keeps no more than the last tokens."""

    window_of = staticmethod(lambda layer: layer.sliding_window)
    holds = staticmethod(lambda layer: layer.sliding_window - 1)


class StaticBefore:
    """What a step of ``new`` tokens changes of a static layer beside quantized buffers, so that it can be forgotten.

    Of a layer that grows it changes nothing but what the layer holds once the step has ended.
    """

    def __init__(self, layer: Any, new: int) -> None:
        self.layer, self.length = layer, layer.cumulative_length.clone()
        self.counted: int | None = getattr(layer, _COUNTER, None)
        moves = self.counted is not None and self.counted + new > layer.max_cache_len  # then it stays in full precision
        self.contents = [(x, x.clone()) for x in (layer.keys, layer.values)] if moves else []

    def bring_back(self) -> None:
        """Make it what it was; a token that has not moved others is behind those that count."""
        with torch.inference_mode():  # where alone what was made in it may be written
            for x, before in self.contents:
                x.copy_(before)
            self.layer.cumulative_length.copy_(self.length)
        if self.counted is not None:
            setattr(self.layer, _COUNTER, self.counted)


#: By the name of a layer's class.
_PARTS: dict[str, type[StaticPart] | type[GrowingPart]] = {
    "StaticLayer": StaticPart,
    "StaticSlidingWindowLayer": StaticPart,  # a buffer like any other while it fills
    "DynamicLayer": GrowingPart,
    "DynamicSlidingWindowLayer": GrowingWindow,
}


def _is_known(layer: Any) -> bool:
    return type(layer).__name__ in _PARTS


def _part_of(layer: Any) -> type[StaticPart] | type[GrowingPart]:
    return _PARTS[type(layer).__name__]


class Early:
    """A cache that was quantized early: ``group`` is what its buffers share, each of which held ``tokens``.

    ``any_room``: whether graphs of one that grows serve any room (``Growth``), as they are to, where kernels read it.
    """

    def __init__(
        self, plan: Plan, layers: Sequence[Any], tokens: int, any_room: bool, before: Sequence[StaticBefore] = ()
    ) -> None:
        """Of ``layers`` that can be: ``held_by`` and ``those_quantized`` say so. ``before``: of all static ones.

        Raises:
            ConfigError: ``plan`` is not for their shapes; nothing is changed.
        """
        self.tokens, self.any_room, self.grows, self.before = tokens, False, grows(layers), list(before)
        self.name = f"layer 0 of {len(layers)} ({type(layers[0]).__name__})"
        self.parts: list[StaticPart | GrowingPart] = []
        first = layers[0].keys
        self.group = CacheGroup(plan, first.shape[0], first.device)
        sides = [(layer, side) for layer in layers for side in _SIDES]
        specs = self._bound(plan, layers)
        if any_room and not any(map(why_not_fused, specs[::2], specs[1::2])):
            self.any_room = True
            specs = self._bound(plan, layers)
        states = allocate(self.group, specs)
        try:
            for (layer, side), state in zip(sides, states, strict=True):
                self._take(layer, side, state)
        except BaseException:  # Ctrl-C, too
            self.take_back()
            raise

    def _bound(self, plan: Plan, layers: Sequence[Any]) -> list[KVSpec]:
        planned: list[tuple[int, Role, Geometry]] = []
        for number, layer in enumerate(layers):
            part, window = _part_of(layer), _part_of(layer).window_of(layer)
            for side, role in _SIDES.items():
                x = getattr(layer, side)
                shape = (*x.shape[:2], part.room_of(x, self.any_room), x.shape[3])
                planned.append((number, role, Geometry(shape, x.dtype, window=window)))
        specs = bind_all(plan, planned)
        return [with_lasting_room(spec, spec.shape[2]) for spec in specs] if self.grows else specs

    def _take(self, layer: Any, side: str, state: KVState) -> None:
        x = getattr(layer, side)
        if side == "keys":
            state.take_queries(Notes(layer, x).squares_of(x))
        state.store(x[:, :, : self.tokens], torch.arange(self.tokens, device=x.device))
        self.group.forget(state)
        self.parts.append(_part_of(layer)(layer, side, state, self.any_room))

    @property
    def has_more(self) -> bool:
        """Whether any of it got tokens since (waits for the device)."""
        return any(part.state.length > self.tokens for part in self.parts)

    def take_back(self, forget_step: bool = False) -> None:
        """Make all what it was: nothing came since, or is to be forgotten."""
        for part in self.parts:
            part.take_back()
        for layer in self.before if forget_step else ():
            layer.bring_back()
        self.parts, self.before = [], []

    def keep(self) -> None:
        """It is quantized from now on; what it was goes."""
        for part in self.parts:
            part.notes.forget()
        self.parts, self.before = [], []


def is_plain(cache: Any) -> bool:
    """Whether the first layer of ``cache`` that stores anything holds it in full precision. Each step asks."""
    layer = first_storing(cache)
    return _is_known(layer) and type(getattr(layer, "keys", None)) is Tensor


def grows(layers: Collection[Any]) -> bool:
    """Whether each step makes ``layers`` longer, all of them in the one way that can be foreseen."""
    return bool(layers) and all(_is_known(layer) and issubclass(_part_of(layer), GrowingPart) for layer in layers)


def _are_static(layers: Collection[Any]) -> bool:
    return bool(layers) and all(_is_known(layer) and issubclass(_part_of(layer), StaticPart) for layer in layers)


def those_quantized(layers: Collection[Any], settings: XQuantConfig | Plan, tokens: int) -> list[Any]:
    """Those of ``layers`` that a takeover would quantize, of which each has ``tokens`` behind its step; none: they are
    more than one of them holds, and so it has lost some, or there is a layer that nothing can be foreseen of."""
    if not grows(layers) and not _are_static(layers):
        return []
    longest = 0 if grows(layers) else max(layer.max_cache_len for layer in layers)
    sizes = [_window_of(layer, longest) for layer in layers]
    others = sizes.count(0)
    stays = [size > 0 and why_not_window(size, others, settings) != "" for size in sizes]
    chosen = [layer for layer, one in zip(layers, stays, strict=True) if not one]
    return chosen if all(tokens <= _part_of(layer).holds(layer) for layer in chosen) else []


def _window_of(layer: Any, longest: int) -> int:
    """Tokens of what a takeover takes for a sliding window; 0: none. Static ones are shorter than others."""
    if issubclass(_part_of(layer), GrowingPart):
        return _part_of(layer).window_of(layer)
    return layer.max_cache_len if layer.max_cache_len < longest else 0


def held_by(cache: Any) -> tuple[list[Any], int] | None:
    """The layers of ``cache`` that store anything, and how many tokens each holds; None: no step of the usual kind can
    be foreseen."""
    layers = list(storing(cache).values())
    if not layers or not all(_is_known(layer) and layer.is_initialized for layer in layers):
        return None
    buffers = [getattr(layer, side) for layer in layers for side in _SIDES]
    if any(layer.keys.shape[1] == 1 and layer.keys.shape[3] != layer.values.shape[3] for layer in layers):
        return None  # latents and what is rotated beside them: keys and values are computed of both
    alike = {(type(x), x.dtype, x.device, x.shape[0]) for x in buffers}
    tokens = {int(layer.get_seq_length()) for layer in layers}
    if (
        len(alike) != 1
        or len(tokens) != 1
        or 0 in tokens
        or type(buffers[0]) is not Tensor
        or buffers[0].dtype not in _DTYPES
    ):
        return None
    return layers, tokens.pop()
