"""Find sliding windows that move: a buffer of N tokens that holds the last N of its own and of new ones.

    rolled = buffer.roll(-1, 2)                  full, for one token
    rolled[:, :, [-1]] = x
    buffer.copy_(rolled)

    whole = cat([buffer[:, :, 1:], x], 2)        full, for a chunk; or [:, :, :n] while it holds n < N tokens
    buffer.copy_(whole[:, :, -N:])

    buffer.copy_(x[:, :, -N:])                   empty, for a prompt longer than the window

Attention reads ``buffer`` after it was rolled, else ``whole`` or ``x``. This is what a ``StaticSlidingWindowLayer``
of transformers does (5.17 to 5.23).
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import guard_or_false

from xquant_fx.passes.records import Slide, Write
from xquant_fx.passes.trace import argument, fake, operand
from xquant_fx.passes.vocabulary import kind

_ALL = slice(None)


def find_slide(node: Node) -> Write | None:
    """The move of a window that the ``copy_`` of ``node`` ends."""
    buffer, last = operand(node), argument(node, 1, "src")
    value = fake(buffer)
    if kind(node) != "copy" or node.users or value is None or value.dim() != 4 or not isinstance(last, Node):
        return None
    length = value.shape[2]
    if buffer is None or not isinstance(length, int):
        return None
    return _rolled(node, buffer, last, length) or _cut(node, buffer, last, length)


def last_tokens_of(node: object) -> tuple[Node, int] | None:
    """(whole, n) if ``node`` is ``whole[:, :, -n:]`` of four dimensions."""
    start, stop = _tokens(node)
    if not isinstance(node, Node) or not isinstance(start, int) or start >= 0 or stop is not None:
        return None
    whole = operand(node)
    return None if whole is None else (whole, -start)


def _tokens(node: object) -> tuple[Any, Any]:
    """Bounds of the tokens that ``node`` takes of its first argument [B, H, T, D]; (0, 0) if it takes other things."""
    index = node.args[1] if isinstance(node, Node) and kind(node) == "getitem" else None
    value = fake(operand(node)) if isinstance(node, Node) and index is not None else None
    if not isinstance(index, tuple) or Ellipsis in index or value is None or value.dim() != 4:
        return 0, 0
    index = index + (_ALL,) * (4 - len(index))
    tokens = index[2] if len(index) == 4 and all(index[d] == _ALL for d in (0, 1, 3)) else None
    return (tokens.start, tokens.stop) if isinstance(tokens, slice) and tokens.step in (None, 1) else (0, 0)


def _rolled(node: Node, buffer: Node, rolled: Node, length: int) -> Write | None:
    shifts, dims = argument(rolled, 1, "shifts"), argument(rolled, 2, "dims")
    moved = kind(rolled) == "roll" and operand(rolled) is buffer and _one(shifts) == -1 and _one(dims) in (2, -2)
    sets = [user for user in rolled.users if user is not node]
    if not moved or len(sets) != 1 or kind(sets[0]) != "setitem" or not rolled < sets[0] < node:
        return None
    _, index, x = sets[0].args
    value = fake(x)
    if not isinstance(x, Node) or value is None or value.dim() != 4 or value.shape[2] != 1:
        return None
    if not isinstance(index, tuple) or len(index) < 3 or not _is_last(index[2], length):
        return None
    if any(part != _ALL for d, part in enumerate(index) if d != 2):
        return None
    return _write(node, buffer, x, Slide((rolled, sets[0]), None, length - 1, is_full=True))


def _one(value: object) -> object:
    """What ``roll`` takes as a number or as a tuple of one."""
    return value[0] if isinstance(value, tuple | list) and len(value) == 1 else value


def _is_last(index: object, length: int) -> bool:
    """Whether an index is that of the last token alone: ``tensor([-1])``, or a slice of it."""
    if isinstance(index, slice):
        return index.step in (None, 1) and (index.start, index.stop) in ((length - 1, length), (-1, None))
    return isinstance(index, Node) and index.target is torch.tensor and index.args[0] in ([-1], [length - 1])


def _cut(node: Node, buffer: Node, last: Node, length: int) -> Write | None:
    found = last_tokens_of(last)
    if found is None or found[1] != length or set(last.users) != {node}:
        return None
    whole, (_, tokens) = found[0], found
    value = fake(whole)
    if value is None or (tuple(value.shape[:2]), value.shape[3]) != ((fake(buffer).shape[:2]), fake(buffer).shape[3]):  # type: ignore[union-attr]
        return None
    if kind(whole) != "cat" or buffer not in _behind(whole):
        is_long = guard_or_false(value.shape[2] >= tokens)
        return _write(node, buffer, whole, Slide((last,), whole, 0, is_full=False)) if is_long else None
    parts = argument(whole, 0, "tensors")
    if argument(whole, 1, "dim", 0) not in (2, -2) or not isinstance(parts, tuple | list) or len(parts) != 2:
        return None
    old, x = parts
    if not isinstance(x, Node) or operand(old) is not buffer or len(old.users) != 1 or buffer in _behind(x):
        return None
    if any(user < node for user in whole.users if user is not last):
        return None
    bounds = _tokens(old)
    if bounds == (1, None):
        return _write(node, buffer, x, Slide((old, whole, last), whole, length - 1, is_full=True))
    if bounds[0] in (None, 0) and isinstance(bounds[1], int | Node) and bounds != (0, 0):
        return _write(node, buffer, x, Slide((old, whole, last), whole, bounds[1], is_full=False))
    return None


def _behind(node: Node) -> set[Node]:
    """What ``node`` reads, directly or by one op."""
    return {each for part in node.all_input_nodes for each in (part, *part.all_input_nodes)}


def _write(node: Node, buffer: Node, x: Node, slide: Slide) -> Write | None:
    value, whole = fake(x), fake(buffer)
    if value is None or whole is None or value.dim() != 4 or value.dtype != whole.dtype:
        return None
    past = whole.shape[2] if slide.is_full else slide.old or None
    return Write(node, buffer, x, slice(past, None), "sliding window", value.shape[2], slide=slide)
