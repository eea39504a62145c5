"""A graph cut into its layers: what each is given and returns, and the graph of one by itself.

Relied on: that AOTAutograd hands all inputs and results of a graph without gradients, in order, to what it compiles.
Checked on torch 2.11 and 2.13.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, TypeVar

import torch
from sympy import Symbol  # type: ignore[import-untyped]
from torch import Tensor
from torch._guards import TracingContext
from torch.fx import Graph, GraphModule, Node
from torch.nn import Parameter

from xquant_fx.compiler.open_numbers import asked, is_number, number_of
from xquant_fx.compiler.repeats import Piece, pieces_of, why_not_apart
from xquant_fx.kernels.cpu.wrapper_chain import Result
from xquant_fx.kernels.cpu.wrapper_code import NotReadError, Number
from xquant_fx.passes.find_writes import other_mutations
from xquant_fx.passes.trace import fake, memory_of, value_of

Made = TypeVar("Made")


class Cut(NamedTuple):
    """Pieces of a graph that do all it does, one behind the other."""

    pieces: Sequence[Piece]
    returned: Mapping[Hashable, Sequence[int]]
    """By the form of a piece, which of its nodes it returns."""
    given: Mapping[Node, Any]
    """The graph's own inputs, and an example of each."""
    results: Sequence[Result]
    """What the graph returns."""

    @property
    def spared(self) -> int:
        """How many pieces need not be compiled, since one like them is."""
        return len(self.pieces) - len(self.returned)

    def results_of(self, piece: Piece) -> list[Node]:
        """The nodes of ``piece`` that it returns."""
        return [piece.nodes[i] for i in self.returned[piece.form]]

    def each_form(self, make: Callable[[Piece], Made]) -> dict[Hashable, Made]:
        """What ``make`` gives for a piece of each form, by form; that of most pieces first.

        Raises:
            NotReadError: what is made for one holds for some of its numbers only.
        """
        made, inputs = dict[Hashable, Made](), list(self.given.values())
        for form, _ in Counter(piece.form for piece in self.pieces).most_common():
            equal, before = [piece for piece in self.pieces if piece.form == form], asked(inputs)
            made[form] = make(equal[0])
            numbers = {tuple(filter(is_number, piece.given)) for piece in equal}
            if len(numbers) > 1 and asked(inputs) != before:
                raise NotReadError("what was compiled for one layer holds for some of its numbers only")
        return made

    def alone(self, piece: Piece) -> tuple[GraphModule, list[Any]]:
        """``piece`` by itself, which takes what it is given and returns what others read, and examples of inputs."""
        examples = [self.given[node] if node in self.given else _like(value_of(node)) for node in piece.given]
        return by_itself(piece, self.results_of(piece)), examples


def by_itself(piece: Piece, returned: Sequence[Node]) -> GraphModule:
    """The graph of ``piece``, which takes what that is given, and returns those of its nodes."""
    graph, env = Graph(), dict[Node, Node]()
    for node in piece.given:
        env[node] = graph.placeholder(node.name)
        env[node].meta["example_value"] = node.meta.get("example_value")
    for node in piece.nodes:
        env[node] = graph.node_copy(node, env.__getitem__)
    graph.output(tuple(env[node] for node in returned))
    return GraphModule({}, graph)


def cut(graph: Graph, inputs: Sequence[Any]) -> Cut | None:
    """``graph`` in pieces, of which several are equal; None if none are.

    Raises:
        NotReadError: they cannot be compiled by themselves.
    """
    pieces = pieces_of(graph)
    if len(pieces) < 2:
        return None
    if reason := why_not_apart(graph, pieces) or why_not_inputs(graph, inputs):
        raise NotReadError(reason)
    given = dict(zip(graph.find_nodes(op="placeholder"), inputs, strict=True))
    outputs: Any = graph.output_node().args[0]
    numbers = {number_of(node): node for node in given if is_number(node)}
    results = [_result(each, numbers) for each in outputs]
    pieces = [_with_sizes(piece, numbers) for piece in pieces]
    return Cut(pieces, _returned(pieces), given, results)


def why_not_inputs(graph: Graph, inputs: Sequence[Any]) -> str:
    """Inputs must be plain tensors, or numbers of the step.

    One that is written to must not show in another: layers might differ in that.
    """
    given = dict(zip(graph.find_nodes(op="placeholder"), inputs, strict=True))
    if any(type(each) not in (Tensor, Parameter) and not is_number(node) for node, each in given.items()):
        return "an input is no plain tensor"
    shown = [each.untyped_storage().data_ptr() for each in inputs if isinstance(each, Tensor)]
    for node, target in other_mutations(graph, []):
        memory = given.get(memory_of(target))
        if memory is not None and shown.count(memory.untyped_storage().data_ptr()) > 1:
            return f"{node.name} writes to memory of several inputs"
    return ""


def _result(node: Any, numbers: Mapping[Any, Node]) -> str | Number | None:
    """What the chain calls a result, or how a number follows from those that are given, ``numbers``."""
    if type(node) is int:  # which is known, of a step that was made one of known numbers
        return Number(str(node))
    if node is None or fake(node) is not None:
        return None if node is None else str(node.name)
    number = number_of(node) if isinstance(node, Node) and is_number(node) else None
    if number is None or not number.is_polynomial() or not number.free_symbols <= numbers.keys():
        raise NotReadError("a result is neither a tensor nor a sum of numbers that are given")
    return Number(str(number.xreplace({symbol: Symbol(numbers[symbol].name) for symbol in number.free_symbols})))


def _with_sizes(piece: Piece, numbers: Mapping[Any, Node]) -> Piece:
    """``piece``, given those of ``numbers``, too, that are sizes of what it is given."""
    values = [value for value in map(fake, piece.given) if value is not None]
    sizes = [size for value in values for size in (*value.shape, *value.stride()) if isinstance(size, torch.SymInt)]
    symbols = {symbol for size in sizes for symbol in size.node.expr.free_symbols}
    symbols -= {number_of(node) for node in piece.given if is_number(node)}
    if not symbols <= numbers.keys():
        raise NotReadError("a size of an input is none of the numbers that are given")
    return piece._replace(given=[*piece.given, *(numbers[symbol] for symbol in sorted(symbols, key=str))])


def _returned(pieces: Sequence[Piece]) -> dict[Hashable, list[int]]:
    """By the form of a piece, the nodes that are used outside of one that has it, but for numbers, by their place."""
    found = dict[Hashable, set[int]]()
    for piece in pieces:
        inside = set(piece.nodes)
        tensors = ((i, node) for i, node in enumerate(piece.nodes) if not is_number(node))
        used = (i for i, node in tensors if any(user not in inside for user in node.users))
        found.setdefault(piece.form, set()).update(used)
    return {form: sorted(numbers) for form, numbers in found.items()}


def _like(value: Tensor) -> Tensor:
    """A tensor such as ``value``, of static shape in the mode in which AOTAutograd looks at a graph."""
    with aots_mode():
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)


def aots_mode() -> AbstractContextManager[Any]:
    """The mode in which AOTAutograd looks at a graph."""
    context = TracingContext.try_get()
    return contextlib.nullcontext() if context is None or context.fake_mode is None else context.fake_mode
