"""Compile one layer of a model for all that are equal, and call it for each.

A graph of 30 equal layers takes Inductor 18 s, one layer of it and what stands before and behind 4. What it generates
for the layer is read and repeated with each layer's tensors (``kernels/cpu/wrapper_chain.py``), and compiled as the one
function that the whole graph would have become. Where that is not possible, the graph is compiled as a whole. The
function is kept on disk (``kept_steps.py``).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch._dynamo.utils import counters
from torch.fx import Graph, GraphModule, Node

from xquant_fx.compiler.any_room import rooms_of
from xquant_fx.compiler.open_numbers import asked
from xquant_fx.compiler.pieces import Cut, cut, why_not_inputs
from xquant_fx.compiler.repeats import Piece
from xquant_fx.kernels.cpu.any_room import compiled_for
from xquant_fx.kernels.cpu.kept_call import keep, restored
from xquant_fx.kernels.cpu.one_call import Chain, Generated, collected, joined_chain, read_generated
from xquant_fx.kernels.cpu.wrapper_chain import Link, layout
from xquant_fx.kernels.cpu.wrapper_code import NotReadError, Reader
from xquant_fx.passes.find_writes import other_mutations
from xquant_fx.passes.trace import memory_of, value_of

log = logging.getLogger(__name__)

Compile = Callable[[GraphModule, list[Any]], Any]


class Part(NamedTuple):
    """What equal pieces are compiled to."""

    generated: Generated
    read: Reader


def restored_layers(gm: GraphModule, inputs: Sequence[Any], place: Path) -> Callable[..., Any] | None:
    """What ``compile_layers`` made of the same graph before, perhaps in another process; None if it did not."""
    call = None if why_not_inputs(gm.graph, inputs) else restored(place)
    return None if call is None else _counting_writes(call, gm.graph)


def compile_layers(
    gm: GraphModule, inputs: Sequence[Any], compile_one: Compile, place: Path | None = None
) -> Callable[..., Any] | None:
    """The graph as a function, its equal layers compiled once; None if it has none, or they cannot be.

    It is kept at ``place``, unless it is for some numbers only that are known in a step: nobody would look at them.
    """
    before = asked(inputs)
    try:
        apart = cut(gm.graph, inputs)
        if apart is None:
            return None
        chain, spared = _chain(apart, compile_one), apart.spared
    except NotReadError as error:
        note_together(error)
        return None
    counters["xquant"]["layers_not_compiled_again"] += spared
    kept_at = place if asked(inputs) == before else None
    keep_it = None if kept_at is None else lambda kept: keep(kept._replace(spared=spared), kept_at)
    return _counting_writes(joined_chain(chain, keep_it), gm.graph)


def note_together(error: NotReadError) -> None:
    """Say why the layers of a graph are compiled together."""
    log.info("the layers of this graph are compiled together: %s", error)
    counters["xquant"][f"layers compiled together: {error}"] += 1


def _counting_writes(call: Callable[[list[Any]], Any], graph: Graph) -> Callable[..., Any]:
    """``call``, which torch does not see write: counts that in the versions of its arguments, as AOTAutograd does."""
    written = {memory_of(target) for _, target in other_mutations(graph, [])}
    numbers = [i for i, node in enumerate(graph.find_nodes(op="placeholder")) if node in written]

    def counting(*args: Any) -> Any:
        torch.autograd.graph.increment_version([args[i] for i in numbers])
        return call(list(args))

    return counting


def _chain(apart: Cut, compile_one: Compile) -> Chain:
    """Raises NotReadError if the parts, or how they fit together, are not what the whole graph would be."""
    parts = apart.each_form(lambda piece: _compiled(apart, piece, compile_one))
    places = {form: place for place, form in enumerate(parts)}
    links = [
        Link(
            places[piece.form],
            [node.name for node in piece.given],
            [node.name for node in apart.results_of(piece)],
        )
        for piece in apart.pieces
    ]
    return Chain(
        [part.generated for part in parts.values()],
        [part.read for part in parts.values()],
        links,
        [node.name for node in apart.given],
        apart.results,
    )


def _compiled(apart: Cut, piece: Piece, compile_one: Compile) -> Part:
    with collected() as found, compiled_for(rooms_of(piece.given)):
        compile_one(*apart.alone(piece))
    if not found:
        raise NotReadError("a part has no wrapper of ours")
    read = read_generated(found[-1])
    _check(piece, apart.results_of(piece), read)
    return Part(found[-1], read)


def _check(piece: Piece, returned: Sequence[Node], read: Reader) -> None:
    """A part takes all that it is given, and returns new tensors laid out as the next one was told."""
    if len(read.code.arguments) != len(piece.given) or len(read.code.results) != len(returned):
        raise NotReadError("a part takes or returns something else")
    for node, place in zip(returned, read.code.results, strict=True):
        value, found = value_of(node), layout(place, read)
        if found != (tuple(value.shape), value.stride()):
            raise NotReadError(f"{node.name} is returned in another way: {found}")
