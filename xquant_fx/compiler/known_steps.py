"""Steps of a few tokens with numbers that Dynamo left open, as graphs of the numbers at hand, on CPUs.

A prompt, then a step of one token: from the second number on Dynamo takes all numbers for one that varies, and so comes
a step of 5 candidates of assisted decoding. Our kernels are made for one number, and Inductor asks for it in the end:
such a graph is compiled for 5 tokens all the same. So it is made one of 5 tokens before anything is decided, or its
attention would read dequantized keys and values, at six times the time.

Assisted decoding also passes in for how many tokens it wants logits: for all new ones. That is left open, too, and
known then, or the step's layers would not be compiled once for all that are equal, nor be one C++ function. So is how
long a cache may become, from the second length on.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import SymInt
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import GraphModule, Node

from xquant_fx.cache.kv_tensor import QuantizedKV, stand_in
from xquant_fx.compiler.other_graph import OtherGraph
from xquant_fx.kernels.layout import STEP_TOKENS
from xquant_fx.passes.graph import clone, put_number, resized, simplified, size_among_inputs
from xquant_fx.passes.records import Detection
from xquant_fx.passes.trace import fake

#: In the ``meta`` of a graph that was made of one with an open number of tokens.
_KNOWN = "xquant_known_step"


@dataclasses.dataclass(frozen=True)
class KnownStep(OtherGraph):
    """A graph of one number of new tokens, made of one of any."""

    kept: Sequence[int]
    """Which of the inputs it takes: all but the number."""

    def given(self, args: Sequence[Any]) -> list[Any]:
        """``args`` of the graph of any number as those of this one."""
        return [args[i] for i in self.kept]


def known_step(gm: GraphModule, found: Detection, inputs: Sequence[Any]) -> KnownStep | None:
    """The graph of the numbers that there are, if that of new tokens was left open and is small, or others are known
    by now to be the only ones that the graph is for.

    Dynamo guards on the number of new tokens, or on that there are more.
    """
    if any(isinstance(each, torch.Tensor) and each.device.type != "cpu" for each in inputs):
        return None
    if gm.meta.get(_KNOWN):  # what is still open is not the number of new tokens
        return None
    opened = [write.tokens for write in found.writes if isinstance(write.tokens, SymInt)]
    known = {int(tokens) for tokens in opened if tokens <= STEP_TOKENS}
    if known:
        _settle_counts(gm, known)
        _settle_queries(found, known)
    elif opened or not any(type(_known(value)) is int for value in _numbers(gm)):
        return None
    made = settled(gm)
    made.gm.meta[_KNOWN] = True
    return made


def settled(gm: GraphModule) -> KnownStep:
    """The graph with numbers in the place of symbols that stand for one number by now."""
    made = clone(gm)
    kept = list[int]()
    for place, node in enumerate(list(made.graph.nodes)):  # inputs come first
        value = node.meta["example_value"] = _settled(node.meta.get("example_value"))
        if type(value) is int:
            _put_in_place(node, value)
        elif node.op == "placeholder":
            kept.append(place)
    made.recompile()
    return KnownStep(made, kept)


def _settle_counts(gm: GraphModule, known: set[int]) -> None:
    """Have Dynamo guard on numbers that the program passes in and that are the number of new tokens.

    One that is the size of an input is not meant: a short past may have as many tokens.
    """
    inputs = gm.graph.find_nodes(op="placeholder")
    for value in _numbers(gm):
        if value.node.hint in known and size_among_inputs(inputs, value) is None:
            int(value)


def _numbers(gm: GraphModule) -> list[SymInt]:
    """The numbers among the inputs that Dynamo left open."""
    values = (node.meta.get("example_value") for node in gm.graph.find_nodes(op="placeholder"))
    return [value for value in values if isinstance(value, SymInt)]


def _settle_queries(found: Detection, known: set[int]) -> None:
    """Have Dynamo guard on numbers of queries that are the number of new tokens, and that it does not know to be.

    Where queries, keys and values come to a function apart, each has a number of its own.
    """
    for site in found.sites:
        query = fake(site.attention.query)
        tokens = None if query is None or query.dim() != 4 or not site.rewritable else query.shape[2]
        if isinstance(tokens, SymInt) and tokens.node.hint in known:
            int(tokens)


def _settled(value: Any) -> Any:
    """``value`` of a node with numbers in the place of symbols that stand for one number by now."""
    if type(value) is QuantizedKV and value.spec.any_room:
        return stand_in(value.spec, None, value.anchor, _known(value.shape[2]))
    return resized(value, _known) if type(value) is FakeTensor else _known(value)


def _known(size: Any) -> Any:
    if not isinstance(size, SymInt):
        return size
    expr = simplified(size)
    return int(expr) if expr.is_number else size


def _put_in_place(node: Node, number: int) -> None:
    for user in list(node.users):
        put_number(node, user, number)
    node.graph.erase_node(node)
