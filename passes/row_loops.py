"""Appends that a program makes row by row become one call, as lit-gpt's ``batched_index_copy_`` makes them.

    for i in range(B):
        buffer[i].index_copy_(-2, pos[i], k[i])         =>  write_rows_(buffer, pos, k)

All rows must be written, each once, of one tensor at positions of one tensor, and nothing else happen in between.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.fx import Graph, Node

from xquant_fx.kernels.rows import write_rows_
from xquant_fx.passes.graph import add_call, call
from xquant_fx.passes.trace import argument, fake
from xquant_fx.passes.vocabulary import kind

#: What may stand between the first and the last row's write.
WITHIN = frozenset({"getitem", "select", "index_copy"})


class _Row(NamedTuple):
    """One row's write."""

    number: int
    node: Node
    view: Node
    whole: Node
    """What ``view`` is a row of: the buffer, or all of it."""
    pos: Node
    x: Node


def merge_row_loops(graph: Graph) -> int:
    """Merge the loops over rows in place; returns how many."""
    order = {node: i for i, node in enumerate(graph.nodes)}
    found: dict[Node, list[_Row]] = {}
    for node in graph.nodes:
        row = _row(node) if kind(node) == "index_copy" else None
        if row is not None:
            found.setdefault(_buffer_of(row.whole), []).append(row)
    nodes = list(graph.nodes)
    return sum(_merge(graph, buffer, rows, order, nodes) for buffer, rows in found.items())


def _merge(graph: Graph, buffer: Node, rows: list[_Row], order: dict[Node, int], nodes: list[Node]) -> bool:
    value, pos, x = fake(buffer), rows[0].pos, rows[0].x
    written, positions = fake(x), fake(pos)
    if value is None or buffer.op != "placeholder" or value.dim() != 4 or written is None or positions is None:
        return False
    batch, heads, _, dim = value.shape
    tokens = positions.shape[1] if positions.dim() == 2 else 1
    if [row.number for row in rows] != list(range(batch)) or tuple(written.shape) != (batch, heads, tokens, dim):
        return False
    if any((row.pos, row.x) != (pos, x) for row in rows) or positions.dtype != torch.int64:
        return False
    between = nodes[order[rows[0].node] : order[rows[-1].node]]
    if not all(kind(node) in WITHIN for node in between):
        return False
    with graph.inserting_before(rows[-1].node):
        pos = pos if positions.dim() == 2 else call(graph, torch.unsqueeze, (pos, 1))
        add_call(graph, write_rows_, (buffer, pos, x), {}, value)
    for row in rows:
        graph.erase_node(row.node)
        graph.erase_node(row.view)
    for whole in {row.whole for row in rows} - {buffer}:  # who reads it reads the buffer
        whole.replace_all_uses_with(buffer)
        graph.erase_node(whole)
    return True


def _row(node: Node) -> _Row | None:
    """``node`` as the write of a row that nothing else reads the view of."""
    view, at, x = node.args[0], _item(argument(node, 2, "index")), _item(argument(node, 3, "source"))
    item = _item(view)
    if not isinstance(view, Node) or item is None or at is None or x is None or node.users or len(view.users) != 1:
        return None
    number, whole = item[1], item[0]
    token = slice(number, number + 1) if isinstance(number, int) else None  # of positions [B]
    positions = fake(at[0])
    meant = token if positions is not None and positions.dim() == 1 else number
    if not isinstance(number, int) or x[1] != number or at[1] != meant or argument(node, 1, "dim") not in (1, -2):
        return None
    return _Row(number, node, view, whole, at[0], x[0])


def _item(node: object) -> tuple[Node, object] | None:
    """What ``node`` takes of the first dimension of a tensor: that tensor, and a number or a slice."""
    if not isinstance(node, Node) or not node.args or not isinstance(node.args[0], Node):
        return None
    if kind(node) == "getitem":
        return node.args[0], node.args[1]
    if kind(node) == "select" and argument(node, 1, "dim") == 0:
        return node.args[0], argument(node, 2, "index")
    return None


def _buffer_of(whole: Node) -> Node:
    """What ``whole`` is all of: ``buffer[:bs, ...]`` of as many rows as there are."""
    before = whole.args[0] if kind(whole) == "getitem" else None
    value, all_of = fake(whole), fake(before)
    if not isinstance(before, Node) or value is None or all_of is None or value.shape != all_of.shape:
        return whole
    items = whole.args[1] if isinstance(whole.args[1], tuple) else (whole.args[1],)
    return before if all(item is Ellipsis or isinstance(item, slice) for item in items) else whole
