"""What an operation gives for fake tensors, taken from the one before it whose arguments looked the same.

Dynamo runs each operation of each layer on fake tensors, 0.3 ms apiece, 1.6 for a linear layer, which is five
operations beneath. What comes out depends on nothing but the operation, what its arguments look like (``_look_of``),
and the dtype that numbers have, and layers are alike: most values look like an earlier one of the same trace.
Only pure operations are looked for (``_FUNCTIONS``, ``_METHODS``), only where no gradient is recorded, nothing is cast
by ``autocast`` and no size is open. All else is left to Dynamo.

Views lie in the storage of what they are views of, but torch does not know them as views, as it does not in inference
mode. That decides who sees a write through one, which Dynamo asks in higher-order operators alone: none is made there.

Relied on: ``torch._dynamo.utils._get_fake_value_impl``, which gives the value of a node, ``current_tracer`` of the
output graph with ``parent``, ``FakeTensor(mode, meta tensor, device)`` with ``fake_mode``, ``fake_device``,
``constant`` and ``real_tensor``, and ``in_kernel_invocation_manager``, inside which a meta tensor is one; all but the
first two as torch's own cache of fake tensors does. Checked on torch 2.11, 2.13 and 2.14.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, in_kernel_invocation_manager
from torch.fx import Node

Key = tuple[Any, ...]
Lies = Literal["the first", "in the first", "apart"]
ValueOf = Callable[..., Any]

#: They write to nothing, and ask for no random numbers and no values; ``tests/test_fake_values.py`` tries each.
_FUNCTIONS = frozenset((
    operator.add, operator.sub, operator.mul, operator.truediv, operator.pow, operator.neg, operator.matmul,
    operator.getitem, torch.add, torch.mul, torch.pow, torch.rsqrt, torch.mean, torch.tanh, torch.sigmoid, torch.matmul,
    torch.cat, torch.transpose, torch.unsqueeze, F.linear, F.silu, F.gelu, F.relu, F.softplus, F.softmax, F.layer_norm,
    torch.rms_norm,
))  # fmt: skip
_METHODS = frozenset((
    "add", "mul", "pow", "mean", "rsqrt", "tanh", "softmax", "matmul", "to", "type_as", "float", "bfloat16", "half",
    "contiguous", "view", "reshape", "flatten", "unflatten", "transpose", "permute", "unsqueeze", "squeeze", "expand",
))  # fmt: skip
#: What an argument may be beside tensors, and lists and slices of such.
_PLAIN = (int, float, bool, str, type(None), type(...), torch.dtype, torch.device, torch.memory_format, torch.layout)


class _OthersMayDifferError(Exception):
    """What the arguments look like does not tell what the operation gives."""


@dataclass(frozen=True)
class _Look:
    """What a value looked like; ``lies`` says where: in the place of the first tensor given, in its storage, apart."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype
    device: torch.device
    lies: Lies


def remembering(value_of: ValueOf) -> ValueOf:
    """``value_of(node, tx, allow_non_graph_fake=False)``, which for nodes like earlier ones is not called."""
    known: dict[Key, _Look | None] = {}

    def remembered(node: Node, tx: Any, allow_non_graph_fake: bool = False) -> Any:
        tensors: list[FakeTensor] = []
        try:
            key = _key(node, tx, tensors)
        except _OthersMayDifferError:
            return value_of(node, tx, allow_non_graph_fake)
        look = known.get(key)
        if look is not None and (look.lies != "in the first" or tx.output.current_tracer.parent is None):
            return _like(look, tensors[0])
        value = value_of(node, tx, allow_non_graph_fake)
        known[key] = _look(value, tensors, node.op == "call_method")
        return value

    return remembered


def _key(node: Node, tx: Any, tensors: list[FakeTensor]) -> Key:
    """All that the node's value depends on; the tensors among the arguments are added to ``tensors``."""
    pure = _FUNCTIONS if node.op == "call_function" else _METHODS if node.op == "call_method" else ()
    if node.target not in pure or "example_value" in node.meta or not _is_plain_here():
        raise _OthersMayDifferError
    names = tuple(node.kwargs)
    args = tuple(_looks_of((*node.args, *node.kwargs.values()), tx.fake_mode, tensors))
    if not tensors:
        raise _OthersMayDifferError
    return (node.target, names, args, torch.get_default_dtype())


def _is_plain_here() -> bool:
    """Whether operations do here what they do by themselves."""
    changed = torch.is_grad_enabled() or torch._C._is_any_autocast_enabled()
    return not changed and torch._C._functorch.peek_interpreter_stack() is None


def _looks_of(args: Any, mode: FakeTensorMode, tensors: list[FakeTensor]) -> Iterator[Any]:
    for arg in args:
        if isinstance(arg, Node):
            yield _look_of(arg.meta.get("example_value"), mode)
            tensors.append(arg.meta["example_value"])
        elif isinstance(arg, tuple | list):
            yield (type(arg), *_looks_of(arg, mode, tensors))
        elif isinstance(arg, slice):
            yield (slice, *_looks_of((arg.start, arg.stop, arg.step), mode, tensors))
        elif type(arg) in _PLAIN:
            yield (type(arg), arg)  # 1, 1.0 and True are equal
        else:
            raise _OthersMayDifferError


def _look_of(x: Any, mode: FakeTensorMode) -> Key:
    """All of a tensor that decides what comes out of an operation."""
    if type(x) is not FakeTensor or x.fake_mode is not mode or not _is_strided(x):
        raise _OthersMayDifferError
    return (x.dtype, x.shape, x.stride(), x.storage_offset(), x.fake_device, x.is_inference(), x.requires_grad)


def _is_strided(x: FakeTensor) -> bool:
    """Whether all to be said of it is sizes, strides and offset, all of them numbers, dtype and device."""
    has_values = x.constant is not None or x.real_tensor is not None
    if has_values or x._has_symbolic_sizes_strides or x.layout is not torch.strided:
        return False
    return not (x.is_quantized or x.is_conj() or x.is_neg())


def _look(value: Any, tensors: list[FakeTensor], may_be_given: bool) -> _Look | None:
    """None if another one cannot be made from it."""
    if type(value) is not FakeTensor or not _is_strided(value):
        return None
    first, offset, storage = tensors[0], int(value.storage_offset()), _storage(value)
    lies: Lies
    if value is first and may_be_given:
        lies = "the first"
    elif value.requires_grad or any(value is x or _storage(x) == storage != _storage(first) for x in tensors):
        return None
    elif storage == _storage(first):
        lies = "in the first"
    elif offset == 0:
        lies = "apart"
    else:
        return None
    return _Look(tuple(value.shape), value.stride(), offset, value.dtype, value.fake_device, lies)


def _storage(x: FakeTensor) -> int:
    return x.untyped_storage()._cdata


def _like(look: _Look, first: FakeTensor) -> FakeTensor:
    """A fake tensor that looks so; torch's own cache makes them in the same way."""
    if look.lies == "the first":
        return first
    mode, storage = first.fake_mode, first.untyped_storage()
    with in_kernel_invocation_manager(mode):
        made = torch.empty_strided(look.shape, look.stride, dtype=look.dtype, device="meta")
        if look.lies == "in the first":
            made.set_(storage, look.offset, look.shape, look.stride)
    return FakeTensor(mode, made, look.device)
