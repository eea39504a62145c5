"""A graph that takes one row of a batch, to write a prompt into it, is given the row in the place of the batch.

    keys = buffer[row : row + 1]                    keys = an input, which is buffer[row : row + 1]
    keys[:, :, positions] = k               =>      keys[:, :, positions] = k
    attention(q, keys, ...)                         attention(q, keys, ...)

A row of a quantized batch whose rows have lengths of their own is a buffer like any other (``cache/ragged.py``), so
that what remains is a graph as all passes know them.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from xquant_fx.cache.kv_tensor import QuantizedKV
from xquant_fx.cache.ragged import RaggedState
from xquant_fx.compiler.other_graph import OtherGraph
from xquant_fx.passes.graph import call, clone, fake_mode
from xquant_fx.passes.row_uses import RowUse, adds_rows, row_use
from xquant_fx.passes.trace import fake

ALL = slice(None)


@dataclasses.dataclass(frozen=True)
class RowGraph(OtherGraph):
    """A graph of one row, made of one of a batch."""

    buffers: tuple[int, ...]
    """Which of its inputs are rows."""
    row: int
    """Which row they are,"""
    place: int | None
    """or which input says so."""

    def given(self, args: Sequence[Any], row: int | None = None) -> list[Any]:
        """``args`` of the graph of the batch as those of this one; of another ``row`` than they say, if given."""
        if row is None:
            row = self.row if self.place is None else args[self.place]
        return [arg[row : row + 1] if i in self.buffers else arg for i, arg in enumerate(args)]


def row_graph(gm: GraphModule, inputs: Sequence[Any]) -> RowGraph | None:
    """The graph of one row, if ``gm`` takes the same row of each ragged buffer among its inputs, and nothing else."""
    if not any(_is_ragged(each) for each in inputs):
        return None
    made = clone(gm)
    places = {node: i for i, node in enumerate(made.graph.find_nodes(op="placeholder"))}
    used = {node: i for node, i in places.items() if _is_ragged(inputs[i]) and node.users}
    uses = {node: [row_use(user, node) for user in node.users] for node in used}
    found = [use for each in uses.values() for use in each]
    rows = {use.row if use is not None else None for use in found}
    if len(rows) != 1 or None in rows:
        return None
    (row,) = rows
    place = places.get(row) if isinstance(row, Node) else None
    if isinstance(row, Node) and place is None:
        return None
    for node, each in uses.items():
        _give_row(made.graph, node, inputs[used[node]], [use for use in each if use is not None])
    made.recompile()
    return RowGraph(made, tuple(used.values()), row if isinstance(row, int) else 0, place)


def _is_ragged(value: Any) -> bool:
    return isinstance(value, QuantizedKV) and isinstance(value.state, RaggedState) and value.shape[0] > 1


def _give_row(graph: Graph, buffer: Node, value: QuantizedKV, uses: Sequence[RowUse]) -> None:
    """Put an input that is one row in the place of ``buffer``."""
    row, mode = value[0:1], fake_mode(graph)
    assert isinstance(row, QuantizedKV)
    with graph.inserting_before(buffer):
        given = graph.placeholder(f"{buffer.target}_row")
    given._dynamo_source = getattr(buffer, "_dynamo_source", None)
    length = row.anchor if mode is None else mode.from_tensor(row.anchor, static_shapes=True)
    given.meta["example_value"] = QuantizedKV(row.spec, length)
    for use in uses:
        node = use.node
        if use.writes:
            node.args = (given, (ALL, *use.rest), _with_row(graph, node) if use.drops else node.args[2])
            continue
        for each in (node,) if not use.drops else tuple(node.users):
            if not use.rest and (not use.drops or adds_rows(each)):
                each.replace_all_uses_with(given)
                graph.erase_node(each)
        if use.rest or (use.drops and node.users):
            node.target, node.op, node.kwargs = operator.getitem, "call_function", {}
            node.args = (given, (0 if use.drops else ALL, *use.rest))
        elif use.drops:
            graph.erase_node(node)
    graph.erase_node(buffer)


def _with_row(graph: Graph, node: Node) -> Any:
    """What ``node`` writes to ``buffer[row, ...]``, with a dimension of rows."""
    value = node.args[2]
    if not isinstance(fake(value), Tensor) or not isinstance(value, Node):
        return value
    with graph.inserting_before(node):
        return call(graph, torch.unsqueeze, (value, 0))
