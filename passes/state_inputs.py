"""Give a graph the stored tensors of its quantized buffers as inputs, each tensor once.

The examples may have more room than the tensors of a cache (``KVSpec.any_room``); such inputs are marked.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import Tensor
from torch.fx import GraphModule, Node

from xquant_fx.cache.growing import STORED_KV
from xquant_fx.cache.state import TENSOR_NAMES
from xquant_fx.passes.context import Context, Part, StateInputs
from xquant_fx.passes.graph import OF_ANY_ROOM, add_input, fake_mode, fake_of
from xquant_fx.passes.trace import fake
from xquant_fx.plan.spec import KVSpec


def add_state_inputs(gm: GraphModule, context: Context) -> int:
    """Add a placeholder for every stored tensor of every quantized input; returns how many. Removes nothing."""
    placeholders = gm.graph.find_nodes(op="placeholder")
    adding = _Adding(gm, placeholders[-1], context.state)
    for index, node in enumerate(placeholders):
        buffer = context.inputs[index]
        if isinstance(fake(node), STORED_KV):
            assert isinstance(buffer, STORED_KV)
            context.state.nodes[node] = adding.nodes_of(index, buffer, context.detection.specs[node])
    return len(context.state.tensors)


class _Adding:
    """Placeholders that were added so far, each stored tensor's once."""

    def __init__(self, gm: GraphModule, last: Node, state: StateInputs) -> None:
        self.gm, self.last, self.state = gm, last, state
        self.mode = fake_mode(gm.graph)
        self.fakes: dict[tuple[Any, ...], Tensor] = {}
        self.known: dict[int, tuple[Node, int]] = {}
        self.parts: dict[int, Part] = {}

    def nodes_of(self, index: int, buffer: Any, spec: KVSpec) -> dict[str, Node | None]:
        """The placeholders of all tensors of ``buffer``, input ``index`` of the graph, which relies on ``spec``."""
        group = id(buffer.live.group)
        if group not in self.parts:
            self.parts[group] = Part()
            self.state.parts.append(self.parts[group])
        part = self.parts[group]
        part.buffers.append(index)
        return {name: self._node_of(index, buffer, spec, name, part) for name in TENSOR_NAMES}

    def _node_of(self, index: int, buffer: Any, spec: KVSpec, name: str, part: Part) -> Node | None:
        tensor, state = buffer.live.tensor(name), self.state
        if tensor is None:
            return None
        if id(tensor) in self.known:
            node, place = self.known[id(tensor)]
            part.shared.append((index, name, place))
            return node
        cache = state.parts.index(part)
        prefix = f"xquant{cache or ''}_{spec.role}{spec.layer}"
        wide = _of_any_room(spec).get(name)
        example = tensor if wide is None else tensor.new_empty(wide)  # whose pages nobody touches
        self.last = add_input(self.gm.graph, self.last, f"{prefix}_{name}", example, self._fake(example))
        self.last.meta[OF_ANY_ROOM] = wide is not None
        self.known[id(tensor)] = self.last, len(state.tensors)
        part.slots.append((len(state.tensors), index, name))
        state.tensors.append(example)
        return self.last

    def _fake(self, tensor: Tensor) -> Tensor:
        """Those of tensors that are laid out alike are the same: making them takes longest."""
        layout = (tensor.dtype, tensor.device, tensor.shape, tensor.stride())
        if layout not in self.fakes:
            self.fakes[layout] = fake_of(self.mode, tensor)
        return self.fakes[layout]


def _of_any_room(spec: KVSpec) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors that may have another room than that of ``spec``, by name."""
    if not spec.any_room:
        return {}
    alone = dataclasses.replace(spec, partner=None)  # with the codes that a lower layer lends
    more = alone.with_room(2 * spec.shape[2]).tensor_shapes()
    return {name: shape for name, (shape, _) in alone.tensor_shapes().items() if more[name][0] != shape}
