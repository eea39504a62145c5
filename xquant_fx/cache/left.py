"""Ordinary buffers that must not be taken over (again), each with the reason.

A buffer that was quantized once and is ordinary now holds dequantized values: to quantize it again would add errors
to errors. What a layer keeps is found by the layer, which may make its buffers in a compiled prompt. The registries
keep nothing alive.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from xquant_fx.cache.aliases import owner_of

ONCE = "it was dequantized from a quantized buffer, and quantizing it again would add to the error"

#: What has the shape of a buffer and none of its numbers.
_ZEROS = {torch.ops.aten.zeros_like.default, torch.ops.aten.new_zeros.default}

_left: WeakIdKeyDictionary = WeakIdKeyDictionary()
_keepers: weakref.WeakSet[Any] = weakref.WeakSet()


def leave(buffer: Tensor, reason: str) -> None:
    """Have ``buffer`` stay as it is from now on, for ``reason``."""
    _left[owner_of(buffer)] = reason


def leave_read(buffer: Tensor, func: Any) -> None:
    """Have ``buffer``, which the op ``func`` made of a whole quantized one, stay as it is: it was quantized once."""
    if func not in _ZEROS:
        leave(buffer, ONCE)


def keep_buffers_of(layer: Any) -> None:
    """Have whatever are the ``keys`` and ``values`` of ``layer`` stay as they are, for its ``reason``."""
    _keepers.add(layer)


def why_kept(buffer: Tensor) -> str:
    """Why the layer whose buffer this is keeps it; "" if none does."""
    return next((layer.reason for layer in _keepers if buffer is layer.keys or buffer is layer.values), "")


def why_left(buffer: Tensor) -> str:
    """Why ``buffer`` stays as it is; "" if nothing was said of it."""
    reason: str = _left.get(owner_of(buffer), "")
    return reason
