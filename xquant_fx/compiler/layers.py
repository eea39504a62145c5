"""Compile one layer of a model for all that are equal, and call it for each.

A graph of 30 equal layers takes Inductor 18 s, one layer of it and what stands before and behind 4. What it generates
for the layer is read and repeated with each layer's tensors (``kernels/cpu/wrapper_chain.py``), and compiled as the one
function that the whole graph would have become. Where that is not possible, the graph is compiled as a whole. The
function is kept on disk (``kept_steps.py``).

Relied on: that AOTAutograd hands all inputs and results of a graph without gradients, in order, to the wrapper that
Inductor generates. Checked on torch 2.11 and 2.13.
"""

from __future__ import annotations

import contextlib
import logging
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from sympy import Symbol  # type: ignore[import-untyped]
from torch import Tensor
from torch._dynamo.utils import counters
from torch._guards import TracingContext
from torch.fx import Graph, GraphModule, Node
from torch.nn import Parameter

from xquant_fx.compiler.any_room import rooms_of
from xquant_fx.compiler.open_numbers import asked, is_number, number_of
from xquant_fx.compiler.repeats import Piece, pieces_of, why_not_apart
from xquant_fx.kernels.cpu.any_room import compiled_for
from xquant_fx.kernels.cpu.kept_call import keep, restored
from xquant_fx.kernels.cpu.one_call import Chain, Generated, collected, joined_chain, read_generated
from xquant_fx.kernels.cpu.wrapper_chain import Link, layout
from xquant_fx.kernels.cpu.wrapper_code import NotReadError, Number, Reader
from xquant_fx.passes.find_writes import other_mutations
from xquant_fx.passes.trace import fake, memory_of, value_of

log = logging.getLogger(__name__)

Compile = Callable[[GraphModule, list[Any]], Any]


class Part(NamedTuple):
    """What equal pieces are compiled to."""

    generated: Generated
    read: Reader


def restored_layers(gm: GraphModule, inputs: Sequence[Any], place: Path) -> Callable[..., Any] | None:
    """What ``compile_layers`` made of the same graph before, perhaps in another process; None if it did not."""
    call = None if _why_not_inputs(gm.graph, inputs) else restored(place)
    return None if call is None else _counting_writes(call, gm.graph)


def compile_layers(
    gm: GraphModule, inputs: Sequence[Any], compile_one: Compile, place: Path | None = None
) -> Callable[..., Any] | None:
    """The graph as a function, its equal layers compiled once; None if it has none, or they cannot be.

    It is kept at ``place``, unless it is for some numbers only that are known in a step: nobody would look at them.
    """
    pieces = pieces_of(gm.graph)
    if len(pieces) < 2:
        return None
    try:
        if reason := why_not_apart(gm.graph, pieces) or _why_not_inputs(gm.graph, inputs):
            raise NotReadError(reason)
        before = asked(inputs)
        chain = _chain(gm.graph, pieces, inputs, compile_one)
        place = place if asked(inputs) == before else None
    except NotReadError as error:
        log.info("the layers of this graph are compiled together: %s", error)
        counters["xquant"][f"layers compiled together: {error}"] += 1
        return None
    spared = len(pieces) - len(chain.generated)
    counters["xquant"]["layers_not_compiled_again"] += spared
    kept_at = None if place is None else lambda kept: keep(kept._replace(spared=spared), place)
    return _counting_writes(joined_chain(chain, kept_at), gm.graph)


def _counting_writes(call: Callable[[list[Any]], Any], graph: Graph) -> Callable[..., Any]:
    """``call``, which torch does not see write: counts that in the versions of its arguments, as AOTAutograd does."""
    written = {memory_of(target) for _, target in other_mutations(graph, [])}
    numbers = [i for i, node in enumerate(graph.find_nodes(op="placeholder")) if node in written]

    def counting(*args: Any) -> Any:
        torch.autograd.graph.increment_version([args[i] for i in numbers])
        return call(list(args))

    return counting


def _why_not_inputs(graph: Graph, inputs: Sequence[Any]) -> str:
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


def _chain(graph: Graph, pieces: Sequence[Piece], inputs: Sequence[Any], compile_one: Compile) -> Chain:
    """Raises NotReadError if the parts, or how they fit together, are not what the whole graph would be."""
    given = dict(zip(graph.find_nodes(op="placeholder"), inputs, strict=True))
    outputs: Any = graph.output_node().args[0]
    numbers = {number_of(node): node for node in given if is_number(node)}
    results = [_result(each, numbers) for each in outputs]
    pieces = [_with_sizes(piece, numbers) for piece in pieces]
    returned = _returned(pieces)
    parts = dict[Hashable, Part]()
    for form, count in Counter(piece.form for piece in pieces).most_common():  # what fails, fails with the layers
        piece, before = next(piece for piece in pieces if piece.form == form), asked(inputs)
        parts[form] = _compiled(piece, returned[form], given, compile_one)
        if count > 1 and asked(inputs) != before:
            raise NotReadError("what was compiled for one layer holds for some of its numbers only")
    places = {form: place for place, form in enumerate(parts)}
    links = [
        Link(
            places[piece.form],
            [node.name for node in piece.given],
            [piece.nodes[i].name for i in returned[piece.form]],
        )
        for piece in pieces
    ]
    return Chain(
        [part.generated for part in parts.values()],
        [part.read for part in parts.values()],
        links,
        [node.name for node in given],
        results,
    )


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


def _compiled(piece: Piece, returned: Sequence[int], given: dict[Node, Any], compile_one: Compile) -> Part:
    """``piece`` by itself: it takes what it is given, and returns the values of the nodes that ``returned`` numbers."""
    graph, env = Graph(), dict[Node, Node]()
    for node in piece.given:
        env[node] = graph.placeholder(node.name)
        env[node].meta["example_value"] = node.meta["example_value"]
    for node in piece.nodes:
        env[node] = graph.node_copy(node, env.__getitem__)
    graph.output(tuple(env[piece.nodes[i]] for i in returned))
    examples = [given[node] if node in given else _like(value_of(node)) for node in piece.given]
    with collected() as found, compiled_for(rooms_of(piece.given)):
        compile_one(GraphModule({}, graph), examples)
    if not found:
        raise NotReadError("a part has no wrapper of ours")
    read = read_generated(found[-1])
    _check(piece, returned, read)
    return Part(found[-1], read)


def _like(value: Tensor) -> Tensor:
    """A tensor such as ``value``, of static shape in the mode in which AOTAutograd looks at a graph."""
    context = TracingContext.try_get()
    with contextlib.nullcontext() if context is None or context.fake_mode is None else context.fake_mode:
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)


def _check(piece: Piece, returned: Sequence[int], read: Reader) -> None:
    """A part takes all that it is given, and returns new tensors laid out as the next one was told."""
    if len(read.code.arguments) != len(piece.given) or len(read.code.results) != len(returned):
        raise NotReadError("a part takes or returns something else")
    for number, place in zip(returned, read.code.results, strict=True):
        node = piece.nodes[number]
        value, found = value_of(node), layout(place, read)
        if found != (tuple(value.shape), value.stride()):
            raise NotReadError(f"{node.name} is returned in another way: {found}")
