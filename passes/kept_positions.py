"""Positions that are moved on before attention reads what was appended at them.

    keys[:, :, pos[:1]] = k                         at = pos[:1].clone(); keys[:, :, at] = k
    pos.add_(1)                             =>      pos.add_(1)
    attention(q, keys, ...)                         attention(q, keys, ...)

An attention with the append in it runs where the attention is, and must still know the positions. So torchtune counts.
"""

from __future__ import annotations

import torch
from torch.fx import Graph, Node

from xquant_fx.passes.find_writes import written_by
from xquant_fx.passes.graph import call
from xquant_fx.passes.trace import argument, fake, memory_of, operand
from xquant_fx.passes.vocabulary import kind


def keep_positions(graph: Graph) -> int:
    """Copy such positions where they are appended at; returns how many appends there are."""
    moved: dict[Node, int] = {}
    appends: list[tuple[int, Node, Node]] = []
    for number, node in enumerate(graph.nodes):
        positions = _positions(node)
        if positions is not None:
            appends.append((number, node, positions))
        for target in written_by(node):
            if _are_numbers(target):
                moved.setdefault(memory_of(target), number)
    # Appends before and after the same move would seem to be at the same positions.
    mixed = {memory_of(at) for number, _, at in appends if number > moved.get(memory_of(at), number)}
    found = [(node, at) for _, node, at in appends if memory_of(at) in moved and memory_of(at) not in mixed]
    for node, at in found:
        with graph.inserting_before(node):
            copied = call(graph, torch.clone, (at,))
        node.replace_input_with(at, copied)
    return len(found)


def kept(positions: Node) -> Node:
    """What ``positions`` were before they were copied: the same until they are moved on."""
    source = operand(positions)
    return source if kind(positions) == "clone" and source is not None else positions


def _positions(node: Node) -> Node | None:
    """The one tensor of positions that ``node`` writes at."""
    if kind(node) == "index_copy":
        found = [argument(node, 2, "index")]
    elif kind(node) == "setitem":
        found = list(node.args[1]) if isinstance(node.args[1], tuple) else [node.args[1]]
    else:
        return None
    tensors = [each for each in found if isinstance(each, Node) and _are_numbers(each)]
    return tensors[0] if len(tensors) == 1 else None


def _are_numbers(node: Node) -> bool:
    value = fake(node)
    return value is not None and value.dtype in (torch.int64, torch.int32)
