"""Layers of a chunk, compiled once for all that are equal, and called one behind the other in Python.

A chunk's matrix products are calls of torch's that no C++ of ours makes, so its layers do not become one function
(``layers.py``). Together they take Inductor 30 s, for a small model. Beside what a chunk computes, a call in Python for
each layer is nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

from torch._dynamo.utils import counters
from torch.fx import GraphModule, Node

from xquant_fx.compiler.any_room import rooms_of
from xquant_fx.compiler.layers import Compile, note_together
from xquant_fx.compiler.pieces import Cut, cut
from xquant_fx.compiler.repeats import Piece
from xquant_fx.kernels.cpu.any_room import compiled_for, rooms
from xquant_fx.kernels.cpu.in_turn import InTurn, Turn
from xquant_fx.kernels.cpu.wrapper_code import NotReadError
from xquant_fx.passes.trace import value_of


def compile_in_turn(gm: GraphModule, inputs: Sequence[Any], compile_one: Compile) -> Callable[..., Any] | None:
    """The graph as a function, its equal layers compiled once; None if it has none, or they cannot be."""
    try:
        apart = cut(gm.graph, inputs)
        if apart is None:
            return None
        strides = _strides(apart)
        calls = apart.each_form(lambda piece: _compiled(apart, piece, compile_one))
    except NotReadError as error:
        note_together(error)
        return None
    counters["xquant"]["layers_not_compiled_again"] += apart.spared
    turns = [_turn(piece, apart.results_of(piece), calls[piece.form], strides) for piece in apart.pieces]
    return InTurn([node.name for node in apart.given], turns, apart.results)


def _strides(apart: Cut) -> dict[Node, tuple[int, ...]]:
    """Of what one piece gives another: its shape is known (``why_not_apart``)."""
    given: Collection[Node] = {node for piece in apart.pieces for node in piece.given} - apart.given.keys()
    found = {node: value_of(node).stride() for node in given}
    for node, strides in found.items():
        if any(stride == 0 for stride in strides):
            raise NotReadError(f"{node.name} repeats elements, which it need not do once it is computed")
    return found


def _compiled(apart: Cut, piece: Piece, compile_one: Compile) -> Callable[..., Any]:
    of_piece, of_graph = rooms_of(piece.given), rooms()
    with compiled_for(of_piece):
        call: Callable[..., Any] = compile_one(*apart.alone(piece))
    if of_piece is not None and of_graph is not None:
        of_graph.calls.append(of_piece.are_open)
    return call


def _turn(piece: Piece, returned: list[Node], call: Callable[..., Any], strides: dict[Node, tuple[int, ...]]) -> Turn:
    given, names = [node.name for node in piece.given], [node.name for node in returned]
    return Turn(call, given, names, [strides.get(node) for node in returned])
