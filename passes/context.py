"""What the passes of one graph hand on to each other."""

from __future__ import annotations

import dataclasses

from torch import Tensor
from torch.fx import Node

from xquant_fx.cache.kv_tensor import QuantizedKV
from xquant_fx.errors import CacheStateError
from xquant_fx.passes.records import Detection


@dataclasses.dataclass
class Part:
    """What a graph takes of one cache; most graphs meet one cache only."""

    buffers: list[int] = dataclasses.field(default_factory=list)
    """Argument indices of its quantized buffers."""
    slots: list[tuple[int, int, str]] = dataclasses.field(default_factory=list)
    """(place among the added inputs, argument index, tensor name) of each stored tensor."""
    shared: list[tuple[int, str, int]] = dataclasses.field(default_factory=list)
    """(argument index, tensor name, place) of those that several buffers have in common, such as a pair's codes."""
    step_tokens: int | None = None
    """Tokens the rewritten graph appends (0: more than the windows can give back; None: none)."""

    def collect(self, args: tuple[object, ...]) -> list[Tensor]:
        """The stored tensors of these arguments, in the order of ``slots``.

        Raises:
            CacheStateError: the buffers share tensors in another way than when this was compiled.
        """
        tensors = {place: _stored(args[index], name) for place, index, name in self.slots}
        for index, name, place in self.shared:
            if _stored(args[index], name) is not tensors[place]:
                raise CacheStateError(
                    f"{args[index]!r}: {name} is shared in another way than when this graph was compiled "
                    "(buffers of several caches in one call?)"
                )
        return list(tensors.values())


@dataclasses.dataclass
class StateInputs:
    """New placeholders, and how to find their tensors among the run-time arguments."""

    nodes: dict[Node, dict[str, Node | None]] = dataclasses.field(default_factory=dict)
    tensors: list[Tensor] = dataclasses.field(default_factory=list)
    """The example of each added input."""
    parts: list[Part] = dataclasses.field(default_factory=list)
    """One per cache."""


def _stored(buffer: object, name: str) -> Tensor:
    assert isinstance(buffer, QuantizedKV)
    tensor = buffer.live.tensor(name)
    assert tensor is not None
    return tensor


@dataclasses.dataclass
class Context:
    """The journey of one graph: what was detected, its example inputs, and what passes made so far."""

    detection: Detection
    inputs: list[object]
    """Example inputs of the graph as Dynamo made it."""
    state: StateInputs = dataclasses.field(default_factory=StateInputs)
    """The inputs that were added for stored tensors."""
    loads: dict[Node, Node] = dataclasses.field(default_factory=dict)
    """Append of the old graph to the ``shared_code_load`` that reads after it."""
