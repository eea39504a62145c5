"""Compiled parts of a graph, called one behind the other in Python."""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from xquant_fx.kernels.cpu.wrapper_chain import Result
from xquant_fx.kernels.cpu.wrapper_code import Number


class Turn(NamedTuple):
    """A call of one part."""

    call: Callable[..., Sequence[Any]]
    given: Sequence[str]
    returned: Sequence[str]
    strides: Sequence[tuple[int, ...] | None]
    """Of what is returned, as the parts that are given it were told; None: as it comes."""


class InTurn:
    """Makes the calls of ``turns``, and keeps what one computes for another no longer than that."""

    def __init__(self, arguments: Sequence[str], turns: Sequence[Turn], results: Sequence[Result]) -> None:
        self.arguments, self.turns, self.results = arguments, turns, results
        self.done = list[list[str]]()
        """For each turn what nothing behind it needs."""
        later = {name for result in results for name in _names(result)}
        for turn in reversed(turns):
            here = {*turn.given, *turn.returned}
            self.done.insert(0, sorted(here - later))
            later |= here

    def __call__(self, *args: Any) -> tuple[Any, ...]:
        """What the graph returns for its inputs ``args``."""
        values = dict(zip(self.arguments, args, strict=True))
        for turn, done in zip(self.turns, self.done, strict=True):
            values.update(_called(turn, values))
            for name in done:
                del values[name]
        return tuple(_value(result, values) for result in self.results)


def _called(turn: Turn, values: Mapping[str, Any]) -> dict[str, Any]:
    found = turn.call(*[values[name] for name in turn.given])
    return dict(zip(turn.returned, map(_laid_out, found, turn.strides), strict=True))


def _laid_out(value: Tensor, strides: tuple[int, ...] | None) -> Tensor:
    """``value`` with these strides: Inductor lays most out so, but need not."""
    if strides is None or value.stride() == strides:
        return value
    return torch.empty_strided(value.shape, strides, dtype=value.dtype, device=value.device).copy_(value)


def _names(result: Result) -> set[str]:
    if isinstance(result, Number):
        return {node.id for node in ast.walk(ast.parse(result.python)) if isinstance(node, ast.Name)}
    return set() if result is None else {result}


def _value(result: Result, values: Mapping[str, Any]) -> Any:
    if isinstance(result, Number):
        return eval(result.python, {"__builtins__": {}}, dict(values))  # a sum that we wrote
    return None if result is None else values[result]
