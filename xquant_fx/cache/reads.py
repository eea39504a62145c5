"""Eager reads of quantized buffers by any op of torch: on dequantized values, never through a view.

An op that torch means to return a view gets a copy, on which writes are refused: they would be lost.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_any, tree_map

from xquant_fx.errors import UnsupportedWriteError


class Dequantized(torch.Tensor):
    """A tensor that ops read by way of ``dense()``."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @property
    def origin(self) -> str:
        """The quantized buffer behind it, for people."""
        raise NotImplementedError

    def dense(self) -> Tensor:
        """The values as an ordinary tensor."""
        raise NotImplementedError

    def refuse_write(self, func: Any) -> None:
        """Raise UnsupportedWriteError, as ``func`` writes to this."""
        raise NotImplementedError


class ReadOnlyCopy(Dequantized):
    """A dequantized copy where torch expects a view: reading is fine, writing would be lost."""

    base: Tensor
    _origin: str

    @staticmethod
    def __new__(cls, base: Tensor, origin: str) -> ReadOnlyCopy:
        return torch.Tensor._make_wrapper_subclass(
            cls, base.shape, strides=base.stride(), storage_offset=0, dtype=base.dtype, device=base.device
        )

    def __init__(self, base: Tensor, origin: str):
        self.base, self._origin = base, origin

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"ReadOnlyCopy({self.origin}, {self.base})"

    @property
    def origin(self) -> str:
        """The buffer that this is a copy of."""
        return self._origin

    def dense(self) -> Tensor:
        """The copy."""
        return self.base

    def refuse_write(self, func: Any) -> None:
        """Say what to do instead."""
        raise UnsupportedWriteError(
            f"{self.origin}: {func} on a dequantized copy of a quantized KV buffer would be lost; append tokens "
            "with index_copy_(2, positions, x) or buffer[:, :, positions] = x"
        )

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
        return torch.Tensor._make_wrapper_subclass(cls, (batch, heads, dim), dtype=part.dtype, device=part.device)

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


def read(func: Any, args: Any, kwargs: Any) -> Any:
    """Run ``func`` on dequantized arguments.

    Raises:
        UnsupportedWriteError: it writes to one of them.
    """
    for i, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            given = args[i] if i < len(args) else kwargs.get(argument.name)
            for value in given if isinstance(given, tuple | list) else (given,):
                if isinstance(value, Dequantized):
                    value.refuse_write(func)
    is_view = any(r.alias_info is not None for r in func._schema.returns)
    origin = args[0].origin if is_view and isinstance(args[0], Dequantized) else ""
    args, kwargs = tree_map(lambda a: a.dense() if isinstance(a, Dequantized) else a, (args, kwargs))
    out = func(*args, **kwargs)
    if not origin or tree_any(lambda a: isinstance(a, FakeTensor), args):
        return out
    return tree_map(lambda part: ReadOnlyCopy(part, origin) if isinstance(part, Tensor) else part, out)
