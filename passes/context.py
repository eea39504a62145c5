"""What the passes of one graph hand on to each other."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

from xquant_fx.cache.folded_weights import Fold
from xquant_fx.cache.growing import STORED_KV
from xquant_fx.errors import CacheStateError
from xquant_fx.passes.graph import LENGTH, input_of_size
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
    """The example of each added input that is a tensor."""
    parts: list[Part] = dataclasses.field(default_factory=list)
    """One per cache."""
    lengths: list[tuple[int, Any]] = dataclasses.field(default_factory=list)
    """Arguments whose length in tokens is an added input, too, after the tensors, and that length as a symbol."""

    folded: list[tuple[int, Fold]] = dataclasses.field(default_factory=list)
    """Arguments that are weights, rotated copies of which are added inputs, too, after the lengths; and how."""
    folded_examples: list[Tensor] = dataclasses.field(default_factory=list)
    """The example of each."""

    @property
    def example_inputs(self) -> list[Any]:
        """Examples of the added inputs."""
        return [*self.tensors, *(length for _, length in self.lengths), *self.folded_examples]


def _stored(buffer: object, name: str) -> Tensor:
    assert isinstance(buffer, STORED_KV)
    tensor = buffer.live.tensor(name)
    assert tensor is not None
    return tensor


@dataclasses.dataclass(frozen=True)
class Grown:
    """One input that grows by concatenation, and where the graph is to return the longer one."""

    index: int
    """Number of the graph's argument."""
    outputs: tuple[int, ...]
    """Positions among the results."""
    tokens: int | tuple[int, int]
    """How many tokens are new, or the argument and its dimension that say so."""
    keep: int = 0
    """Tokens that are kept, of a sliding window; 0: all."""

    def tokens_of(self, args: tuple[Any, ...]) -> int:
        """New tokens in a step with these arguments."""
        return self.tokens if isinstance(self.tokens, int) else int(args[self.tokens[0]].shape[self.tokens[1]])


@dataclasses.dataclass
class Context:
    """The journey of one graph: what was detected, its example inputs, and what passes made so far."""

    detection: Detection
    inputs: list[object]
    """Example inputs of the graph as Dynamo made it."""
    state: StateInputs = dataclasses.field(default_factory=StateInputs)
    """The inputs that were added for stored tensors."""
    ends: dict[object, Node] = dataclasses.field(default_factory=dict)
    """Masks of what lies beyond the last token, by cache and step."""
    grown: list[Grown] = dataclasses.field(default_factory=list)
    """Inputs that grow; the graph itself does not return the longer ones."""
    rotations: dict[Node, Node] = dataclasses.field(default_factory=dict)
    """Append of the old graph, or output of an attention, to the node that rotates there."""
    stores: dict[Node, Node] = dataclasses.field(default_factory=dict)
    """Append of the old graph to the ``quantize_store`` that it became."""
    loads: dict[Node, Node] = dataclasses.field(default_factory=dict)
    """Append of the old graph to the ``shared_code_load`` that reads after it."""
    fused: dict[Node, Node] = dataclasses.field(default_factory=dict)
    """Output of an attention of the old graph to that of the fused op."""

    done: list[str] = dataclasses.field(default_factory=list)
    """Passes that have run."""

    def __post_init__(self) -> None:
        """Count the inputs and the results before a pass adds or drops any."""
        self.results = self.described(self.detection.gm.graph)
        """Shape and dtype of each result of the graph as Dynamo made it."""
        inputs = self.detection.gm.graph.find_nodes(op="placeholder")
        self.placeholders = {node: i for i, node in enumerate(inputs)}
        """Inputs of the graph as Dynamo made it, by node, with the numbers of their arguments."""

    @staticmethod
    def described(graph: Graph) -> list[tuple[tuple[int | None, ...], torch.dtype] | None]:
        """Shape (None: a symbol) and dtype of each result; None of what is no tensor."""
        results: Any = graph.output_node().args[0]
        values = [each.meta.get("example_value") if isinstance(each, Node) else each for each in results]
        return [(_known_sizes(v), v.dtype) if isinstance(v, Tensor) else None for v in values]

    def length_of(self, graph: Graph, buffer: Node) -> Node | None:
        """How many tokens there are of ``buffer`` or room for in it, where a step alone knows: an input, added if need
        be."""
        size = buffer.meta.get(LENGTH, buffer.meta["example_value"].shape[2])
        if isinstance(size, int):
            return None
        node, added = input_of_size(graph, size)
        if added:
            self.state.lengths.append((self.index_of(buffer), size))
        return node

    def index_of(self, placeholder: Node) -> int:
        """The number of the argument that was ``placeholder`` in the graph as Dynamo made it."""
        return self.placeholders[placeholder]


def _known_sizes(value: Tensor) -> tuple[int | None, ...]:
    return tuple(size if isinstance(size, int) else None for size in value.shape)
