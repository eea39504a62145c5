"""A graph whose KV buffers are in another order of dimensions, as one of buffers [B, H, N, D].

Ordinary buffers are given to it as aliases (``cache/aliases.py``), quantized ones as what they are in that order.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.nn import Parameter

from xquant_fx.cache.aliases import alias_of, in_order, laid_out
from xquant_fx.cache.growing import STORED_KV
from xquant_fx.cache.laid_out import LaidOutKV
from xquant_fx.compiler.other_graph import OtherGraph
from xquant_fx.passes.facts import Facts
from xquant_fx.passes.graph import clone
from xquant_fx.passes.normalize import name_assignments
from xquant_fx.passes.order_dims import dims_of, order_dims
from xquant_fx.passes.trace import fake, value_of


@dataclasses.dataclass(frozen=True)
class LaidOutGraph(OtherGraph):
    """A graph of buffers in the usual order."""

    dims: Mapping[int, str]
    """Of the inputs that it gets in the usual order: their dimensions."""

    def given(self, args: Sequence[Any]) -> list[Any]:
        """``args`` of the program's graph as those of this one."""
        return [_in_order(arg, self.dims[i]) if i in self.dims else arg for i, arg in enumerate(args)]

    def or_program(self, compiler: Callable[..., Any], gm: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        """``compiler``, which gets the program's own graph where nothing is quantized."""
        return self.unless_ordinary(compiler, gm, inputs, self._of_program)

    def _of_program(self, compiled: Callable[..., Any]) -> Callable[..., Any]:
        """``compiled``, which was made of the program's graph, with this one's arguments: views."""
        return lambda *args: compiled(
            *(laid_out(arg, self.dims[i]) if i in self.dims else arg for i, arg in enumerate(args))
        )


def _in_order(arg: Any, dims: str) -> Any:
    if isinstance(arg, LaidOutKV):
        return arg.ordered
    return alias_of(arg, dims) if type(arg) is Tensor else in_order(arg, dims)


def laid_out_graph(gm: GraphModule, inputs: Sequence[Any]) -> LaidOutGraph | None:
    """The graph of buffers in the usual order, if some of ``gm`` are in another one.

    Raises:
        UnsupportedWriteError: a quantized one is written to in a way that is no append.
    """
    if not any(_may_be(each) for each in inputs):
        return None
    made = clone(gm)
    name_assignments(made.graph)
    nodes = made.graph.find_nodes(op="placeholder")
    found = {i: each for i, node in enumerate(nodes) if (each := _dims(node, inputs[i]))}
    attended = _attended(made.graph) if found else set()
    dims = {i: each for i, each in found.items() if isinstance(inputs[i], LaidOutKV) or nodes[i] in attended}
    if not dims or not order_dims(made.graph, {nodes[i]: (each, _value(nodes[i], each)) for i, each in dims.items()}):
        for buffer in inputs:
            if isinstance(buffer, LaidOutKV):
                buffer.refuse_write("what this graph does to it")
        return None
    made.recompile()
    return LaidOutGraph(made, dims)


def _attended(graph: Graph) -> set[Node]:
    """Buffers that attention reads: others that are written to by index are no KV caches."""
    facts = Facts(graph)
    operands = [operand for attention in facts.attention for operand in (attention.key, attention.value)]
    return {buffer for operand in operands for buffer in facts.caches_behind(facts.source(operand).root)}


def _may_be(value: Any) -> bool:
    if isinstance(value, LaidOutKV):
        return True
    is_ordinary = isinstance(value, Tensor) and not isinstance(value, (*STORED_KV, Parameter))
    return is_ordinary and value.dim() in (3, 4) and value.is_floating_point()


def _dims(node: Node, value: Any) -> str:
    if isinstance(value, LaidOutKV):
        return value.dims
    return dims_of(node) if _may_be(value) else ""


def _value(node: Node, dims: str) -> Any:
    """What is known of the input in its place."""
    value = fake(node)
    if isinstance(value, LaidOutKV):
        return value.ordered
    with value_of(node).fake_mode:  # type: ignore[attr-defined]
        return in_order(value_of(node), dims)
