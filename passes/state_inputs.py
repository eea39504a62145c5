"""Give a graph the stored tensors of its quantized buffers as inputs, each tensor once."""

from __future__ import annotations

from typing import Any

from torch.fx import GraphModule, Node

from xquant_fx.cache.growing import STORED_KV
from xquant_fx.cache.state import TENSOR_NAMES
from xquant_fx.passes.context import Context, StateInputs
from xquant_fx.passes.graph import add_input
from xquant_fx.passes.trace import fake


def add_state_inputs(gm: GraphModule, context: Context) -> int:
    """Add a placeholder for every stored tensor of every quantized input; returns how many. Removes nothing."""
    placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
    adding = _Adding(gm, placeholders[-1], context.state)
    for index, node in enumerate(placeholders):
        buffer = context.inputs[index]
        if isinstance(fake(node), STORED_KV):
            assert isinstance(buffer, STORED_KV)
            context.state.nodes[node] = {name: adding.node_of(index, buffer, name) for name in TENSOR_NAMES}
    return len(context.state.slots)


class _Adding:
    """Placeholders that were added so far, each stored tensor's once."""

    def __init__(self, gm: GraphModule, last: Node, state: StateInputs) -> None:
        self.gm, self.last, self.state = gm, last, state
        self.known: dict[int, tuple[Node, int]] = {}

    def node_of(self, index: int, buffer: Any, name: str) -> Node | None:
        """The placeholder of the tensor called ``name`` of ``buffer``, input ``index`` of the graph."""
        tensor, spec, state = buffer.live.tensor(name), buffer.spec, self.state
        if tensor is None:
            return None
        if id(tensor) in self.known:
            node, slot = self.known[id(tensor)]
            state.shared.append((index, name, slot))
            return node
        self.last = add_input(self.gm.graph, self.last, f"xquant_{spec.role}{spec.layer}_{name}", tensor)
        self.known[id(tensor)] = self.last, len(state.slots)
        state.slots.append((index, name))
        state.tensors.append(tensor)
        return self.last
