"""Appends at a position per row, in whatever way they are spelt, become one call.

    buffer[arange(B), :, pos] = k[:, :, 0]                          =>  write_rows_(buffer, pos[:, None], k)
    buffer[arange(B)[:, None], :, pos] = k.transpose(1, 2)          =>  write_rows_(buffer, pos, k)
    buffer[arange(B)[:, None], arange(H), pos[:, None]] = k[:, :, 0]    likewise
    buffer.scatter_(2, pos[:, None, :, None].expand_as(k), k)       =>  write_rows_(buffer, pos, k)
    buffer.scatter_(2, pos[:, None].expand_as(k), k)                =>  buffer.index_copy_(2, pos, k)

What an index is, is found by computing it: of numbers that the graph itself says (``arange``), or from numbers in the
place of positions through views. So a batch index that leaves out a row, or that comes from outside, is none; nor is
one that something writes to.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

from xquant_fx.kernels.rows import write_rows_
from xquant_fx.passes.find_writes import written_by
from xquant_fx.passes.graph import add_call, call
from xquant_fx.passes.trace import argument, fake, is_view_like, memory_of
from xquant_fx.passes.vocabulary import kind

#: Elements of an index that may be computed, if it has no memory of its own less than that.
MOST = 2**22


def name_row_writes(graph: Graph) -> int:
    """Rewrite all appends of a position per row in place; returns how many."""
    changes, nodes = _Changes(graph), list(graph.nodes)
    return sum(_indexed(graph, node, changes) or _scattered(graph, node, changes) for node in nodes)


class _Changes:
    """What the program writes to, and where."""

    def __init__(self, graph: Graph) -> None:
        self.order = {node: i for i, node in enumerate(graph.nodes)}
        self.at: dict[Node, list[int]] = {}
        for node, i in self.order.items():
            for operand in written_by(node):
                self.at.setdefault(memory_of(operand), []).append(i)

    def of(self, node: Node, before: Node | None = None) -> bool:
        """Whether something writes to ``node``, or to a view or copy of it, behind it and ``before`` another."""
        end = len(self.order) if before is None else self.order[before]
        return any(self.order[node] < i < end for i in self.at.get(memory_of(node), ()))


def why_no_row_write(node: Node) -> str:
    """Why ``node``, which writes to rows by their numbers or by an index of all elements, is no append, or ""."""
    index = argument(node, 1, "index")
    by_row = kind(node) == "setitem" and isinstance(index, tuple) and fake(index[0]) is not None
    if by_row:
        return "rows are chosen by an index that is not arange(batch size) of this graph, or that leaves some out"
    if kind(node) != "scatter":
        return ""
    reduces = argument(node, 4, "reduce") is not None
    return "it computes with what is there" if reduces else "its index is not seen to be one position per token"


def _buffer(node: Node) -> tuple[Node, tuple[int, int, int, int]] | None:
    """The input [B, H, N, D] of known sizes that ``node`` writes to, and its shape."""
    buffer = node.args[0] if node.args else None
    value = fake(buffer)
    if not isinstance(buffer, Node) or buffer.op != "placeholder" or value is None or value.dim() != 4:
        return None
    batch, heads, tokens, dim = value.shape
    return (buffer, (batch, heads, tokens, dim)) if all(isinstance(n, int) for n in value.shape) else None


def _indexed(graph: Graph, node: Node, changes: _Changes) -> bool:
    found = _buffer(node) if kind(node) == "setitem" else None
    index, x = argument(node, 1, "index"), argument(node, 2, "value")
    if found is None or not isinstance(index, tuple) or not isinstance(x, Node):
        return False
    buffer, (batch, heads, _, dim) = found
    if len(index) == 4 and index[3] == slice(None):
        index = index[:3]
    if len(index) != 3 or not all(isinstance(index[d], Node) for d in (0, 2)):
        return False
    pos, value = index[2], fake(index[2])
    # Indices broadcast from the last dimension on: rows must count along the first of positions.
    if (
        value is None
        or value.dtype not in (torch.int64, torch.int32)
        or not _is_count(index[0], batch, changes, value.dim())
    ):
        return False
    if isinstance(index[1], Node):
        roots = [_root(pos, shape, (batch, 1), node, changes) for shape in ((batch, 1), (batch,))]
        pos = next(filter(None, roots), None) if _is_count(index[1], heads, changes, last=True) else None
        tokens: tuple[Any, ...] = ()
    else:
        pos = pos if index[1] == slice(None) and value.dim() in (1, 2) and value.shape[0] == batch else None
        tokens = tuple(value.shape[1:])
    written = fake(x)
    if pos is None or written is None or tuple(written.shape) != (batch, *tokens, heads, dim):
        return False
    with graph.inserting_before(node):
        x = call(graph, torch.transpose, (x, 1, 2)) if tokens else call(graph, torch.unsqueeze, (x, 2))
    return _replace(graph, node, buffer, pos, x)


def _scattered(graph: Graph, node: Node, changes: _Changes) -> bool:
    found = _buffer(node) if kind(node) == "scatter" else None
    dim, index, x = argument(node, 1, "dim"), argument(node, 2, "index"), argument(node, 3, "src")
    written = fake(x)
    if found is None or dim not in (2, -2) or not (isinstance(index, Node) and isinstance(x, Node)) or written is None:
        return False
    buffer, (batch, heads, _, width) = found
    tokens = written.shape[2] if written.dim() == 4 else None
    if not isinstance(tokens, int) or tuple(written.shape) != (batch, heads, tokens, width):
        return False
    if argument(node, 4, "reduce") is not None:
        return False
    common = _root(index, (tokens,), tuple(written.shape), node, changes, is_common=True)
    if common is not None:
        with graph.inserting_before(node):
            append = graph.call_method("index_copy_", (buffer, 2, common, x))
        append.meta["example_value"] = fake(buffer)
        node.replace_all_uses_with(buffer)
        graph.erase_node(node)
        return True
    pos = _root(index, (batch, tokens), tuple(written.shape), node, changes)
    pos = _root(index, (batch,), tuple(written.shape), node, changes) if pos is None and tokens == 1 else pos
    return pos is not None and _replace(graph, node, buffer, pos, x)


def _replace(graph: Graph, node: Node, buffer: Node, pos: Node, x: Node) -> bool:
    """Put the call in the place of ``node``, and the buffer in that of its result."""
    with graph.inserting_before(node):
        value = fake(pos)
        if value is not None and value.dim() == 1:
            pos = call(graph, torch.unsqueeze, (pos, 1))
        if value is not None and value.dtype != torch.int64:
            pos = call(graph, torch.Tensor.to, (pos, torch.int64))
        add_call(graph, write_rows_, (buffer, pos, x), {}, fake(buffer))
    node.replace_all_uses_with(buffer)
    graph.erase_node(node)
    return True


def _is_count(node: object, size: int, changes: _Changes, dims: int = 1, last: bool = False) -> bool:
    """Whether ``node`` counts 0, 1, ... ``size`` along the first of ``dims`` dimensions, or the ``last`` of any."""
    value = _computed(node, {}, changes)
    if value is None or value.flatten().tolist() != list(range(size)):
        return False
    return value.dim() <= 2 and (
        size == 1 or (value.shape[-1] == size if last else tuple(value.shape) == (size, 1)[:dims])
    )


def _root(
    index: object,
    shape: tuple[int, ...],
    wanted: tuple[int, ...],
    write: Node,
    changes: _Changes,
    is_common: bool = False,
) -> Node | None:
    """The node of positions of ``shape`` ([B] or [B, q]) that ``index`` repeats over heads and channels, if it does.

    Where it ``is_common``, positions [q] that it repeats over rows, too.

    ``wanted`` is the shape of the index of ``write``: [B, 1], or [B, H, q, D].
    """
    for node in _chain(index):
        if node is not index and changes.of(node, before=write):
            continue
        value = fake(node)
        if value is None or tuple(value.shape) != shape or value.dtype not in (torch.int64, torch.int32):
            continue
        numbers = torch.arange(math.prod(shape)).reshape(shape)
        meant = numbers if len(wanted) == 2 else numbers.reshape(1 if is_common else shape[0], 1, -1, 1)
        got = _computed(index, {node: numbers}, changes)
        if got is None or tuple(got.shape) != wanted:
            continue
        if len(wanted) == 4 and got.stride(1) == got.stride(3) == 0:
            got, meant = got[:, :1, :, :1], meant
        elif got.numel() > MOST:
            continue
        if torch.equal(got, meant.reshape(-1, 1).expand(got.shape) if len(wanted) == 2 else meant.expand(got.shape)):
            return node
    return None


def _chain(node: object) -> Iterator[Node]:
    """``node`` and what it is a view of, back to the first that is none."""
    while isinstance(node, Node):
        yield node
        node = node.args[0] if is_view_like(node) and node.args else None


def _computed(node: object, known: Mapping[Node, Tensor], changes: _Changes) -> Tensor | None:
    """The numbers that ``node`` gives, of ``arange`` and of ``known`` ones through views; None if others are in it."""
    if not isinstance(node, Node):
        return None
    if node in known:
        return known[node]
    if node.target is torch.arange:
        if changes.of(node):
            return None
        given = {name: value for name, value in node.kwargs.items() if name in ("start", "end", "step")}
        return torch.arange(*node.args, **given) if _are_constant([*node.args, *given.values()]) else None
    before = _computed(node.args[0], known, changes) if is_view_like(node) and node.args else None
    value = fake(node)
    if before is None or value is None or value.dtype not in (torch.int64, torch.int32):
        return None
    if kind(node) in ("cast", "contiguous", "clone", "detach"):
        return before
    shape = fake(node.args[1]) if len(node.args) > 1 and kind(node) in ("expand", "view") else None
    if shape is not None:  # expand_as
        return before.expand(shape.shape) if kind(node) == "expand" and _are_constant(shape.shape) else None
    if not _are_constant([*node.args[1:], *node.kwargs.values()]):
        return None
    function: Any = getattr(torch.Tensor, node.target) if isinstance(node.target, str) else node.target
    result: Tensor = function(before, *node.args[1:], **node.kwargs)
    return result


def _are_constant(values: Any) -> bool:
    """Whether there is no node, and no symbolic size, among ``values``."""
    flat: list[Any] = []
    for value in values:
        if isinstance(value, tuple | list):
            flat += value
        elif isinstance(value, slice):
            flat += [value.start, value.stop, value.step]
        else:
            flat.append(value)
    return all(value is None or value is Ellipsis or isinstance(value, int | slice) for value in flat)
