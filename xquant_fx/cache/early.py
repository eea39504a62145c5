"""Quantize what a cache of transformers holds before any graph says that it can be, so that it can be taken back.

What it holds is what its steps would be taken over with (``compiler/takeover.py``, ``compiler/growing_takeover.py``), if
their graph is the usual one: keys and values of each layer in turn, each appended to behind as many tokens as the layer
says. What they were is kept until the graph is known (``compiler/trial.py``).

Relied on: ``keys``, ``values`` and ``get_seq_length`` of ``StaticLayer`` and ``DynamicLayer``. Checked on transformers
5.17 and 5.23.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from xquant_fx.cache.allocate import Geometry, allocate, bind_all
from xquant_fx.cache.convert import quantize_keeping, restore
from xquant_fx.cache.group import CacheGroup
from xquant_fx.cache.growing import GrowingKV
from xquant_fx.cache.growth import Growth, first_room, with_lasting_room
from xquant_fx.cache.new_prompts import first_storing, storing
from xquant_fx.cache.queries import take_note
from xquant_fx.cache.state import KVState
from xquant_fx.plan.plan import Plan
from xquant_fx.plan.spec import Role

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_SIDES: dict[str, Role] = {"keys": "key", "values": "value"}


class StaticPart:
    """One side of a layer whose buffer becomes a quantized one, as the same object."""

    room_for = staticmethod(lambda buffer, any_room: buffer.shape[2])

    def __init__(self, layer: Any, side: str, state: KVState, any_room: bool) -> None:
        self.state, self.quantized = state, getattr(layer, side)
        self.original = quantize_keeping(self.quantized, state)
        state.group.taken_over.append(weakref.ref(self.quantized))

    def take_back(self, tokens: int) -> None:
        """Make it what it was, with what came behind its ``tokens``."""
        held = self.state.length
        self.original[:, :, tokens:held] = self.quantized[:, :, tokens:held]
        restore(self.quantized, self.original)


class GrowingPart:
    """One side of a layer that gets another tensor with each step: now a quantized one."""

    room_for = staticmethod(lambda buffer, any_room: first_room(buffer.shape[2], any_room))

    def __init__(self, layer: Any, side: str, state: KVState, any_room: bool) -> None:
        self.layer, self.side, self.state, self.original = layer, side, state, getattr(layer, side)
        self.quantized = GrowingKV.of(Growth(state, self.original.shape[2], any_room))
        setattr(layer, side, self.quantized)

    def take_back(self, tokens: int) -> None:
        """Have the layer hold what it did, with what came behind its ``tokens``."""
        now = getattr(self.layer, self.side)
        whole = [self.original, now[:, :, tokens:]] if now.shape[2] > tokens else [self.original]
        setattr(self.layer, self.side, torch.cat(whole, 2) if len(whole) > 1 else self.original)


#: By the name of a layer's class.
_PARTS: dict[str, type[StaticPart] | type[GrowingPart]] = {"StaticLayer": StaticPart, "DynamicLayer": GrowingPart}


class Early:
    """A cache that was quantized early: ``group`` is what its buffers share, each of which held ``tokens``.

    ``any_room``: whether graphs of one that grows are to serve any room (``Growth``).
    """

    def __init__(self, plan: Plan, layers: Sequence[Any], tokens: int, any_room: bool) -> None:
        """Of ``layers`` that can be: ``held_by`` says so.

        Raises:
            ConfigError: ``plan`` is not for their shapes; nothing is changed.
        """
        self.tokens, self.any_room, kind = tokens, any_room, type(layers[0]).__name__
        part_of, self.grows = _PARTS[kind], _PARTS[kind] is GrowingPart
        self.name = f"layer 0 of {len(layers)} that are a {kind}"
        sides = [(i, layer, side, getattr(layer, side)) for i, layer in enumerate(layers) for side in _SIDES]
        planned = []
        for i, _, side, x in sides:
            shape = (*x.shape[:2], part_of.room_for(x, any_room), x.shape[3])
            planned.append((i, _SIDES[side], Geometry(shape, x.dtype)))
        specs = bind_all(plan, planned)
        if self.grows:
            specs = [with_lasting_room(spec, spec.shape[2]) for spec in specs]
        self.group = CacheGroup(plan, sides[0][3].shape[0], sides[0][3].device)
        self.parts: list[StaticPart | GrowingPart] = []
        for (_, layer, side, x), state in zip(sides, allocate(self.group, specs), strict=True):
            if side == "keys":
                state.take_queries(take_note(layer if self.grows else x, x))
            state.store(x[:, :, :tokens], torch.arange(tokens, device=x.device))
            self.group.forget(state)
            self.parts.append(part_of(layer, side, state, any_room))

    def take_back(self) -> None:
        """Make all what it was, with the few tokens that came since behind those: they are exact yet."""
        for part in self.parts:
            part.take_back(self.tokens)
        for part in self.parts:  # not before: upper layers have their codes from lower ones
            part.state.forsake()


def is_plain(cache: Any) -> bool:
    """Whether the first layer of ``cache`` that stores anything holds it in full precision. Each step asks."""
    layer = first_storing(cache)
    return type(layer).__name__ in _PARTS and type(getattr(layer, "keys", None)) is Tensor


def grow_alike(layers: Mapping[int, Any]) -> bool:
    """Whether new ``layers`` of a cache that grows are such that its first step can be foreseen."""
    return bool(layers) and all(_PARTS.get(type(layer).__name__) is GrowingPart for layer in layers.values())


def held_by(cache: Any) -> tuple[list[Any], int] | None:
    """The layers of ``cache`` that store anything, and how many tokens each holds; None: no step of the usual kind can
    be foreseen."""
    layers = list(storing(cache).values())
    kinds = {type(layer).__name__ for layer in layers if layer.is_initialized}
    if len(kinds) != 1 or not kinds <= _PARTS.keys():
        return None
    buffers = [getattr(layer, side) for layer in layers for side in _SIDES]
    alike = {(type(x), x.dtype, x.device, x.shape[0]) for x in buffers}
    tokens = {int(layer.get_seq_length()) for layer in layers}
    if len(alike) != 1 or len(tokens) != 1 or type(buffers[0]) is not Tensor or buffers[0].dtype not in _DTYPES:
        return None
    return layers, tokens.pop()
