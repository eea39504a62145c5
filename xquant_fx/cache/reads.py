"""Eager reads of quantized buffers by any op of torch: on dequantized values, never through a view.

An op that torch means to return a view gets a copy, on which writes are refused: they would be lost. What goes past ops
to a tensor's memory (pointers, DLPack, NumPy, shared memory) is refused, too: there is none.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_any, tree_map

from xquant_fx.errors import CacheStateError, UnsupportedWriteError


class Dequantized(torch.Tensor):
    """A tensor that ops read by way of ``dense()``."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def untyped_storage(self) -> torch.UntypedStorage:
        """For Dynamo alone, which describes every input by its storage; there is nothing in it."""
        if torch._guards.TracingContext.try_get() is None:
            _refuse_memory(self, "untyped_storage")
        return super().untyped_storage()

    @property
    def data(self) -> Any:  # type: ignore[override]
        """Reads as the tensor itself; cannot be set."""
        return self.detach()

    @data.setter
    def data(self, value: Any) -> None:
        _refuse_memory(self, ".data = ...")

    @property
    def origin(self) -> str:
        """The quantized buffer behind it, for people."""
        raise NotImplementedError

    def dense(self) -> Tensor:
        """The values as an ordinary tensor."""
        raise NotImplementedError

    def first_tokens(self) -> Any:
        """The state behind it and how many of its first tokens this is, if it is that and no more."""
        return None

    def dequantize(self) -> Tensor:
        """The values as an ordinary tensor of the same dtype, a copy."""
        return self.dense().clone()

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return self.dequantize()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.dequantize().__reduce_ex__(protocol)

    def refuse_write(self, func: Any) -> None:
        """Raise UnsupportedWriteError, as ``func`` writes to this."""
        raise NotImplementedError


#: Methods that reach for memory.
ESCAPES = (
    "data_ptr", "const_data_ptr", "storage", "__dlpack__", "__dlpack_device__", "share_memory_", "pin_memory", "numpy",
    "__array__", "tolist", "apply_", "map_",
)  # fmt: skip


def _refuse_memory(tensor: Dequantized, what: str) -> NoReturn:
    raise CacheStateError(
        f"{tensor.origin}: codes are stored, so there is no memory of keys or values for {what}; dequantize() gives a "
        "full-precision copy, the cache's state_dict() what is stored"
    )


def _escape(name: str) -> Any:
    def refuse(self: Dequantized, *args: Any, **kwargs: Any) -> NoReturn:
        _refuse_memory(self, name)

    refuse.__name__ = name
    return refuse


for _name in ESCAPES:
    setattr(Dequantized, _name, _escape(_name))


@functools.wraps(torch._C._to_dlpack)
def _to_dlpack(tensor: Any, *args: Any, **kwargs: Any) -> Any:
    if isinstance(tensor, Dequantized):
        _refuse_memory(tensor, "to_dlpack")
    return torch._C._to_dlpack(tensor, *args, **kwargs)


# Torch's own asks no subclass: of a tensor without memory it says that it should not be traced.
for _module in (torch, torch.utils.dlpack):
    vars(_module)["to_dlpack"] = _to_dlpack


def wrapper(cls: type, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Any:
    """An instance of ``cls`` that has a shape and no memory."""
    with torch.inference_mode(False):  # or only inference mode could write to it
        buffer: Any = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)
    torch._C._set_throw_on_mutable_data_ptr(buffer)  # C++ code that asks for memory gets an error, not address 0
    return buffer


class Copied(Dequantized):
    """Dequantized numbers of the buffer ``_origin``: reading is fine, writing would be lost."""

    _origin: str

    @property
    def origin(self) -> str:
        """The buffer that this is a copy of."""
        return self._origin

    def refuse_write(self, func: Any) -> None:
        """Say what to do instead."""
        raise UnsupportedWriteError(
            f"{self.origin}: {func} on a dequantized copy of a quantized KV buffer would be lost; append tokens "
            "with index_copy_(2, positions, x) or buffer[:, :, positions] = x"
        )


class ReadOnlyCopy(Copied):
    """A copy where torch expects a view."""

    base: Tensor

    @staticmethod
    def __new__(cls, base: Tensor, origin: str) -> ReadOnlyCopy:
        with torch.inference_mode(False):  # a view of what inference mode did not make must not be one of its tensors
            copied = torch.Tensor._make_wrapper_subclass(
                cls, base.shape, strides=base.stride(), storage_offset=0, dtype=base.dtype, device=base.device
            )
        torch._C._set_throw_on_mutable_data_ptr(copied)
        return copied

    def __init__(self, base: Tensor, origin: str):
        self.base, self._origin = base, origin

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"ReadOnlyCopy({self.origin}, {self.base})"

    def dense(self) -> Tensor:
        """The copy."""
        return self.base

    @classmethod
    @torch._dynamo.disable
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return read(func, args, kwargs or {})


class Token(Dequantized):
    """One token [B, H, D] of a buffer, ``buffer[:, :, p]``: read dequantized, and appended by copying into it."""

    part: Dequantized
    append: Callable[[Tensor], None]

    @staticmethod
    def __new__(cls, part: Dequantized, append: Callable[[Tensor], None]) -> Token:
        batch, heads, _, dim = part.shape
        token: Token = wrapper(cls, (batch, heads, dim), part.dtype, part.device)
        return token

    def __init__(self, part: Dequantized, append: Callable[[Tensor], None]):
        self.part, self.append = part, append

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"Token({self.part!r})"

    @property
    def origin(self) -> str:
        """The buffer that the token is of."""
        return self.part.origin

    def dense(self) -> Tensor:
        """The token's values."""
        return self.part.dense()[:, :, 0]

    def refuse_write(self, func: Any) -> None:
        """Anything but a copy is refused, as the buffer itself refuses it."""
        self.part.refuse_write(func)

    @classmethod
    @torch._dynamo.disable
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.copy_.default and isinstance(args[0], Token):
            args[0].append(args[1].expand(args[0].shape).unsqueeze(2))
            return args[0]
        return read(func, args, kwargs or {})


def end_trials(*values: Any) -> bool:
    """Before uncompiled code gets to quantized buffers among ``values``: those on trial become what they were, the
    objects themselves; returns whether any did."""
    ended = False
    for value in values:
        if isinstance(value, tuple | list):
            ended = end_trials(*value) or ended
        elif isinstance(value, Dequantized) and (state := getattr(value, "state", None)) is not None:
            trial = state.group.on_trial
            if trial is not None and trial.ends_at_once:
                trial.take_back()
                ended = True
    return ended


def read(func: Any, args: Any, kwargs: Any) -> Any:
    """Run ``func`` on dequantized arguments.

    Raises:
        UnsupportedWriteError: it writes to one of them.
    """
    written, is_view = _told(func)
    for i, name in written:
        given = args[i] if i < len(args) else kwargs.get(name)
        for value in given if isinstance(given, tuple | list) else (given,):
            if isinstance(value, Dequantized):
                value.refuse_write(func)
    origin = args[0].origin if is_view and isinstance(args[0], Dequantized) else ""
    args, kwargs = _dense(args), _dense(kwargs)
    out = func(*args, **kwargs)
    if not origin or tree_any(lambda a: isinstance(a, FakeTensor), args):
        return out
    return tree_map(lambda part: ReadOnlyCopy(part, origin) if isinstance(part, Tensor) else part, out)


@functools.cache
def _told(func: Any) -> tuple[tuple[tuple[int, str], ...], bool]:
    """What the schema of ``func`` tells: what it writes to, by place and name, and whether it gives views."""
    arguments = [(i, a.name, a.alias_info) for i, a in enumerate(func._schema.arguments)]
    written = tuple((i, name) for i, name, alias in arguments if alias is not None and alias.is_write)
    return written, any(r.alias_info is not None for r in func._schema.returns)


def _dense(value: Any) -> Any:
    """``value`` with what is read dequantized in it; ``tree_map`` takes longer than a small kernel."""
    if isinstance(value, Dequantized):
        return value.dense()
    if type(value) in (tuple, list):
        return type(value)(_dense(each) for each in value)
    if type(value) is dict:
        return {name: _dense(each) for name, each in value.items()}
    return value
