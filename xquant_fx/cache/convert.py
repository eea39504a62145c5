"""Turn an ordinary KV buffer into a :class:`QuantizedKV`, and back, without changing who holds it.

The tensor *object* stays the same: a cache, a module's buffer or a local variable that refers to it
finds a quantized buffer there afterwards, and the full-precision storage is freed. Uses
``torch._C._swap_tensor_impl``, what ``torch.utils.swap_tensors`` uses (that function refuses
tensors with weak references, which Dynamo's guards and fake-tensor memo hold; ours stay valid, as
they refer to the object). Checked on torch 2.11, 2.13 and 2.14.
"""

from __future__ import annotations

import torch
from torch import Tensor

from xquant_fx.cache.kv_tensor import QuantizedKV
from xquant_fx.cache.state import KVState


def dequantize_in_place(buffer: QuantizedKV) -> None:
    """Make the object ``buffer`` an ordinary tensor of dequantized values, with zeros behind the last token."""
    static = getattr(buffer, "_dynamo_static_input_type", None)
    kind = type(buffer)
    with torch.inference_mode(False), torch.no_grad():
        plain = buffer.dequantize()
    attributes = dict(buffer.__dict__)
    buffer.__dict__.clear()
    plain.__dict__.update(attributes)  # it gets the wrapper, which is dropped with it
    buffer.__class__, plain.__class__ = torch.Tensor, kind  # type: ignore[assignment]
    torch._C._swap_tensor_impl(buffer, plain)
    if static is not None:
        torch._dynamo.mark_static_address(buffer)


def quantize_in_place(buffer: Tensor, state: KVState) -> None:
    """Make the object ``buffer`` the QuantizedKV of ``state``; its own storage is released."""
    static = getattr(buffer, "_dynamo_static_input_type", None)
    new = QuantizedKV(state.spec, state.owned["length"], state)  # a static address only if the buffer's was
    attributes = dict(new.__dict__)
    buffer.__class__, new.__class__ = QuantizedKV, torch.Tensor  # type: ignore[assignment]
    torch._C._swap_tensor_impl(buffer, new)
    buffer.__dict__.update(attributes)
    if static is not None:
        torch._dynamo.mark_static_address(buffer)
