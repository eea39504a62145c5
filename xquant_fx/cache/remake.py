"""The layers of a cache with other rows of the batch, or on another device: new buffers, old contents."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from xquant_fx.cache.group import CacheGroup
from xquant_fx.cache.kv_tensor import QuantizedKV
from xquant_fx.cache.state import KVState
from xquant_fx.errors import ArgumentError, CacheStateError

#: Attributes of layers that are tensors by number: those of linear attention.
STATES = ("conv_states", "recurrent_states")
#: Attributes whose batch is the second dimension.
SECOND = ("indexer_position_ids",)

Copy = Callable[[KVState, CacheGroup, "KVState | None"], KVState]


def select_rows(layers: Iterable[Any], rows_to_keep: Any) -> None:
    """Let each of these Hugging Face layers hold these rows of its batch: int64 [n], or bool [B]."""
    try:
        index = torch.as_tensor(rows_to_keep).reshape(-1)
        index = index.nonzero()[:, 0] if index.dtype == torch.bool else index.to(torch.int64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ArgumentError(f"rows of the batch are whole numbers, got {rows_to_keep!r}") from error
    layers = _in_use(layers)
    rows = layers[0].batch_size if layers else 0
    if layers and (not index.numel() or int(index.min()) < -rows or int(index.max()) >= rows):
        raise ArgumentError(f"rows must be some of the cache's {rows}, got {index.tolist()}")
    index = index % max(rows, 1)
    _remake(
        layers,
        lambda group: group.with_start(group.start.index_select(0, index.to(group.start.device))),
        lambda state, group, lower: selected(state, index, group, lower),
        lambda name, tensor: _rows_of(name, tensor, index),
    )
    for layer in layers:
        layer.batch_size = index.shape[0]


def move(layers: Iterable[Any], device: torch.device) -> None:
    """Move what each of these Hugging Face layers holds."""
    layers = _in_use(layers)
    if layers and layers[0].device == device:
        return
    _remake(
        layers,
        lambda group: group.with_start(group.start.to(device)),
        moved,
        lambda name, tensor: tensor.to(device),
    )
    for layer in layers:
        layer.device = device


def selected(state: KVState, index: Tensor, group: CacheGroup, lower: KVState | None) -> KVState:
    """A copy of ``state`` in ``group`` that holds the batch rows ``index``."""
    spec = dataclasses.replace(state.spec, shape=(index.shape[0], *state.spec.shape[1:]))
    new = KVState(spec, group, lower)
    for name, tensor in new.owned.items():
        rows = state.owned[name]
        tensor.copy_(rows if name == "length" else rows.index_select(0, index.to(rows.device)))
    if state.behind is not None:
        first, older = state.behind
        new.behind = first, older.index_select(0, index.to(older.device))
    return new


def moved(state: KVState, group: CacheGroup, lower: KVState | None) -> KVState:
    """A copy of ``state`` in ``group``, on the group's device."""
    new = KVState(state.spec, group, lower)
    for name, tensor in new.owned.items():
        tensor.copy_(state.owned[name])
    if state.behind is not None:
        new.behind = state.behind[0], state.behind[1].to(group.start.device)
    return new


def holds_nothing(layer: Any) -> bool:
    """Whether ``layer`` stands for one that reads another layer's keys and values (Gemma 3n and 4)."""
    return type(layer).__name__ == "DummyLayer"


def rows_held(layers: Iterable[Any]) -> int:
    """Rows of the batch that ``layers`` hold; 0 if they hold none."""
    held = (layer for layer in layers if getattr(layer, "batch_size", 0) and layer.is_initialized)
    return next((int(layer.batch_size) for layer in held), 0)


def _in_use(layers: Iterable[Any]) -> list[Any]:
    """Layers that hold something; those that are kept for later are let go."""
    for layer in layers:
        if not getattr(layer, "is_initialized", True) and isinstance(getattr(layer, "keys", None), QuantizedKV):
            layer.keys = layer.values = None
    # Layers of linear attention alone are never said to be in use, and have no keys.
    used = [layer for layer in layers if getattr(layer, "is_initialized", True) and not holds_nothing(layer)]
    other = sorted({type(layer).__name__ for layer in used if not isinstance(getattr(layer, "keys", None), Tensor)})
    if other:
        raise CacheStateError(f"only layers of keys and values can be changed so, and this cache has {other}")
    return used


@torch.inference_mode(False)
def _remake(
    layers: list[Any],
    regroup: Callable[[CacheGroup], CacheGroup],
    copy: Copy,
    change: Callable[[str, Tensor], Tensor],
) -> None:
    groups: dict[int, CacheGroup] = {}
    states: dict[int, KVState] = {}
    for layer in layers:
        for name, held in list(vars(layer).items()):
            if isinstance(held, QuantizedKV):
                old = held.live
                group = groups.setdefault(id(old.group), groups.get(id(old.group)) or regroup(old.group))
                lower = None if old.lower is None else states[id(old.lower)]
                states[id(old)] = copy(old, group, lower)
                setattr(layer, name, QuantizedKV.of(states[id(old)]))
            elif isinstance(held, Tensor):
                setattr(layer, name, _static(change(name, held), held))
            elif name in STATES:
                changed = {key: _static(change(name, each), each) for key, each in held.items() if each is not None}
                setattr(layer, name, {**held, **changed})


def _rows_of(name: str, tensor: Tensor, index: Tensor) -> Tensor:
    """Rows ``index`` of ``tensor``, the attribute ``name`` of a layer; of counters, which have no dimensions, all."""
    return tensor.index_select(int(name in SECOND), index.to(tensor.device)) if tensor.dim() else tensor


def _static(new: Tensor, old: Tensor) -> Tensor:
    """``new``, whose address is as static as that of ``old``."""
    if new is not old and hasattr(old, "_dynamo_static_input_type"):
        torch._dynamo.mark_static_address(new)
    return new
