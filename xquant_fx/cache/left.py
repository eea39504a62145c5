"""Ordinary buffers that must not be taken over (again), each with the reason.

A buffer that was quantized once and is ordinary now holds dequantized values: to quantize it again would add errors
to errors. The registry keeps no buffer alive.
"""

from __future__ import annotations

from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from xquant_fx.cache.aliases import owner_of

ONCE = "it was dequantized from a quantized buffer, and quantizing it again would add to the error"

_left: WeakIdKeyDictionary = WeakIdKeyDictionary()


def leave(buffer: Tensor, reason: str) -> None:
    """Have ``buffer`` stay as it is from now on, for ``reason``."""
    _left[owner_of(buffer)] = reason


def why_left(buffer: Tensor) -> str:
    """Why ``buffer`` stays as it is; "" if nothing was said of it."""
    reason: str = _left.get(owner_of(buffer), "")
    return reason
