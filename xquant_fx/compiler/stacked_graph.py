"""A graph whose KV buffers are parts of one tensor, as one of buffers of their own.

Parts of an ordinary tensor are given to it as aliases (``cache/aliases.py``). Where it takes all of them over, the
tensor becomes a ``StackedKV`` of the quantized ones (``cache/stacked.py``); where it does not, nothing is done to any.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.nn import Parameter

from xquant_fx.cache.aliases import part_alias
from xquant_fx.cache.convert import stack_in_place, unstack_in_place
from xquant_fx.cache.reads import Dequantized
from xquant_fx.cache.stacked import StackedKV
from xquant_fx.compiler.other_graph import OtherGraph
from xquant_fx.passes.find_writes import written_by
from xquant_fx.passes.graph import clone
from xquant_fx.passes.normalize import name_assignments
from xquant_fx.passes.records import Detection
from xquant_fx.passes.split_stacks import split, stacked_dim
from xquant_fx.passes.trace import memory_of, value_of
from xquant_fx.passes.why_left_alone import WHY_WHOLE


@dataclasses.dataclass(frozen=True)
class Stack:
    """How a tensor is stacked."""

    dims: tuple[int, ...]
    """The dimension of the tensor that parts are along, of a part that theirs are along, and so on,"""
    sizes: tuple[int, ...]
    """and how many there are."""

    def places(self) -> Iterator[list[tuple[int, int]]]:
        """Of each part the selections that lead to it."""
        for number in range(math.prod(self.sizes)):
            place: list[tuple[int, int]] = []
            for dim, size in zip(reversed(self.dims), reversed(self.sizes), strict=True):
                number, index = divmod(number, size)
                place.insert(0, (dim, index))
            yield place

    def nested(self, parts: Sequence[Tensor]) -> StackedKV:
        """The quantized ``parts`` as one."""
        stacked: list[Any] = list(parts)
        for dim, size in zip(reversed(self.dims), reversed(self.sizes), strict=True):
            stacked = [StackedKV(stacked[i : i + size], dim) for i in range(0, len(stacked), size)]
        (whole,) = stacked
        return whole  # type: ignore[no-any-return]


class LeftWholeError(Exception):
    """Not all parts of a stack can be taken over; says why."""


NOT_APART = "a tensor of several buffers is not taken apart by constant numbers (a layer's number that is an input?)"
#: Is told what is decided about a graph, and why a self-check refuses it ("" if it does not).
Judge = Callable[[Detection, str], None]


def no_judge(found: Detection, refused: str) -> None:
    """Of a graph without stacks."""


@dataclasses.dataclass(frozen=True)
class StackedGraph(OtherGraph):
    """A graph of the parts of stacks."""

    stacks: Mapping[int, Stack]
    """Which inputs of the program's graph are stacks. Of each all parts are inputs here, in its place."""

    def given(self, args: Sequence[Any]) -> list[Any]:
        """``args`` of the program's graph as those of this one."""
        return [each for i, arg in enumerate(args) for each in self._parts(i, arg)]

    def _parts(self, index: int, arg: Any) -> Sequence[Any]:
        if index not in self.stacks:
            return [arg]
        if isinstance(arg, StackedKV):
            return arg.leaves
        return [part_alias(arg, place) for place in self.stacks[index].places()]

    def calling(self, compiled: Callable[..., Any]) -> Callable[..., Any]:
        """What is given the program's arguments; makes stacks of what is quantized by then, or no longer."""

        def call(*args: Any) -> Any:
            given = self.given(args)
            try:
                return compiled(*given)
            finally:
                self._settle(args, given)

        return call

    def _settle(self, args: Sequence[Any], given: Sequence[Any]) -> None:
        begin = 0
        for i, arg in enumerate(args):
            if i not in self.stacks:
                begin += 1
                continue
            size = math.prod(self.stacks[i].sizes)
            parts, begin = given[begin : begin + size], begin + size
            are_quantized = [isinstance(part, Dequantized) for part in parts]
            if isinstance(arg, StackedKV) and not all(are_quantized):
                unstack_in_place(arg)
            elif not isinstance(arg, StackedKV) and all(are_quantized):
                stack_in_place(arg, self.stacks[i].nested(parts))

    def judge(self, inputs: Sequence[Any]) -> Judge:
        """What is told what was decided about this graph, and raises LeftWholeError where a part of an ordinary
        tensor among the program's ``inputs`` is not to be taken over."""
        places, begin = [], 0
        for i, arg in enumerate(inputs):
            size = math.prod(self.stacks[i].sizes) if i in self.stacks else 1
            if i in self.stacks and not isinstance(arg, StackedKV):
                places.append(range(begin, begin + size))
            begin += size

        def judge(found: Detection, refused: str) -> None:
            taken = {buffer.index for buffer in found.ordinary}
            left = [each for each in places if refused or not taken.issuperset(each)]
            if left:
                raise LeftWholeError(refused or _why(found, left[0], taken))

        return judge

    def left_whole(self, gm: GraphModule, reason: str) -> GraphModule:
        """The program's graph ``gm``, which says of its stacks that they are left for ``reason``."""
        noted = clone(gm)
        for i, node in enumerate(noted.graph.find_nodes(op="placeholder")):
            if i in self.stacks:
                node.meta[WHY_WHOLE] = reason
        return noted


def _why(found: Detection, places: range, taken: set[int | None]) -> str:
    nodes = found.gm.graph.find_nodes(op="placeholder")
    left = [nodes[i] for i in places if i not in taken]
    reasons = (site.reason for site in found.sites if site.reason and not set(left).isdisjoint(site.buffers))
    return next(reasons, "") or f"part {places.index(nodes.index(left[0]))} of a stacked tensor is not appended to here"


def stacked_graph(gm: GraphModule, inputs: Sequence[Any]) -> StackedGraph | None:
    """The graph of the parts, if KV buffers among the inputs of ``gm`` are stacked and it takes them apart."""
    if not any(_may_be(each) for each in inputs):
        return None
    made = clone(gm)
    name_assignments(made.graph)
    nodes = made.graph.find_nodes(op="placeholder")
    written = {memory_of(each) for node in made.graph.nodes for each in written_by(node)}
    stacks: dict[int, Stack] = {}
    for i, node in enumerate(nodes):
        value = inputs[i]
        if not isinstance(value, StackedKV) and not (_may_be(value) and node in written and _dim([node]) is not None):
            continue
        stack = _split(made.graph, node)
        if stack is None:
            return None
        stacks[i] = stack
    if not stacks:
        return None
    made.recompile()
    return StackedGraph(made, stacks)


def _may_be(value: Any) -> bool:
    if isinstance(value, StackedKV):
        return True
    is_ordinary = type(value) is Tensor and not isinstance(value, Parameter)
    return is_ordinary and value.dim() > 4 and value.is_floating_point()


def _split(graph: Graph, buffer: Node) -> Stack | None:
    """Split an input into buffers of up to four dimensions; None if it cannot be."""
    dims: list[int] = []
    sizes: list[int] = []
    level = [buffer]
    while True:
        values = [value_of(node) for node in level]
        dim = values[0].at if isinstance(values[0], StackedKV) else _dim(level)
        if dim is None:
            return Stack(tuple(dims), tuple(sizes)) if dims and values[0].dim() <= 4 else None
        size = values[0].shape[dim]
        below: list[Node] = []
        for node, value in zip(level, values, strict=True):
            parts = split(graph, node, dim, [_value(value, dim, index) for index in range(size)])
            if parts is None:
                return None
            below += parts
        dims, sizes, level = [*dims, dim], [*sizes, size], below


def _dim(level: Sequence[Node]) -> int | None:
    """Along which dimension all of ``level`` are stacked, as far as they are used."""
    used = [node for node in level if node.users]
    dims = {stacked_dim(node) for node in used}
    return dims.pop() if len(dims) == 1 else None


def _value(value: Any, dim: int, index: int) -> Any:
    """What is known of a part."""
    if isinstance(value, StackedKV):
        return value.parts[index]
    with value.fake_mode:
        like = value.select(dim, index)  # in memory of its own, as other parts have theirs
        return torch.empty_strided(like.shape, like.stride(), dtype=value.dtype, device=value.device)
