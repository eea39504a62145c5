"""A graph whose keys and values grow along another dimension than 2, as one of those that grow along that.

It is given quantized tensors in the order [B, H, N, D], and ordinary ones as views in that order; what it returns of
them gets the dimensions that the program has them in.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.fx import GraphModule, Node

from xquant_fx.cache.aliases import in_order, laid_out
from xquant_fx.cache.growing import GrowingKV
from xquant_fx.cache.laid_out_growing import LaidOutGrowingKV
from xquant_fx.compiler.other_graph import OtherGraph
from xquant_fx.passes.find_writes import written_by
from xquant_fx.passes.graph import clone
from xquant_fx.passes.order_growth import attended, concatenations, order_growth
from xquant_fx.passes.trace import fake, readers, shares_memory, value_of


@dataclasses.dataclass(frozen=True)
class LaidOutGrowth(OtherGraph):
    """A graph in which all that grows is in the usual order."""

    dims: Mapping[int, str]
    """Of the inputs that it gets in the usual order: their dimensions,"""
    results: Mapping[int, str]
    """and of the results that it gives in that order."""

    def given(self, args: Sequence[Any]) -> list[Any]:
        """``args`` of the program's graph as those of this one."""
        return [_ordered(arg, self.dims[i]) if i in self.dims else arg for i, arg in enumerate(args)]

    def calling(self, compiled: Callable[..., Any]) -> Callable[..., Any]:
        """What is given the program's arguments, calls ``compiled`` and gives the program's results."""

        def call(*args: Any) -> tuple[Any, ...]:
            return tuple(
                _laid_out(result, self.results[i]) if i in self.results else result
                for i, result in enumerate(compiled(*self.given(args)))
            )

        return call

    def or_program(self, compiler: Callable[..., Any], gm: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        """``compiler``, which gets the program's own graph where nothing is quantized: then no tensor is moved."""
        return self.unless_ordinary(compiler, gm, inputs, self._of_program)

    def _of_program(self, compiled: Callable[..., Any]) -> Callable[..., Any]:
        """``compiled``, which was made of the program's graph, with this one's arguments and results: views."""

        def call(*args: Any) -> list[Any]:
            own = [laid_out(arg, self.dims[i]) if i in self.dims else arg for i, arg in enumerate(args)]
            results = enumerate(compiled(*own))
            return [in_order(result, self.results[i]) if i in self.results else result for i, result in results]

        return call


def _ordered(arg: Tensor, dims: str) -> Tensor:
    return arg.ordered if isinstance(arg, LaidOutGrowingKV) else in_order(arg, dims)


def _laid_out(result: Tensor, dims: str) -> Tensor:
    if isinstance(result, GrowingKV):
        return LaidOutGrowingKV(result, dims)
    return laid_out(result, dims).contiguous()  # as a concatenation is


def laid_out_growth(gm: GraphModule, inputs: Sequence[Any]) -> LaidOutGrowth | None:
    """The graph of tensors that grow in the usual order, if some of ``gm`` do in another one.

    Raises:
        UnsupportedWriteError: a quantized one is written to in a way that is no append.
    """
    found = concatenations(gm.graph)
    if not found and not any(isinstance(each, LaidOutGrowingKV) for each in inputs):
        return None
    made = clone(gm)
    nodes = made.graph.find_nodes(op="placeholder")
    for node in nodes:
        _check_writes(node)
    found = attended(made.graph, concatenations(made.graph))
    dims = {node: fake(node).dims for node in nodes if isinstance(fake(node), LaidOutGrowingKV)}  # type: ignore[union-attr]
    dims |= {each.past: each.dims for each in found if each.past in nodes and value_of(each.past).dim() > 1}
    if not found and not dims:
        return None
    results = order_growth(made.graph, found, {node: (each, _value(node, each)) for node, each in dims.items()})
    made.recompile()
    return LaidOutGrowth(made, {i: dims[node] for i, node in enumerate(nodes) if node in dims}, results)


def _check_writes(node: Node) -> None:
    """What is written to a view of quantized tokens would be lost, too: the graph gets numbers made for it."""
    value = fake(node)
    for user, operand in readers(node, shares_memory) if isinstance(value, LaidOutGrowingKV) else ():
        if operand in written_by(user):
            value.refuse_write(user.target)  # type: ignore[union-attr]


def _value(node: Node, dims: str) -> Any:
    """What is known of the input in its place."""
    value: Any = fake(node)
    if isinstance(value, LaidOutGrowingKV):
        return value.ordered
    with value.fake_mode:
        return in_order(value, dims)
