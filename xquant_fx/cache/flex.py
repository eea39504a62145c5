"""Flex attention on quantized buffers: eagerly, in the step that takes buffers over, and while Dynamo traces.

It is a higher-order op, which asks a table of its own what to do with a tensor subclass, and does not go by way of
``__torch_dispatch__``. Relied on: ``HigherOrderOperator.python_key_table``. Checked on torch 2.11, 2.13 and 2.14.
"""

from __future__ import annotations

from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from xquant_fx.cache.kv_tensor import QuantizedKV
from xquant_fx.cache.reads import Dequantized, ReadOnlyCopy

_FLEX = torch.ops.higher_order.flex_attention


def register() -> None:
    """Have flex attention read dequantized keys and values. Does nothing the second time."""
    rules = _FLEX.python_key_table
    if QuantizedKV in rules:
        return
    rules[QuantizedKV] = rules[ReadOnlyCopy] = _on_dense
    of_fakes = rules[FakeTensorMode]

    def fake(mode: Any, *args: Any, **kwargs: Any) -> Any:
        return of_fakes(mode, *_dense(args), **kwargs)

    rules[FakeTensorMode] = fake


def _on_dense(*args: Any, **kwargs: Any) -> Any:
    return _FLEX(*_dense(args), **kwargs)


def _dense(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Query, keys and values come first; the rest is no buffer."""
    return (*(x.dense() if isinstance(x, Dequantized) else x for x in args[:3]), *args[3:])


register()
