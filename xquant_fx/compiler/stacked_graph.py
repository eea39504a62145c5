"""A graph whose KV buffers are parts of one tensor, as one of buffers of their own.

Parts of an ordinary tensor are given to it as aliases (``cache/aliases.py``). Where it takes all over that
it uses, the tensor becomes a ``StackedKV`` (``cache/stacked.py``) of these and of what is left, ordinary tensors that
other graphs may take over; where it does not, nothing is done to any.

The first rows of a buffer for more of them (``FirstRows``, ``cache/leading_rows.py``) are such a part, too: the
only one, and the rows behind it are what is left.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.nn import Parameter

from xquant_fx.cache.aliases import part_alias
from xquant_fx.cache.convert import restack_in_place, stack_in_place, unstacked, with_rows
from xquant_fx.cache.leading_rows import LeadingRowsKV
from xquant_fx.cache.reads import Dequantized
from xquant_fx.cache.stacked import StackedKV
from xquant_fx.compiler.other_graph import OtherGraph
from xquant_fx.passes.find_writes import written_memory
from xquant_fx.passes.graph import clone
from xquant_fx.passes.leading_rows import leading_rows, take_leading_rows, takes_rows
from xquant_fx.passes.normalize import name_assignments
from xquant_fx.passes.records import Detection
from xquant_fx.passes.split_stacks import split, stacked_dim
from xquant_fx.passes.trace import value_of
from xquant_fx.passes.why_left_alone import WHY_WHOLE

Place = tuple[tuple[int, int | range], ...]
"""The selections (dimension, index) that lead to a part, one after another."""


@dataclasses.dataclass(frozen=True)
class Stack:
    """How a tensor is stacked."""

    levels: tuple[tuple[int, int], ...]
    """The dimension of the tensor that parts are along, and how many there are; of a part those of its parts; ..."""
    places: tuple[Place, ...]
    """Of the parts that the graph uses."""

    def given(self, whole: Any) -> list[Any]:
        """The parts of ``whole`` that the graph uses; those of an ordinary tensor as aliases."""
        return [self.part(whole, place) for place in self.places]

    def part(self, whole: Any, place: Place) -> Any:
        """The part of ``whole`` at ``place``."""
        while place and isinstance(whole, StackedKV):
            whole, place = whole.parts[place[0][1]], place[1:]  # type: ignore[index]
        return part_alias(whole, place) if place else whole

    def renewed(self, whole: Any, parts: Mapping[Place, Any], place: Place = ()) -> Any:
        """``whole`` with ``parts`` in their places; what is left of an ordinary tensor gets memory of its own."""
        if place in parts:
            return parts[place]
        if not isinstance(whole, StackedKV) and not any(each[: len(place)] == place for each in parts):
            return whole
        at, size = self.levels[len(place)]
        is_stack = isinstance(whole, StackedKV)
        below = whole.parts if is_stack else whole.unbind(at)
        renewed = [self.renewed(each, parts, (*place, (at, i))) for i, each in zip(range(size), below, strict=True)]
        if any(isinstance(each, Dequantized) for each in renewed):
            return StackedKV(
                [new.clone() if new is old and not is_stack else new for new, old in zip(renewed, below, strict=True)],
                at,
            )
        return unstacked(renewed, at)


@dataclasses.dataclass(frozen=True)
class FirstRows(Stack):
    """A buffer of more rows than the graph takes from it, all of its first ones."""

    @classmethod
    def of(cls, rows: int) -> FirstRows:
        """The first ``rows`` of a buffer."""
        return cls((), (((0, range(rows)),),))

    def part(self, whole: Any, place: Place) -> Any:
        """The rows."""
        return whole.parts[0] if isinstance(whole, StackedKV) else part_alias(whole, place)

    def renewed(self, whole: Any, parts: Mapping[Place, Any], place: Place = ()) -> Any:
        """``whole`` with the first rows of ``parts``; the others get memory of their own."""
        (first,) = parts.values() or self.given(whole)
        rest = whole.parts[1] if isinstance(whole, StackedKV) else whole[first.shape[0] :].clone()
        return LeadingRowsKV([first, rest]) if isinstance(first, Dequantized) else with_rows(first, rest)


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
    """Which inputs of the program's graph are stacks. Of each the parts that are used are inputs here, in its place."""

    def given(self, args: Sequence[Any]) -> list[Any]:
        """``args`` of the program's graph as those of this one."""
        stacks = self.stacks
        return [each for i, arg in enumerate(args) for each in (stacks[i].given(arg) if i in stacks else (arg,))]

    def calling(self, compiled: Callable[..., Any]) -> Callable[..., Any]:
        """What is given the program's arguments; makes stacks of what is quantized by then, or no longer."""

        def call(*args: Any) -> Any:
            given, is_done = self.given(args), False
            try:
                results = compiled(*given)
                is_done = True
                return results
            finally:
                self._settle(args, given, is_done)

        return call

    def _settle(self, args: Sequence[Any], given: Sequence[Any], is_done: bool) -> None:
        begin = 0
        for i, arg in enumerate(args):
            if i not in self.stacks:
                begin += 1
                continue
            places = self.stacks[i].places
            parts, begin = dict(zip(places, given[begin : begin + len(places)], strict=True)), begin + len(places)
            quantized = {place: part for place, part in parts.items() if isinstance(part, Dequantized)}
            is_stack, are_all = isinstance(arg, StackedKV), len(quantized) == len(parts)
            if is_stack and are_all and all(self.stacks[i].part(arg, place) is part for place, part in parts.items()):
                continue
            if not is_stack and quantized and are_all:
                stack_in_place(arg, self._renewed(i, arg, quantized))
            elif is_stack and (is_done or are_all):  # of a step that breaks off nothing is taken over
                restack_in_place(arg, self._renewed(i, arg, quantized))

    def _renewed(self, index: int, whole: Any, parts: Mapping[Place, Any]) -> Any:
        with torch.inference_mode(False), torch.no_grad():
            return self.stacks[index].renewed(whole, parts)

    def judge(self, inputs: Sequence[Any]) -> Judge:
        """What is told what was decided about this graph, and raises LeftWholeError where a part of an ordinary
        tensor among the program's ``inputs`` is not to be taken over."""
        places, begin = [], 0
        for i, arg in enumerate(inputs):
            size = len(self.stacks[i].places) if i in self.stacks else 1
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
    given = zip(gm.graph.find_nodes(op="placeholder"), inputs, strict=True)
    if not any(_may_be(each) or (_may_have_rows(each) and takes_rows(node)) for node, each in given):
        return None
    made = clone(gm)
    name_assignments(made.graph)
    nodes = made.graph.find_nodes(op="placeholder")
    written = written_memory(made.graph)
    stacks: dict[int, Stack] = {}
    for i, node in enumerate(nodes):
        value = inputs[i]
        if isinstance(value, LeadingRowsKV) or _may_have_rows(value):
            rows = leading_rows(node)
            if isinstance(value, LeadingRowsKV) and rows != value.rows:
                return None
            if rows is not None:
                take_leading_rows(made.graph, node, _first_rows(value_of(node), rows))
                stacks[i] = FirstRows.of(rows)
            continue
        if not isinstance(value, StackedKV) and not (_may_be(value) and node in written and _dim(node) is not None):
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
    return isinstance(value, StackedKV) or (_is_ordinary(value) and value.dim() > 4)


def _may_have_rows(value: Any) -> bool:
    return _is_ordinary(value) and value.dim() in (3, 4)


def _is_ordinary(value: Any) -> bool:
    return type(value) is Tensor and not isinstance(value, Parameter) and value.is_floating_point()


def _split(graph: Graph, buffer: Node) -> Stack | None:
    """Split an input into buffers of up to four dimensions; None if it cannot be."""
    levels: list[tuple[int, int]] = []
    below: dict[Place, Node] = {(): buffer}
    while True:
        values = [value_of(node) for node in below.values()]
        ats = {_dim(node) for node in below.values()}
        at = ats.pop() if len(ats) == 1 else None
        if at is None:
            are_buffers = levels and all(value.dim() <= 4 and not isinstance(value, StackedKV) for value in values)
            return Stack(tuple(levels), tuple(below)) if are_buffers else None
        level, below = below, {}
        for (place, node), value in zip(level.items(), values, strict=True):
            parts = split(graph, node, at, [_value(value, at, index) for index in range(value.shape[at])])
            if parts is None:
                return None
            below.update({(*place, (at, index)): part for index, part in enumerate(parts) if part.users})
            for part in parts:
                if not part.users:
                    graph.erase_node(part)
        levels.append((at, values[0].shape[at]))


def _dim(node: Node) -> int | None:
    """Along which dimension ``node`` is stacked, as far as it is used; None of what is quantized as one buffer."""
    value = value_of(node)
    if isinstance(value, Dequantized):
        return value.at if isinstance(value, StackedKV) else None
    return stacked_dim(node)


def _value(value: Any, dim: int, index: int) -> Any:
    """What is known of a part."""
    if isinstance(value, StackedKV):
        return value.parts[index]
    with value.fake_mode:
        return _apart(value.select(dim, index))


def _first_rows(value: Any, rows: int) -> Any:
    if isinstance(value, StackedKV):
        return value.parts[0]
    with value.fake_mode:
        return _apart(value[:rows])


def _apart(part: Tensor) -> Tensor:
    """Like ``part``, in memory of its own, as other parts have theirs."""
    return torch.empty_strided(part.shape, part.stride(), dtype=part.dtype, device=part.device)
