"""What the passes of one graph hand on to each other."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

from torch import Tensor
from torch.fx import Node

from xquant_fx.cache.growing import STORED_KV
from xquant_fx.errors import CacheStateError
from xquant_fx.passes.records import Detection


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
    lengths: list[tuple[int, Any]] = dataclasses.field(default_factory=list)
    """Arguments whose length in tokens is an added input, too, after the tensors, and that length as a symbol."""
    step_tokens: int | None = None
    """Tokens the rewritten graph appends (0: more than the windows can give back; None: none)."""

    @property
    def example_inputs(self) -> list[Any]:
        """Examples of the added inputs."""
        return [*self.tensors, *(length for _, length in self.lengths)]

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
    loads: dict[Node, Node] = dataclasses.field(default_factory=dict)
    """Append of the old graph to the ``shared_code_load`` that reads after it."""

    def index_of(self, placeholder: Node) -> int:
        """The number of the argument that was ``placeholder`` in the graph as Dynamo made it."""
        return self.placeholders[placeholder]

    @functools.cached_property
    def placeholders(self) -> dict[Node, int]:
        """Inputs of the graph as Dynamo made it, by node."""
        return {node: i for i, node in enumerate(n for n in self.detection.gm.graph.nodes if n.op == "placeholder")}
