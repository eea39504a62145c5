"""Follow the axes of a KV buffer through a chain of views: which axis of the operand is what.

A dimension of a tensor is a tuple of the buffer's axes "B", "H", "N", "D" and "repeat", in order of
significance; axes of size 1 are left out. ``None`` as a result means that a view was not understood.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.fx import Node

from xquant_fx.passes.trace import argument, fake, keeps_numbers, operand, value_of
from xquant_fx.passes.vocabulary import kind

Axes = tuple[tuple[str, ...], ...]


def expected(shape: tuple[int, ...], *dims: str) -> Axes:
    """Axes of a tensor whose dimensions are ``dims`` (such as "B", "H repeat"), for a buffer of ``shape``."""
    ones = {name for name, size in zip("BHND", shape, strict=True) if size == 1}
    return tuple(tuple(name for name in dim.split() if name not in ones) for dim in dims)


def axes_of(node: Node, root: Node) -> Axes | None:
    """Axes of ``node``, a view of the buffer ``root`` [B, H, N, D]."""
    chain: list[Node] = []
    while node is not root:
        chain.append(node)
        before = operand(node)
        if before is None:
            return None
        node = before
    sizes = dict(zip("BHND", value_of(root).shape, strict=True))
    return followed(list(reversed(chain)), expected(value_of(root).shape, *"BHND"), sizes)


def followed(chain: list[Node], axes: Axes | None, sizes: dict[str, int]) -> Axes | None:
    """Axes after the views ``chain``, in program order, of a tensor that has ``axes`` of ``sizes``."""
    for view in chain:
        if fake(view) is None or axes is None:
            return None
        axes = _view(view, axes, sizes, tuple(value_of(view).shape))
    return axes


def _view(node: Node, axes: Axes, sizes: dict[str, int], shape: tuple[int, ...]) -> Axes | None:
    what, rank = kind(node), len(axes)
    if what in ("clone", "detach") or keeps_numbers(node):
        return axes
    if what == "transpose":
        a, b = (_index(node, i, f"dim{i - 1}", rank) for i in (1, 2))
        order = list(range(rank))
        order[a], order[b] = b, a
        return tuple(axes[i] for i in order)
    if what == "mT":
        return (*axes[:-2], axes[-1], axes[-2])
    if what == "permute":
        first: Any = node.args[1] if len(node.args) > 1 else node.kwargs["dims"]
        dims: Any = node.args[1:] if isinstance(first, int) else first
        return tuple(axes[i % rank] for i in dims)
    if what == "unsqueeze":
        at = _index(node, 1, "dim", rank + 1)
        return (*axes[:at], (), *axes[at:])
    if what == "getitem":
        return _getitem(node.args[1], axes, sizes)
    if what == "expand":
        return _expand(axes, sizes, shape)
    if what == "repeat_interleave":
        return _repeat(node, axes, sizes)
    other_numbers = isinstance(argument(node, 1, "dtype"), torch.dtype)  # view(dtype) reads the same bits anew
    if what in ("reshape", "view") and not other_numbers:
        return regrouped(axes, sizes, shape)
    return None


def _index(node: Node, index: int, name: str, rank: int) -> int:
    """A dimension that the call names, counted from the front."""
    dim: Any = argument(node, index, name, node.kwargs.get(name.replace("dim", "axis")))
    return int(dim) % rank


def _size(dim: tuple[str, ...], sizes: dict[str, int]) -> int:
    return math.prod(sizes[name] for name in dim)


def _getitem(index: object, axes: Axes, sizes: dict[str, int]) -> Axes | None:
    """Full slices and new axes of size 1; anything else selects."""
    items = list(index) if isinstance(index, tuple) else [index]
    if Ellipsis in items:
        at = items.index(Ellipsis)
        items[at : at + 1] = [slice(None)] * (len(axes) - sum(i is not None for i in items) + 1)
    out: list[tuple[str, ...]] = []
    rest = list(axes)
    for item in items:
        if item is None:
            out.append(())
        elif isinstance(item, slice) and rest:
            if not _takes_all(item, _size(rest[0], sizes)):
                return None
            out.append(rest.pop(0))
        else:
            return None
    return (*out, *rest)


def _takes_all(item: slice, size: object) -> bool:
    """Whether a slice takes a whole dimension; a symbolic ``size`` is not asked for its value."""
    bounds = (item.start, item.stop, item.step)
    if not isinstance(size, int):
        return item.start in (None, 0) and item.stop is None and item.step in (None, 1)
    full = range(size)
    return all(v is None or isinstance(v, int) for v in bounds) and full[item] == full


def _expand(axes: Axes, sizes: dict[str, int], shape: tuple[int, ...]) -> Axes | None:
    """Only one axis of size 1 may grow: that of the repeated heads."""
    if len(shape) != len(axes):
        return None
    out = []
    for dim, size in zip(axes, shape, strict=True):
        if _size(dim, sizes) == size:
            out.append(dim)
        elif not dim and "repeat" not in sizes:
            sizes["repeat"] = size
            out.append(("repeat",))
        else:
            return None
    return tuple(out)


def _repeat(node: Node, axes: Axes, sizes: dict[str, int]) -> Axes | None:
    count, dim = argument(node, 1, "repeats"), argument(node, 2, "dim")
    if not isinstance(count, int) or not isinstance(dim, int) or "repeat" in sizes:
        return None
    if count == 1:
        return axes
    sizes["repeat"], dim = count, dim % len(axes)
    return (*axes[:dim], (*axes[dim], "repeat"), *axes[dim + 1 :])


def regrouped(axes: Axes, sizes: dict[str, int], shape: tuple[int, ...]) -> Axes | None:
    """Deal the axes out, in order, to dimensions of the new sizes."""
    left = [name for dim in axes for name in dim if sizes[name] != 1]
    out: list[tuple[str, ...]] = []
    for size in shape:
        taken: list[str] = []
        while _size(tuple(taken), sizes) < size and left:
            taken.append(left.pop(0))
        if _size(tuple(taken), sizes) != size:
            return None
        out.append(tuple(taken))
    return None if left else tuple(out)
