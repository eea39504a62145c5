"""An ``XQuantCache`` as tensors by name, and back: for safetensors or torch.save, without pickled objects.

``about`` holds, as UTF-8 bytes of JSON, what the tensors mean; ``layers.0.key.codes`` and so on are the stored tensors
of quantized layers (borrowed codes once, with the lower layer), ``layers.0.keys`` the buffers of others.
"""

from __future__ import annotations

import json
from typing import Any, cast

import torch
from torch import Tensor

from xquant_fx.cache.allocate import Geometry
from xquant_fx.cache.group import CacheGroup
from xquant_fx.cache.kv_tensor import QuantizedKV
from xquant_fx.cache.remake import holds_nothing
from xquant_fx.cache.state import KVState
from xquant_fx.errors import ArgumentError, CacheStateError
from xquant_fx.plan.plan import Plan
from xquant_fx.plan.spec import Role

#: How many tokens a static layer holds: a tensor, and in sliding windows a number, too.
COUNTERS = ("cumulative_length", "cumulative_length_int")
VERSION = 1


def save(cache: Any) -> dict[str, Tensor]:
    """The tensors of ``cache``, an ``XQuantCache`` that holds tokens, not copied.

    Raises:
        CacheStateError: it holds none, or a layer that is neither quantized nor a static one of keys and values.
    """
    if not all(layer.is_initialized for layer in cache.layers):
        raise CacheStateError("a cache is saved when all its layers hold tokens: this one is new, or was reset")
    tensors: dict[str, Tensor] = {}
    layers: list[dict[str, Any]] = []
    for index, layer in enumerate(cache.layers):
        sides = {t.spec.role: t.live for t in (layer.keys, layer.values) if isinstance(t, QuantizedKV)}
        for role, state in sides.items():
            tensors.update({f"layers.{index}.{role}.{name}": tensor for name, tensor in state.owned.items()})
        if not sides and not holds_nothing(layer):
            tensors.update({f"layers.{index}.{name}": getattr(layer, name) for name in ("keys", "values")})
        for name in _counters(layer):
            tensors[f"layers.{index}.{name}"] = torch.as_tensor(getattr(layer, name))
        layers.append({r: [*s.spec.shape, str(s.spec.dtype).removeprefix("torch.")] for r, s in sides.items()})
    if cache.group is not None:
        tensors["start"] = cache.group.start
    plan = None if cache.plan is None else cache.plan.to_json()
    about = {"xquant_cache": VERSION, "plan": plan, "max_cache_len": int(cache.get_max_length()), "layers": layers}
    tensors["about"] = torch.tensor(list(json.dumps(about).encode()), dtype=torch.uint8)
    return tensors


def load(cache: Any, tensors: dict[str, Tensor]) -> None:
    """Give ``cache`` what :func:`save` wrote of another with the same plan.

    Raises:
        ArgumentError: the tensors are of another cache, or incomplete; nothing is changed.
    """
    about = _about(tensors)
    _check(cache, about)
    with torch.inference_mode(False):
        loader = _Loader(cache, tensors)
        pairs = zip(cache.layers, about["layers"], strict=True)
        made = [loader.layer(index, layer, sides) for index, (layer, sides) in enumerate(pairs)]
    for layer, fields in zip(cache.layers, made, strict=True):
        if holds_nothing(layer):
            continue
        vars(layer).update(fields)
        layer.is_initialized, layer.dtype, layer.device = True, layer.keys.dtype, layer.keys.device
        layer.batch_size, layer.num_heads = layer.keys.shape[:2]
        layer.k_head_dim, layer.v_head_dim = layer.keys.shape[3], layer.values.shape[3]


class _Loader:
    """The states that were read so far, of one new group."""

    def __init__(self, cache: Any, tensors: dict[str, Tensor]) -> None:
        self.cache, self.tensors = cache, tensors
        self.states: dict[tuple[int, str], KVState] = {}
        start = tensors.get("start")
        if start is not None:
            self.group = CacheGroup(cache.plan, start.shape[0], start.device, start, lockstep=True)

    def layer(self, index: int, layer: Any, sides: dict[str, Any]) -> dict[str, Any]:
        """The attributes of ``layer``, which has this index in the cache."""
        fields: dict[str, Any] = {"roles": tuple(sides)} if sides else {}
        for side, (role, (*shape, dtype)) in zip(("keys", "values"), sides.items(), strict=False):
            geometry = Geometry(tuple(shape), getattr(torch, dtype), (side, role) == ("values", "key"))
            state = self._state(layer, role, geometry)
            for name, tensor in state.owned.items():
                tensor.copy_(self._named(f"layers.{index}.{role}.{name}", tensor))
            fields[side] = QuantizedKV.of(state)
        if not sides and not holds_nothing(layer):
            fields = {name: _static(self._named(f"layers.{index}.{name}")) for name in ("keys", "values")}
        for name in _counters(layer):
            counter = self._named(f"layers.{index}.{name}")
            fields[name] = int(counter) if isinstance(getattr(layer, name), int) else _static(counter)
        return fields

    def _state(self, of_cache: Any, role: str, geometry: Geometry) -> KVState:
        layer = of_cache.layer_idx
        entry = self.cache.plan.layers[layer].of(role)
        below = None if entry.partner is None else self.states.get((entry.partner, role))
        lower = None if below is None else below.spec
        spec = entry.bind(layer, geometry.shape, geometry.dtype, lower, geometry.rotary, of_cache.window)
        state = self.states[layer, cast(Role, role)] = KVState(spec, self.group, below if spec.borrowed else None)
        return state

    def _named(self, name: str, like: Tensor | None = None) -> Tensor:
        found = self.tensors.get(name)
        if found is None or (like is not None and (found.shape, found.dtype) != (like.shape, like.dtype)):
            seen = "none" if found is None else f"{list(found.shape)} of {found.dtype}"
            wanted = "" if like is None else f" of {list(like.shape)}, {like.dtype}"
            raise ArgumentError(f"a tensor {name!r}{wanted} belongs to this cache, got {seen}")
        return found


def _counters(layer: Any) -> list[str]:
    if holds_nothing(layer):
        return []
    names = [name for name in COUNTERS if hasattr(layer, name)]
    more = hasattr(layer, "conv_states") or hasattr(layer, "indexer_keys")
    if more or not names or not isinstance(getattr(layer, "keys", None), Tensor | None):
        raise CacheStateError(f"only static layers of keys and values can be saved, not a {type(layer).__name__}")
    return names


def _static(tensor: Tensor) -> Tensor:
    copied = tensor.clone()
    torch._dynamo.mark_static_address(copied)
    return copied


def _about(tensors: dict[str, Tensor]) -> dict[str, Any]:
    try:
        if not isinstance(tensors, dict):
            raise TypeError(f"a dict of tensors is needed, not a {type(tensors).__name__}")
        about = json.loads(bytes(tensors["about"].tolist()))
        if about["xquant_cache"] != VERSION:
            raise ValueError(f"it is of version {about['xquant_cache']!r}, this xquant_fx reads {VERSION}")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ArgumentError(f"this is nothing that XQuantCache.state_dict() gave: {error!r}") from error
    return cast(dict[str, Any], about)


def _check(cache: Any, about: dict[str, Any]) -> None:
    plan = None if about["plan"] is None else Plan.from_json(about["plan"])
    if plan != cache.plan:
        raise ArgumentError(f"the saved cache was made by another plan:\n{plan}\nthis cache has\n{cache.plan}")
    ours = (cache.get_max_length(), len(cache.layers))
    theirs = (about["max_cache_len"], len(about["layers"]))
    if ours != theirs:
        raise ArgumentError(f"max_cache_len and layers must be {theirs} as in the saved cache, got {ours}")
