"""A graph that empties buffers before it appends to them, as one that is given empty buffers.

    buffer.zero_()                                  buffer[:, :, pos] = k
    buffer[:, :, pos] = k                   =>      attention(q, buffer, ...)
    attention(q, buffer, ...)

``fill_(0)`` and ``buffer[:] = 0`` likewise. So a model may begin a sequence in its compiled function: fish-speech does.
"""

from __future__ import annotations

import contextlib
import dataclasses
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from xquant_fx.compiler.other_graph import OtherGraph
from xquant_fx.passes.continued import may_be_past
from xquant_fx.passes.find_writes import written_by
from xquant_fx.passes.graph import clone
from xquant_fx.passes.trace import argument, fake, full_index, is_shape_query, is_whole, memory_of


@dataclasses.dataclass(frozen=True)
class EmptiedInputs(OtherGraph):
    """The graph of buffers that are empty."""

    places: Sequence[int]
    """Which of its inputs these are."""

    def calling(self, compiled: Callable[..., Any]) -> Callable[..., Any]:
        """What empties the buffers and calls ``compiled``."""

        def call(*args: Any) -> Any:
            with torch.no_grad():
                for place in self.places:
                    args[place].zero_()
            return compiled(*args)

        return call

    @contextlib.contextmanager
    def emptied(self, inputs: Sequence[Any]) -> Iterator[None]:
        """Inside, ordinary buffers among ``inputs`` are judged as empty, and stay so if nothing fails."""
        held = [(each, each.clone()) for i in self.places if type(each := inputs[i]) is Tensor]
        with torch.no_grad():
            for buffer, _ in held:
                buffer.zero_()
        try:
            yield
        except BaseException:
            with torch.no_grad():
                for buffer, before in held:
                    buffer.copy_(before)
            raise


def emptied_inputs(gm: GraphModule, inputs: Sequence[Any]) -> EmptiedInputs | None:
    """The graph without what empties an input that it appends to later; None if ``gm`` empties none."""
    if not any(map(_empties, gm.graph.nodes)) or not _emptied(gm.graph):
        return None
    made = clone(gm)
    nodes = made.graph.find_nodes(op="placeholder")
    places = []
    for op in _emptied(made.graph):
        place = nodes.index(op.args[0])
        if _is_alone(place, inputs):
            places.append(place)
            op.replace_all_uses_with(nodes[place])
            made.graph.erase_node(op)
    made.recompile()
    return EmptiedInputs(made, places) if places else None


def _emptied(graph: Graph) -> list[Node]:
    """The ops that empty inputs: each the first that takes notice of its buffer, which is written to after it."""
    found: dict[Node, Node] = {}
    touched, written = set[Node](), set[Node]()
    for node in graph.nodes:
        changed = {memory_of(each) for each in written_by(node)}
        written |= changed & found.keys()
        buffer = node.args[0] if node.args else None
        if _empties(node) and isinstance(buffer, Node) and may_be_past(buffer) and buffer not in touched:
            found[buffer] = node
            touched.add(buffer)
        elif not is_shape_query(node):
            touched |= {memory_of(each) for each in node.all_input_nodes} | changed
    return [op for buffer, op in found.items() if buffer in written]


def _empties(node: Node) -> bool:
    """Whether ``node`` writes zeros to all of what it is given."""
    if node.op == "call_method" and node.target == "zero_":
        return True
    if node.op == "call_method" and node.target == "fill_":
        return _is_zero(argument(node, 1, "value"))
    if node.target is not operator.setitem or not _is_zero(node.args[2]):
        return False
    value = fake(node.args[0])
    index = None if value is None else full_index(node.args[1], value.dim())
    return index is not None and value is not None and all(map(is_whole, index, value.shape))


def _is_zero(value: object) -> bool:
    return isinstance(value, int | float) and value == 0


def _is_alone(place: int, inputs: Sequence[Any]) -> bool:
    """Whether no other input shares the memory of this one: what was read of it before would be zeros."""
    buffer = inputs[place]
    if type(buffer) is not Tensor:
        return True
    memory = buffer.untyped_storage().data_ptr()
    others = (each for i, each in enumerate(inputs) if i != place and type(each) is Tensor)
    return all(each.device != buffer.device or each.untyped_storage().data_ptr() != memory for each in others)
