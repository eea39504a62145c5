"""Give a graph the stored tensors of its quantized buffers as inputs, each tensor once."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor
from torch.fx import Graph, Node

from xquant_fx.cache.kv_tensor import QuantizedKV
from xquant_fx.cache.state import TENSOR_NAMES
from xquant_fx.errors import CacheStateError
from xquant_fx.passes.graph import add_input
from xquant_fx.passes.trace import fake


@dataclasses.dataclass
class StateInputs:
    """New placeholders, and how to find their tensors among the run-time arguments.

    ``slots`` holds one (argument index, tensor name) an added input. ``shared`` holds the (argument
    index, name, slot) of tensors that several buffers have in common, such as a pair's codes.
    """

    nodes: dict[Node, dict[str, Node | None]] = dataclasses.field(default_factory=dict)
    slots: list[tuple[int, str]] = dataclasses.field(default_factory=list)
    shared: list[tuple[int, str, int]] = dataclasses.field(default_factory=list)
    tensors: list[Tensor] = dataclasses.field(default_factory=list)
    step_tokens: int | None = None
    """Tokens the rewritten graph appends (0: more than the windows can give back; None: none)."""

    def collect(self, args: tuple[object, ...]) -> list[Tensor]:
        """The stored tensors of these arguments, in the order of the added inputs.

        Raises:
            CacheStateError: the buffers share tensors in another way than when this was compiled.
        """
        tensors = [_stored(args[index], name) for index, name in self.slots]
        for index, name, slot in self.shared:
            if _stored(args[index], name) is not tensors[slot]:
                raise CacheStateError(
                    f"{args[index]!r}: {name} is shared in another way than when this graph was compiled "
                    "(buffers of several caches in one call?)"
                )
        return tensors


def _stored(buffer: object, name: str) -> Tensor:
    assert isinstance(buffer, QuantizedKV)
    tensor = buffer._live().tensor(name)
    assert tensor is not None
    return tensor


def add_state_inputs(graph: Graph, inputs: list[object]) -> StateInputs:
    """Add a placeholder for every stored tensor of every quantized input; removes nothing."""
    placeholders = [n for n in graph.nodes if n.op == "placeholder"]
    result, by_id, last = StateInputs(), {}, placeholders[-1]
    for index, node in enumerate(placeholders):
        if not isinstance(fake(node), QuantizedKV):
            continue
        buffer = inputs[index]
        assert isinstance(buffer, QuantizedKV)
        state, names = buffer._live(), {}
        for name in TENSOR_NAMES:
            tensor = state.tensor(name)
            if tensor is None:
                names[name] = None
                continue
            if id(tensor) in by_id:
                new, slot = by_id[id(tensor)]
                result.shared.append((index, name, slot))
            else:
                new = last = add_input(graph, last, f"xquant_{state.spec.role}{state.spec.layer}_{name}", tensor)
                by_id[id(tensor)] = (new, len(result.slots))
                result.slots.append((index, name))
                result.tensors.append(tensor)
            names[name] = new
        result.nodes[node] = names
    return result


def device_of(node: Node) -> torch.device:
    """Device of the tensor that ``node`` stands for."""
    value = fake(node)
    assert value is not None
    return value.device
