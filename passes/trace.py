"""Data flow in a Dynamo-level graph: what an operand comes from, and what a buffer is used for.

Only ops are looked at, never names. A view-like op changes where an element sits (or its dtype) but
not which buffer it came from.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch.fx import Node

from xquant_fx.passes.records import Source
from xquant_fx.passes.vocabulary import COPIES, VIEWS, is_in_place, kind, op_name

_PLAIN_FLOATS = frozenset({torch.float64, torch.float32, torch.bfloat16, torch.float16})


def fake(node: object) -> torch.Tensor | None:
    """The fake tensor Dynamo recorded for ``node``, if it has one."""
    value = node.meta.get("example_value") if isinstance(node, Node) else None
    return value if isinstance(value, torch.Tensor) else None


def value_of(node: Node) -> torch.Tensor:
    """The fake tensor of a node that is known to have one."""
    value = fake(node)
    assert value is not None, f"{node} has no fake tensor"
    return value


def at_hand(size: object) -> int | None:
    """A size as it is in this call, where Dynamo may leave it open; None if not even that is known."""
    if isinstance(size, torch.SymInt):
        return int(size.node.hint) if size.node.has_hint() else None
    return size if isinstance(size, int) else None


def number_by_now(size: Any) -> Any:
    """The number that an open ``size`` turned out to be; itself where it is a number, or open."""
    known = size.node.maybe_as_int() if isinstance(size, torch.SymInt) else None
    return size if known is None else known


def argument(node: Node, index: int, name: str, default: object = None) -> object:
    """A call's argument, however it was passed; a dimension may be called ``axis``, too."""
    if len(node.args) > index:
        return node.args[index]
    return node.kwargs.get("axis" if name == "dim" and "axis" in node.kwargs else name, default)


def operand(node: Node, index: int = 0) -> Node | None:
    """The positional argument ``index`` if it is a node."""
    value = node.args[index] if len(node.args) > index else None
    return value if isinstance(value, Node) else None


def keeps_numbers(node: Node) -> bool:
    """Whether ``node`` gives its first argument's numbers, up to the rounding of a 16-bit type."""
    value = fake(node)
    return kind(node) in ("cast", "contiguous") and value is not None and value.dtype in _PLAIN_FLOATS


def is_view_like(node: Node) -> bool:
    """Whether ``node`` only rearranges, repeats or casts its first argument."""
    return kind(node) in VIEWS


def shares_memory(node: Node) -> bool:
    """Whether ``node`` may be a view of its first argument, as torch means it: writes to one show in the other.

    Indexing by a tensor and a cast to another dtype copy.
    """
    if not is_view_like(node):
        return node.op in ("call_method", "call_function") and _returns_alias(op_name(node))
    if kind(node) in COPIES:
        return False
    if kind(node) == "getitem":
        index = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
        return not any(isinstance(part, list) or fake(part) is not None for part in index)
    result, source = fake(node), fake(node.args[0])
    return result is None or source is None or result.dtype == source.dtype


@functools.cache
def _returns_alias(name: str) -> bool:
    """Whether the op ``name`` of torch may return a view of its input, by its schemas: ``select``, ``unbind``."""
    packet = getattr(torch.ops.aten, name, None)
    overloads = packet.overloads() if isinstance(packet, torch._ops.OpOverloadPacket) else ()  # no method: ``__get__``
    schemas = (getattr(packet, overload)._schema for overload in overloads)
    returns = (result.alias_info for schema in schemas for result in schema.returns)
    return any(alias is not None and not alias.is_write for alias in returns)


def memory_of(node: Node) -> Node:
    """The first node, going back through views of any kind and ops in place, whose memory ``node`` may show."""
    before = operand(node)
    while before is not None and (is_view_like(node) or shares_memory(node) or is_in_place(node)):
        node, before = before, operand(before)
    return node


def source_of(node: Node, stand_ins: Mapping[Node, Node] | None = None) -> Source:
    """Walk back from an operand through views; ``stand_ins`` maps nodes to the buffer that they stand for."""
    path: list[str] = []
    reader: Node | None = None
    while True:
        before = operand(node)
        if stand_ins and node in stand_ins:
            node = stand_ins[node]
        elif is_view_like(node) and before is not None:
            path.append(op_name(node))
            node, reader = before, node
        else:
            return Source(node, tuple(reversed(path)), reader)


def readers(node: Node, follow: Callable[[Node], bool] = is_view_like) -> Iterator[tuple[Node, Node]]:
    """(user, operand) pairs at the ends of all view chains from ``node``."""
    for user in node.users:
        if follow(user) and user.args[0] is node:
            yield from readers(user, follow)
        else:
            yield user, node


def is_returned(node: Node) -> bool:
    """Whether ``node`` is a result of its graph."""
    return any(user.op == "output" for user in node.users)


def is_shape_query(node: Node) -> bool:
    """Whether ``node`` asks for sizes only (dynamic shapes put such calls into the graph)."""
    return kind(node) == "shape"


def same_value(a: object, b: object, depth: int = 6) -> bool:
    """Whether two nodes compute the same from the same inputs (positions: no op in them has effects)."""
    if isinstance(a, slice) and isinstance(b, slice):
        return same_value(a.start, b.start, depth) and same_value(a.stop, b.stop, depth)
    if not (isinstance(a, Node) and isinstance(b, Node)):
        return not isinstance(a, Node) and not isinstance(b, Node) and a == b
    if a is b:
        return True
    if depth == 0 or "placeholder" in (a.op, b.op) or (a.op, a.target) != (b.op, b.target) or a.kwargs != b.kwargs:
        return False
    pairs = zip(a.args, b.args, strict=False)
    return len(a.args) == len(b.args) and all(same_value(x, y, depth - 1) for x, y in pairs)


def full_index(index: object, rank: int) -> list[Any] | None:
    """``index`` as one item per dimension; None if it adds dimensions or is no plain one."""
    items = list(index) if isinstance(index, tuple) else [index]
    if any(item is None or isinstance(item, list | bool) for item in items):
        return None
    if Ellipsis in items:
        at = items.index(Ellipsis)
        items[at : at + 1] = [slice(None)] * (rank - len(items) + 1)
    return items + [slice(None)] * (rank - len(items)) if len(items) <= rank else None


def is_whole(item: object, size: object) -> bool:
    """Whether ``item`` is a slice that takes all of a dimension of this ``size``."""
    if not isinstance(item, slice):
        return False
    bounds = (item.start, item.stop, item.step)
    if item.start in (None, 0) and item.stop is None and item.step in (None, 1):
        return True
    known = all(isinstance(bound, int | None) for bound in bounds)
    return isinstance(size, int) and known and item.indices(size) == (0, size, 1)


def takes_all(node: Node) -> bool:
    """Whether ``node``, an indexing, gives all of its first argument, by slices."""
    value = value_of(node.args[0])  # type: ignore[arg-type]
    items = full_index(node.args[1], value.dim())
    return items is not None and all(is_whole(item, size) for item, size in zip(items, value.shape, strict=True))


def is_int(value: object) -> bool:
    """Whether ``value`` is a number, known or not."""
    if isinstance(value, Node):
        return isinstance(value.meta.get("example_value"), int | torch.SymInt)
    return isinstance(value, int) and not isinstance(value, bool)
