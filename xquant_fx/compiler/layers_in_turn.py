"""Layers of a chunk, compiled once for all that are equal, and called one behind the other in Python.

A chunk's matrix products are calls of torch's that no C++ of ours makes, so its layers do not become one function
(``layers.py``). Together they take Inductor 30 s, for a small model. Beside what a chunk computes, a call in Python for
each layer is nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch.fx import GraphModule

from xquant_fx.compiler.any_room import rooms_of
from xquant_fx.compiler.layers import Compile, note_together
from xquant_fx.compiler.pieces import Cut, cut
from xquant_fx.compiler.repeats import Piece
from xquant_fx.kernels.cpu.any_room import compiled_for, rooms
from xquant_fx.kernels.cpu.one_call import value_of_result
from xquant_fx.kernels.cpu.wrapper_chain import Result
from xquant_fx.kernels.cpu.wrapper_code import NotReadError
from xquant_fx.passes.trace import value_of


class Turn(NamedTuple):
    """A call of what a piece is compiled to."""

    call: Callable[..., Any]
    given: Sequence[str]
    returned: Sequence[str]
    strides: Sequence[tuple[int, ...]]
    """Of what is returned, as the next piece was told."""
    done: Sequence[str]
    """What no later piece is given."""


def compile_in_turn(gm: GraphModule, inputs: Sequence[Any], compile_one: Compile) -> Callable[..., Any] | None:
    """The graph as a function, its equal layers compiled once; None if it has none, or they cannot be."""
    try:
        apart = cut(gm.graph, inputs)
        if apart is None:
            return None
        calls = apart.each_form(lambda piece, _: _compiled(apart, piece, compile_one))
    except NotReadError as error:
        note_together(error)
        return None
    counters["xquant"]["layers_not_compiled_again"] += apart.spared
    kept = {result for result in apart.results if isinstance(result, str)}
    turns = list[Turn]()
    for piece in reversed(apart.pieces):
        turn = _turn(apart, piece, calls[piece.form], kept)
        kept.update(turn.given)
        turns.insert(0, turn)
    return InTurn([node.name for node in apart.given], turns, apart.results)


def _compiled(apart: Cut, piece: Piece, compile_one: Compile) -> Callable[..., Any]:
    of_piece, of_graph = rooms_of(piece.given), rooms()
    with compiled_for(of_piece):
        call: Callable[..., Any] = compile_one(*apart.alone(piece))
    if of_piece is not None and of_graph is not None:
        of_graph.calls.append(of_piece.are_open)
    return call


def _turn(apart: Cut, piece: Piece, call: Callable[..., Any], later: set[str]) -> Turn:
    """``later``: what the pieces behind it are given, or the graph returns."""
    given = [node.name for node in piece.given]
    returned = [piece.nodes[i] for i in apart.returned[piece.form]]
    done = sorted({*given, *(node.name for node in returned)} - later)
    return Turn(call, given, [node.name for node in returned], [value_of(node).stride() for node in returned], done)


class InTurn:
    """Makes the calls of a graph's pieces, and keeps what one computes for another no longer than that."""

    def __init__(self, arguments: Sequence[str], turns: Sequence[Turn], results: Sequence[Result]) -> None:
        self.arguments, self.turns, self.results = arguments, turns, results

    def __call__(self, *args: Any) -> tuple[Any, ...]:
        """What the graph returns for its inputs ``args``."""
        values = dict(zip(self.arguments, args, strict=True))
        for turn in self.turns:
            found = turn.call(*[values[name] for name in turn.given])
            values.update(zip(turn.returned, map(_laid_out, found, turn.strides), strict=True))
            for name in turn.done:
                del values[name]
        return tuple(value_of_result(result, values) for result in self.results)


def _laid_out(value: Tensor, strides: tuple[int, ...]) -> Tensor:
    """``value`` with these strides: Inductor lays most out so, but need not."""
    if value.stride() == strides:
        return value
    return torch.empty_strided(value.shape, strides, dtype=value.dtype, device=value.device).copy_(value)
