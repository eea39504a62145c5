"""Data flow in a Dynamo-level graph: what an operand comes from, and what a buffer is used for.

Only ops are looked at, never names. A view-like op changes where an element sits (or its dtype) but
not which buffer it came from.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator

import torch
from torch.fx import Node

from xquant_fx.passes.records import Source

VIEW_METHODS = frozenset(
    {
        "expand", "expand_as", "reshape", "view", "view_as", "contiguous", "transpose", "permute", "unsqueeze",
        "squeeze", "flatten", "unflatten", "to", "type", "float", "half", "bfloat16", "type_as", "swapaxes",
        "movedim", "narrow", "repeat", "repeat_interleave", "clone", "detach", "chunk", "split", "broadcast_to",
        "t", "mT",
    }
)
VIEW_FUNCTIONS = frozenset(
    {
        operator.getitem, torch.reshape, torch.transpose, torch.permute, torch.unsqueeze, torch.squeeze, torch.flatten,
        torch.narrow, torch.repeat_interleave, torch.clone, torch.swapaxes, torch.movedim, torch.broadcast_to,
        torch.chunk, torch.split, torch.functional.split, torch.detach,
    }
)

# View-like ops that always copy; indexing by a tensor and a cast to another dtype copy, too.
COPIES = frozenset({"clone", "repeat", "repeat_interleave"})

CASTS = frozenset({"to", "type", "type_as", "float", "half", "bfloat16", "contiguous"})
_PLAIN_FLOATS = frozenset({torch.float64, torch.float32, torch.bfloat16, torch.float16})


def keeps_numbers(node: Node) -> bool:
    """Whether ``node`` gives its first argument's numbers, up to the rounding of a 16-bit type."""
    return op_name(node) in CASTS and fake(node) is not None and fake(node).dtype in _PLAIN_FLOATS


def is_view_like(node: Node) -> bool:
    """Whether ``node`` only rearranges, repeats or casts its first argument."""
    if node.op == "call_method":
        return node.target in VIEW_METHODS
    if node.op != "call_function":
        return False
    if node.target is getattr:
        return node.args[1] in ("mT", "T", "data")
    return node.target in VIEW_FUNCTIONS


def shares_memory(node: Node) -> bool:
    """Whether ``node`` may be a view of its first argument, as torch means it: writes to one show in the other."""
    if not is_view_like(node) or op_name(node) in COPIES:
        return False
    if node.target is operator.getitem:
        index = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
        return not any(isinstance(part, list) or fake(part) is not None for part in index)
    mine, other = fake(node), fake(node.args[0])
    return mine is None or other is None or mine.dtype == other.dtype


def op_name(node: Node) -> str:
    """Name of a node's op, as people write it."""
    if node.op == "placeholder":
        return "input"
    if node.target is getattr:
        return str(node.args[1])
    return str(node.target) if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))


def source_of(node: Node, writers: dict[Node, Node]) -> Source:
    """Walk back from an operand through views; ``writers`` maps in-place ops to what they return."""
    path: list[str] = []
    while True:
        if node in writers:
            node = writers[node]
        elif is_view_like(node) and isinstance(node.args[0], Node):
            path.append(op_name(node))
            node = node.args[0]
        else:
            return Source(node, tuple(reversed(path)))


def readers(
    node: Node, writers: dict[Node, Node], follow: Callable[[Node], bool] = is_view_like
) -> Iterator[tuple[Node, Node]]:
    """(user, operand) pairs at the ends of all view chains from ``node``, but for known writes to it."""
    for user in node.users:
        if writers.get(user) is node or (follow(user) and user.args[0] is node):
            yield from readers(user, writers, follow)
        else:
            yield user, node


def fake(node: object) -> torch.Tensor | None:
    """The fake tensor Dynamo recorded for ``node``, if it has one."""
    value = node.meta.get("example_value") if isinstance(node, Node) else None
    return value if isinstance(value, torch.Tensor) else None


def argument(node: Node, index: int, name: str, default: object = None) -> object:
    """A call's argument, however it was passed."""
    return node.args[index] if len(node.args) > index else node.kwargs.get(name, default)


def is_shape_query(node: Node) -> bool:
    """Whether ``node`` asks for sizes only (dynamic shapes put such calls into the graph)."""
    if node.op == "call_method":
        return node.target in ("size", "dim", "stride", "numel")
    return node.op == "call_function" and node.target is getattr and node.args[1] in ("shape", "device", "dtype")
