"""Follow the axes of a KV buffer through a chain of views: which axis of the operand is what.

Views may leave out heads, and all but the first tokens (``keys[:, :, : p + t]``).

A dimension of a tensor is a tuple of axes, in order of significance; axes of size 1 are left out. Axes are those of
the buffer, "B", "H", "N", "D"; "part", some of the heads in a row; and ``REPEATS``, along which nothing changes.
``None`` as a result means that a view was not understood.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from xquant_fx.passes.trace import argument, fake, keeps_numbers, operand, value_of
from xquant_fx.passes.vocabulary import kind

Axes = tuple[tuple[str, ...], ...]

#: Names of axes that repeat the same numbers: heads for grouped queries, say.
REPEATS = ("repeat", "repeat again")
#: What ``sizes`` call the first head of "part",
FIRST = "first"
#: and how many of the first tokens are taken, where not all are: a number or a node; None: all so far.
TAKEN = "taken"


class Tracked(NamedTuple):
    """What the axes of a view are."""

    axes: Axes
    sizes: dict[str, Any]
    """Of all axes; ``FIRST``: the head of the buffer that "part" begins with, if there is one; ``TAKEN``."""


def expected(shape: tuple[int, ...], *dims: str) -> Axes:
    """Axes of a tensor whose dimensions are ``dims`` (such as "B", "H repeat"), for a buffer of ``shape``."""
    ones = {name for name, size in zip("BHND", shape, strict=True) if size == 1}
    return tuple(tuple(name for name in dim.split() if name not in ones) for dim in dims)


def tracked(node: Node, root: Node) -> Tracked | None:
    """The axes of ``node``, a view of the buffer ``root`` [B, H, N, D]."""
    chain: list[Node] = []
    while node is not root:
        chain.append(node)
        before = operand(node)
        if before is None:
            return None
        node = before
    sizes: dict[str, Any] = dict(zip("BHND", value_of(root).shape, strict=True))
    sizes[TAKEN] = None
    axes = followed(list(reversed(chain)), expected(value_of(root).shape, *"BHND"), sizes)
    if sizes[TAKEN] is None:
        del sizes[TAKEN]
    return None if axes is None else Tracked(axes, sizes)


def followed(chain: list[Node], axes: Axes | None, sizes: dict[str, Any]) -> Axes | None:
    """Axes after the views ``chain``, in program order, of a tensor that has ``axes`` of ``sizes``, which change.

    The first tokens may be taken where ``sizes`` have ``TAKEN``.
    """
    for at, view in enumerate(chain):
        if kind(view) == "split" and at + 1 < len(chain):
            continue  # what is taken of the pieces comes next
        if fake(view) is None or axes is None:
            return None
        axes = _view(view, axes, sizes, tuple(value_of(view).shape))
    return axes


def _view(node: Node, axes: Axes, sizes: dict[str, Any], shape: tuple[int, ...]) -> Axes | None:
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
        split = operand(node)
        return (
            _piece(node, split, axes, sizes) if kind(split) == "split" else _getitem(node.args[1], axes, sizes, shape)
        )
    if what == "narrow":
        return _narrow(node, axes, sizes, shape)
    if what == "expand":
        return _expand(axes, sizes, shape)
    if what in ("repeat_interleave", "repeat"):
        return _repeat(node, axes, sizes) if what == "repeat_interleave" else _tile(node, axes, sizes)
    other_numbers = isinstance(argument(node, 1, "dtype"), torch.dtype)  # view(dtype) reads the same bits anew
    if what in ("reshape", "view") and not other_numbers:
        return regrouped(axes, sizes, shape)
    return None


def _index(node: Node, index: int, name: str, rank: int) -> int:
    """A dimension that the call names, counted from the front."""
    dim: Any = argument(node, index, name, node.kwargs.get(name.replace("dim", "axis")))
    return int(dim) % rank


def _size(dim: tuple[str, ...], sizes: dict[str, Any]) -> int:
    return math.prod(sizes[name] for name in dim)


def _getitem(index: object, axes: Axes, sizes: dict[str, Any], shape: tuple[int, ...] = ()) -> Axes | None:
    """Full slices, new axes of size 1, heads in a row and the first tokens; anything else selects.

    ``shape`` is that of the result.
    """
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
            dim = rest.pop(0)
            if _takes_all(item, _size(dim, sizes)):
                taken: tuple[str, ...] | None = dim
            elif dim == ("N",):
                taken = _first_tokens(item, sizes, shape[len(out)]) if shape else None
            else:
                taken = _heads(dim, item, sizes)
            if taken is None:
                return None
            out.append(taken)
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


def _heads(dim: tuple[str, ...], item: slice, sizes: dict[str, Any]) -> tuple[str, ...] | None:
    """The heads that ``item`` takes of a dimension of heads alone."""
    bounds = (item.start, item.stop, item.step)
    if dim not in (("H",), ("part",)) or not all(v is None or isinstance(v, int) for v in bounds):
        return None
    taken = range(sizes[dim[0]])[item]
    if taken.step != 1 or not taken:
        return None
    sizes[FIRST], sizes["part"] = sizes.get(FIRST, 0) + taken.start, len(taken)
    return ("part",) if len(taken) > 1 else ()


def _first_tokens(item: slice, sizes: dict[str, Any], size: Any) -> tuple[str, ...] | None:
    """The tokens that ``item`` takes, of which there are ``size`` then, if they are the first."""
    value = item.stop.meta.get("example_value") if isinstance(item.stop, Node) else item.stop
    begins = item.start in (None, 0) and item.step in (None, 1) and sizes.get(TAKEN, "not asked for") is None
    if not begins or not isinstance(value, int | torch.SymInt) or not statically_known_true(value == size):
        return None
    sizes["N"], sizes[TAKEN] = size, item.stop
    return () if isinstance(size, int) and size == 1 else ("N",)


def _piece(node: Node, split: Node | None, axes: Axes, sizes: dict[str, Any]) -> Axes | None:
    """``x.chunk(2, dim)[i]``: heads in a row."""
    pieces, number = split.meta.get("example_value") if split is not None else None, node.args[1]
    if split is None or not isinstance(pieces, tuple | list) or not isinstance(number, int):
        return None
    dim = _index(split, 2, "dim", len(axes)) if argument(split, 2, "dim") is not None else 0
    lengths = [piece.shape[dim] for piece in pieces]
    start = sum(lengths[: number % len(pieces)])
    return _taken(axes, dim, slice(start, start + lengths[number]), sizes)


def _narrow(node: Node, axes: Axes, sizes: dict[str, Any], shape: tuple[int, ...]) -> Axes | None:
    start, length = argument(node, 2, "start"), argument(node, 3, "length")
    if not isinstance(start, int) or start < 0 or not (isinstance(length, int) or start == 0):
        return None
    end: Any = start + length if isinstance(length, int) else length
    return _taken(axes, _index(node, 1, "dim", len(axes)), slice(start, end), sizes, shape)


def _taken(axes: Axes, dim: int, item: slice, sizes: dict[str, Any], shape: tuple[int, ...] = ()) -> Axes | None:
    return _getitem((*[slice(None)] * dim, item), axes, sizes, shape)


def _new_repeat(sizes: dict[str, Any], count: int) -> tuple[str, ...] | None:
    """A name for one more axis of repeats, ``count`` of them, if there is one left."""
    name = next((each for each in REPEATS if each not in sizes), None)
    if name is None:
        return None
    sizes[name] = count
    return (name,)


def _expand(axes: Axes, sizes: dict[str, Any], shape: tuple[int, ...]) -> Axes | None:
    """Axes of size 1 may grow: those of the repeated heads."""
    if len(shape) != len(axes):
        return None
    out = []
    for dim, size in zip(axes, shape, strict=True):
        same = _size(dim, sizes) == size
        now = dim if same or dim else _new_repeat(sizes, size)
        if now is None or (dim and not same):
            return None
        out.append(now)
    return tuple(out)


def _repeat(node: Node, axes: Axes, sizes: dict[str, Any]) -> Axes | None:
    count, dim = argument(node, 1, "repeats"), argument(node, 2, "dim")
    if not isinstance(count, int) or not isinstance(dim, int):
        return None
    repeat = () if count == 1 else _new_repeat(sizes, count)
    if repeat is None:
        return None
    dim = dim % len(axes)
    return (*axes[:dim], (*axes[dim], *repeat), *axes[dim + 1 :])


def _tile(node: Node, axes: Axes, sizes: dict[str, Any]) -> Axes | None:
    """``x.repeat(1, 2, 1, 1)``: all of a dimension, then all of it again."""
    counts: Any = node.args[1:]
    counts = counts[0] if len(counts) == 1 and isinstance(counts[0], tuple | list) else counts
    if len(counts) != len(axes) or not all(isinstance(count, int) and count > 0 for count in counts):
        return None
    out = []
    for dim, count in zip(axes, counts, strict=True):
        tile = () if count == 1 else _new_repeat(sizes, count)
        if tile is None:
            return None
        out.append((*tile, *dim))
    return tuple(out)


def regrouped(axes: Axes, sizes: dict[str, Any], shape: tuple[int, ...]) -> Axes | None:
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
