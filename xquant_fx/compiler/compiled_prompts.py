"""Compile what lies between the attentions of a prompt, or of a chunk, that runs op by op.

Its number of tokens is left open, so one graph serves all. Attention and appends stay what they are in uncompiled code:
kernels for any number of tokens, and the same numbers. Equal layers are compiled once. Only where it is asked for
(``options={"compile_prompts": True}``): Dynamo and Inductor take longer than most prompts do.
"""

from __future__ import annotations

import dataclasses
import logging
import operator
from collections.abc import Callable, Collection, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch.fx import Graph, GraphModule, Node

from xquant_fx.compiler.options import Request
from xquant_fx.compiler.pieces import aots_mode, by_itself
from xquant_fx.compiler.repeats import Piece
from xquant_fx.compiler.stretches import returned, stretches_of, why_none
from xquant_fx.passes.graph import named_once
from xquant_fx.passes.records import Detection
from xquant_fx.passes.trace import at_hand, fake
from xquant_fx.warn_once import warn_once

log = logging.getLogger(__name__)

Compiler = Callable[..., Any]

#: Modes without CUDA graphs, which want numbers of tokens that come again.
_PLAIN_MODES = {"reduce-overhead": "default", "max-autotune": "max-autotune-no-cudagraphs"}


@dataclasses.dataclass(frozen=True)
class Stretches:
    """How the stretches of a graph are compiled."""

    request: Request
    compiler: Compiler
    inputs: Sequence[Any]
    """Those of this call."""

    def compile(self, gm: GraphModule, found: Detection, kept: Collection[Node] = ()) -> None:
        """Put compiled functions into the place of stretches of ``gm``, the graph of ``found`` or a copy of it.

        Nodes that are left, and those in ``kept``, are the same as before, and give the same.
        """
        graph = gm.graph
        read_by = {site.attention.value_reader for site in found.sites}
        reason = why_none(graph)
        pieces = [] if reason else stretches_of(graph, self._cached(graph, found), read_by)
        if not pieces:
            reason = reason or "its attention is not recognised, or few ops lie around it"
            warn_once(f"compile_prompts: nothing of a prompt is compiled: {reason}", key="compile_prompts")
            return
        log.info("%d stretches of a prompt, or of a chunk, are compiled", len(pieces))
        results = dict[Hashable, set[int]]()
        for piece in pieces:
            wanted = {*returned(piece.nodes), *set(kept) & set(piece.nodes)}
            results.setdefault(piece.form, set()).update(i for i, node in enumerate(piece.nodes) if node in wanted)
        examples = dict(zip(graph.find_nodes(op="placeholder"), self.inputs, strict=True))
        made = dict[Hashable, Callable[..., Any]]()
        for piece in pieces:
            places = sorted(results[piece.form])
            if piece.form not in made:
                made[piece.form] = self._compiled(piece, places, examples, len(made))
            _replace(graph, piece, places, made[piece.form])
        counters["xquant"]["stretches of prompts"] += len(pieces)
        counters["xquant"]["stretches of prompts compiled"] += len(made)
        gm.recompile()

    def _cached(self, graph: Graph, found: Detection) -> set[Node]:
        placeholders = graph.find_nodes(op="placeholder")
        odd = {node for node, value in zip(placeholders, self.inputs, strict=True) if not _is_ordinary(value)}
        return odd | {buffer.node for buffer in found.ordinary if buffer.index is not None}

    def _compiled(self, piece: Piece, places: list[int], inputs: dict[Node, Any], number: int) -> Callable[..., Any]:
        alone = by_itself(piece, [piece.nodes[i] for i in places])
        orders = [None if node in inputs else _order(fake(node)) for node in piece.given]
        examples = [
            named_once(inputs[node] if node in inputs else _example(node.meta["example_value"], order))
            for node, order in zip(piece.given, orders, strict=True)
        ]
        call = self.compiler(alone, examples, _without_cuda_graphs(self.request), None)

        def stretch(*args: Any) -> Any:
            return call(*map(_laid_out, args, orders))

        stretch.__name__ = stretch.__qualname__ = f"compiled_stretch_{number}"
        return stretch


def _is_ordinary(value: Any) -> bool:
    return not isinstance(value, Tensor) or type(value) in (Tensor, torch.nn.Parameter)


def _without_cuda_graphs(request: Request) -> Request:
    inductor = tuple((name, value) for name, value in request.inductor if name != "triton.cudagraphs")
    mode = request.mode and _PLAIN_MODES.get(request.mode, request.mode)
    return dataclasses.replace(request, mode=mode, inductor=inductor)


def _order(value: Tensor | None) -> tuple[int, ...] | None:
    """The dimensions of what a node gives as its graph has it, the widest stride first; None: it is no tensor."""
    if value is None:
        return None
    strides = [at_hand(stride) or 0 for stride in value.stride()]
    return tuple(sorted(range(value.dim()), key=lambda dim: -strides[dim]))


def _example(value: Any, order: tuple[int, ...] | None) -> Any:
    """Something such as ``value``, dense in this order, in the mode in which AOTAutograd looks at a graph."""
    if order is None:
        return value
    with aots_mode():
        dense = torch.empty([value.shape[dim] for dim in order], dtype=value.dtype, device=value.device)
        return dense.permute([order.index(dim) for dim in range(len(order))])


def _laid_out(value: Any, order: tuple[int, ...] | None) -> Any:
    """``value``, dense in this order: what a kernel gave may lie otherwise than its graph has it."""
    if order is None or value.permute(order).is_contiguous():
        return value
    return value.permute(order).contiguous().permute([order.index(dim) for dim in range(len(order))])


def _replace(graph: Graph, piece: Piece, places: list[int], call: Callable[..., Any]) -> None:
    """Nodes that others read become parts of what ``call`` gives; the rest goes."""
    with graph.inserting_after(piece.nodes[-1]):
        whole = graph.call_function(call, tuple(piece.given))
    behind = whole
    for i, place in enumerate(places):
        node = piece.nodes[place]
        behind.append(node)
        behind = node
        node.op, node.target, node.args, node.kwargs = "call_function", operator.getitem, (whole, i), {}
    for node in reversed(piece.nodes):
        if node.target is not operator.getitem or node.args[:1] != (whole,):
            graph.erase_node(node)


def mark_tokens(values: Sequence[Any], tokens: int) -> None:
    """Have Dynamo leave open how many tokens a call brings, of tensors among its arguments that have that size.

    Not on GPUs, where chunks are compiled with all that is in them, those of one number by better kernels: there it
    leaves open what has differed.
    """
    for each in values:
        if isinstance(each, dict):
            mark_tokens(list(each.values()), tokens)
        elif type(each) is Tensor and each.device.type == "cpu":
            for dim, size in enumerate(each.shape):
                if size == tokens:
                    torch._dynamo.maybe_mark_dynamic(each, dim)
