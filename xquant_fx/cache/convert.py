"""Turn an ordinary KV buffer into a :class:`QuantizedKV`, and back, without changing who holds it.

The tensor *object* stays the same: a cache, a module's buffer or a local variable that refers to it
finds a quantized buffer there afterwards, and the full-precision storage is freed. Uses
``torch._C._swap_tensor_impl``, what ``torch.utils.swap_tensors`` uses (that function refuses
tensors with weak references, which Dynamo's guards and fake-tensor memo hold; ours stay valid, as
they refer to the object). Checked on torch 2.11, 2.13 and 2.14.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from xquant_fx.cache.aliases import alias_of, no_alias, shown_by
from xquant_fx.cache.kv_tensor import QuantizedKV
from xquant_fx.cache.laid_out import LaidOutKV
from xquant_fx.cache.left import leave, why_left
from xquant_fx.cache.reads import Dequantized
from xquant_fx.cache.stacked import StackedKV
from xquant_fx.cache.state import KVState


def dequantize_in_place(buffer: QuantizedKV) -> None:
    """Make the object ``buffer`` an ordinary tensor of dequantized values, with zeros behind the last token."""
    ordered = buffer.ordered if isinstance(buffer, LaidOutKV) else None
    dims = buffer.dims if isinstance(buffer, LaidOutKV) else ""
    with torch.inference_mode(False), torch.no_grad():
        _make_plain(buffer, buffer.dequantize())
        if ordered is not None:  # by which a graph knows it
            _make_plain(ordered, alias_of(buffer, dims))


def _make_plain(buffer: Dequantized, plain: Tensor) -> None:
    static = getattr(buffer, "_dynamo_static_input_type", None)
    kind, kept = type(buffer), dict(plain.__dict__)
    attributes = dict(buffer.__dict__)
    buffer.__dict__.clear()
    plain.__dict__.update(attributes)  # it gets the wrapper, which is dropped with it
    buffer.__class__, plain.__class__ = torch.Tensor, kind  # type: ignore[assignment]
    torch._C._swap_tensor_impl(buffer, plain)
    buffer.__dict__.update(kept)
    if static is not None:
        torch._dynamo.mark_static_address(buffer)


def quantize_in_place(buffer: Tensor, state: KVState) -> Tensor:
    """Make the object ``buffer`` the QuantizedKV of ``state``; its own storage is released.

    Returns:
        What a program holds: ``buffer``, or what it shows in another order of dimensions, which is made quantized, too.
    """
    shown = shown_by(buffer)
    _make_quantized(buffer, QuantizedKV(state.spec, state.group.anchor, state))
    if shown is None:
        return buffer
    owner, dims = shown
    _make_quantized(owner, LaidOutKV(state.spec, state.group.anchor, state, None, dims))
    return owner


def quantize_keeping(buffer: Tensor, state: KVState) -> Tensor:
    """As ``quantize_in_place`` of a buffer that shows nothing else; returns what it was, which ``restore`` takes."""
    return _make_quantized(buffer, QuantizedKV(state.spec, state.group.anchor, state))


def restore(buffer: Tensor, original: Tensor) -> None:
    """Make the object ``buffer``, which is quantized, the ordinary tensor ``original``; that gets what it was."""
    assert isinstance(buffer, Dequantized)
    _make_plain(buffer, original)


def stack_in_place(buffer: Tensor, stack: StackedKV) -> None:
    """Make the object ``buffer`` the ``stack`` of what its parts became; its own storage is released."""
    _make_quantized(buffer, stack)


def restack_in_place(stack: StackedKV, new: Tensor) -> None:
    """Make the object ``stack`` what it is ``new``: another stack, or an ordinary tensor, as all parts are by now."""
    if isinstance(new, StackedKV):
        stack.become(new)
        return
    _make_plain(stack, new)
    if reason := why_left(new):
        leave(stack, reason)


def unstacked(parts: Sequence[Tensor], at: int) -> Tensor:
    """Ordinary tensors, some of which were given back, as one along ``at``, which is not taken over again."""
    return _left_as(torch.stack(list(parts), at), parts)


def with_rows(first: Tensor, rest: Tensor) -> Tensor:
    """Rows that were given back, and those behind them, as one tensor, which is not taken over again."""
    return _left_as(torch.cat([first, rest]), [first])


def _left_as(whole: Tensor, parts: Sequence[Tensor]) -> Tensor:
    if reason := next(filter(None, map(why_left, parts)), ""):
        leave(whole, reason)
    return whole


def _make_quantized(buffer: Tensor, new: Dequantized) -> Tensor:
    """Returns ``new``, which is the ordinary tensor that ``buffer`` was."""
    static = getattr(buffer, "_dynamo_static_input_type", None)  # a static address only if the buffer's was
    attributes = dict(new.__dict__)
    no_alias(buffer)
    buffer.__class__, new.__class__ = type(new), torch.Tensor  # type: ignore[assignment]
    torch._C._swap_tensor_impl(buffer, new)
    buffer.__dict__.update(attributes)
    new.__dict__.clear()
    if static is not None:
        torch._dynamo.mark_static_address(buffer)
    return new
