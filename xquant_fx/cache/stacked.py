"""``StackedKV``: quantized buffers that a program holds as one tensor.

Hand-written models keep keys and values, or those of all layers, in one tensor: [2, B, H, N, D], [L, 2, B, H, N, D],
[L, B, H, N, D] each. Each part is a buffer of its own to kernels, passes and reports: a graph is given the parts
(``compiler/stacked_graph.py``), and what the program holds is this.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from xquant_fx.cache.buffer_ops import is_zero
from xquant_fx.cache.growing import STORED_KV
from xquant_fx.cache.kv_tensor import QuantizedKV, refuse_aot
from xquant_fx.cache.left import leave_read
from xquant_fx.cache.reads import Dequantized, ReadOnlyCopy, read, wrapper
from xquant_fx.errors import UnsupportedWriteError

aten = torch.ops.aten


class StackedKV(Dequantized):
    """``parts`` along dimension ``at``: of each, which may be a stack in turn, what ``select(at, i)`` shows.

    Those that no graph has taken over yet are ordinary tensors, each in memory of its own.
    """

    parts: tuple[Any, ...]
    at: int
    handlers: ClassVar[dict[Any, Callable[..., Any]]]
    """Op to what it does with a stack as its first argument; NotImplemented: it reads numbers."""

    @staticmethod
    def __new__(cls, parts: Sequence[Any], at: int) -> StackedKV:
        shape = list(parts[0].shape)
        shape.insert(at, len(parts))
        made: StackedKV = wrapper(cls, shape, parts[0].dtype, parts[0].device)
        return made

    def __init__(self, parts: Sequence[Any], at: int) -> None:
        self.parts, self.at = tuple(parts), at
        anchors = [part.anchor for part in self.quantized if hasattr(part, "anchor")]
        self.anchor = anchors[0] if anchors else parts[0].new_empty(0)
        self.leaves = tuple(leaf for part in parts for leaf in leaves_of(part))
        """The buffers, in the order of the stack."""

    # As of a QuantizedKV: Dynamo gets to see one tensor; the rest is in the specs.
    def __tensor_flatten__(self) -> tuple[list[str], tuple[Any, ...]]:
        return ["anchor"], (self.at, tuple(map(_description, self.parts)))

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], context: Any, outer_size: Any, outer_stride: Any) -> StackedKV:
        at, parts = context
        return StackedKV([part_of(inner, *each) for each in parts], at)

    def _stable_hash_for_caching(self) -> str:
        return f"{self.at}{[getattr(part, '_stable_hash_for_caching', part.size)() for part in self.parts]}"

    def _is_view(self) -> bool:
        """False: Dynamo would look for a base with strides."""
        return False

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"StackedKV({self.origin}, shape={tuple(self.shape)}, dim={self.at})"

    def __deepcopy__(self, memo: dict[int, Any]) -> StackedKV:
        memo[id(self)] = new = of_parts(copy.deepcopy(self.parts, memo), self.at, type(self))
        return new

    def __reduce_ex__(self, protocol: Any) -> Any:
        return of_parts, (self.parts, self.at, type(self))

    def become(self, other: StackedKV) -> None:
        """Have the parts of ``other``, which holds the same numbers, from now on."""
        self.parts, self.anchor, self.leaves = other.parts, other.anchor, other.leaves

    @property
    def quantized(self) -> list[Any]:
        """The parts that are no ordinary tensors."""
        return [part for part in self.parts if isinstance(part, Dequantized)]

    @property
    def origin(self) -> str:
        """Layers and sides."""
        leaves = [leaf.origin for leaf in self.leaves if isinstance(leaf, Dequantized)]
        return f"{leaves[0]} to {leaves[-1]}" if leaves else "no layer"

    def dense(self) -> Tensor:
        """Dequantized copy; a tensor of the right shape only, while Dynamo traces."""
        return torch.stack([dense_of(part) for part in self.parts], self.at)

    def refuse_write(self, func: Any) -> None:
        """A stand-in that is traced may be written to: the passes look at the graph."""
        if not any(getattr(leaf, "state", leaf) is None for leaf in self.leaves):
            raise UnsupportedWriteError(
                f"{self!r}: {func} is not a way to append tokens to what is stacked along dimension {self.at}; nothing "
                "was written"
            )

    def part_dim(self, dim: int) -> int | None:
        """Which dimension of a part ``dim`` is; None of that along which parts are stacked."""
        dim %= self.dim()
        return None if dim == self.at else dim - (dim > self.at)

    def mapped(self, call: Callable[[Any], Any], at: int) -> Any:
        """What ``call`` gives of each part, stacked along ``at``; NotImplemented if one is numbers of codes."""
        found = [call(part) for part in self.parts]
        pairs = zip(self.parts, found, strict=True)
        are_numbers = any(isinstance(part, Dequantized) and _is_numbers(each) for part, each in pairs)
        return NotImplemented if are_numbers else self.like(found, at)

    def like(self, parts: Sequence[Any], at: int) -> StackedKV:
        """Such a stack of ``parts``."""
        return type(self)(parts, at)

    def shares(self, x: Tensor, at: int) -> Sequence[Tensor]:
        """What each part gets of ``x``, which is stacked along ``at``."""
        return x.unbind(at)

    def some_parts(self, start: Any, end: Any, step: int) -> Any:
        """A slice along the dimension of parts."""
        some = self.parts[slice(start, end, step)]
        return self.like(some, self.at) if some else NotImplemented

    def rest_of(self, indices: list[Any]) -> list[Any]:
        """An index of all as one of a part."""
        return [*indices[: self.at], *indices[self.at + 1 :]]

    def each(self, call: Callable[[Any, Tensor], Any], x: Tensor, at: int) -> StackedKV:
        """Have ``call`` write to each part its share of ``x``, which is stacked along ``at``; returns this stack."""
        for part, share in zip(self.parts, self.shares(x, at), strict=True):
            call(part, share)
        return self

    @classmethod
    @torch._dynamo.disable
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        refuse_aot(*args)
        handler = type(args[0]).handlers.get(func) if isinstance(args[0], StackedKV) else None
        if handler is not None:
            result = handler(*args, **(kwargs or {}))
            if result is not NotImplemented:
                return result
        out = read(func, args, kwargs or {})
        if type(out) is Tensor and isinstance(args[0], StackedKV) and out.shape == args[0].shape:
            leave_read(out, func)
        return out


def leaves_of(value: Any) -> tuple[Any, ...]:
    """The buffers of a stack, or ``value`` itself."""
    return value.leaves if isinstance(value, StackedKV) else (value,)


def _is_numbers(value: Any) -> bool:
    """Whether ``value`` is a copy: what is written to it would be lost."""
    return isinstance(value, ReadOnlyCopy) or not isinstance(value, Dequantized)


def _description(part: Any) -> tuple[Any, ...]:
    """What Dynamo guards on."""
    if type(part) is QuantizedKV:
        return QuantizedKV, part.exact_context(part.spec)
    if isinstance(part, Dequantized):
        return type(part), part.__tensor_flatten__()[1]  # type: ignore[attr-defined]
    return Tensor, tuple(part.shape), part.stride(), part.dtype


def part_of(inner: dict[str, Tensor], kind: Any, *what: Any) -> Any:
    """The stand-in for a part that ``_description`` describes."""
    if kind is Tensor:
        shape, strides, dtype = what
        return inner["anchor"].new_empty_strided(shape, strides, dtype=dtype)
    return kind.__tensor_unflatten__(inner, *what, None, None)


def dense_of(part: Any) -> Tensor:
    """The numbers of a part; one that was given back is an ordinary tensor."""
    dense: Tensor = part.dense() if isinstance(part, Dequantized) else part
    return dense


def stored_in(values: Any) -> Iterator[Any]:
    """The quantized buffers among ``values``, those of stacks one by one."""
    return (leaf for value in values for leaf in leaves_of(value) if isinstance(leaf, STORED_KV))


def of_parts(parts: Sequence[Any], at: int, kind: type[StackedKV] = StackedKV) -> StackedKV:
    """The stack of ``parts``, whose address compiled graphs may take for granted."""
    stack = kind(parts, at)
    torch._dynamo.mark_static_address(stack)
    return stack


def _select(kv: StackedKV, dim: int, index: int) -> Any:
    inner = kv.part_dim(dim)
    if inner is None:
        return aten.alias.default(kv.parts[index])
    return kv.mapped(lambda part: aten.select.int(part, inner, index), kv.at - (inner < kv.at))


def _slice(kv: StackedKV, dim: int = 0, start: Any = None, end: Any = None, step: int = 1) -> Any:
    if isinstance(start, torch.SymInt) or isinstance(end, torch.SymInt):
        return NotImplemented  # while Dynamo traces; to count from them would make numbers of them
    inner = kv.part_dim(dim)
    if inner is not None:
        return kv.mapped(lambda part: aten.slice.Tensor(part, inner, start, end, step), kv.at)
    return kv.some_parts(start, end, step)


def _unbind(kv: StackedKV, dim: int = 0) -> Any:
    return NotImplemented if kv.part_dim(dim) is not None else [aten.alias.default(part) for part in kv.parts]


def _alias(kv: StackedKV) -> Any:
    return kv.mapped(aten.alias.default, kv.at)


def _copy(kv: StackedKV, source: Tensor, non_blocking: bool = False) -> Any:
    """``stack[:, :, :, a:b] = x`` arrives as a copy into parts of the parts, ``load_state_dict`` as one of all."""
    if not isinstance(source, Dequantized) and all(getattr(leaf, "is_whole", False) for leaf in kv.leaves):
        return _fill(kv, source.any())  # all parts, or none
    return kv.each(aten.copy_.default, source.expand(kv.shape), kv.at)


def _zero(kv: StackedKV) -> Any:
    for part in kv.parts:
        aten.zero_.default(part)
    return kv


def _fill(kv: StackedKV, value: Any) -> Any:
    return _zero(kv) if is_zero(value) else NotImplemented


def _index_copy(kv: StackedKV, dim: int, pos: Tensor, x: Tensor) -> Any:
    inner = kv.part_dim(dim)
    if inner is None:
        return NotImplemented
    return kv.each(lambda part, share: aten.index_copy_.default(part, inner, pos, share), x, kv.at)


def _index_put(kv: StackedKV, indices: Any, x: Tensor, accumulate: bool = False) -> Any:
    chosen = [i for i, index in enumerate(indices) if index is not None]
    if accumulate or len(chosen) != 1 or chosen[0] == kv.at or indices[chosen[0]].dim() != 1:
        return NotImplemented
    shape = list(kv.shape)
    shape[chosen[0]] = indices[chosen[0]].shape[0]
    rest = kv.rest_of([*indices, *[None] * (kv.dim() - len(indices))])
    return kv.each(lambda part, share: aten.index_put_.default(part, rest, share), x.expand(shape), kv.at)


HANDLERS: dict[Any, Callable[..., Any]] = {
    aten.select.int: _select,
    aten.slice.Tensor: _slice,
    aten.unbind.int: _unbind,
    aten.alias.default: _alias,
    aten.detach.default: _alias,
    aten.copy_.default: _copy,
    aten.zero_.default: _zero,
    aten.fill_.Scalar: _fill,
    aten.fill_.Tensor: _fill,
    aten.index_copy_.default: _index_copy,
    aten.index_put_.default: _index_put,
}
StackedKV.handlers = HANDLERS
