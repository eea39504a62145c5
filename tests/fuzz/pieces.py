"""A graph run op by op as its layers are compiled: the first of those that are equal in the place of each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch._dynamo.utils import counters
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from xquant_fx.compiler.repeats import pieces_of, why_not_apart


def by_pieces(gm: GraphModule) -> Callable[..., Any]:
    """``gm``, the first of its equal stretches in the place of each (``xquant_fx/compiler/repeats.py``)."""
    pieces = pieces_of(gm.graph)
    if len(pieces) < 2 or why_not_apart(gm.graph, pieces):
        return gm.forward
    counters["xquant"]["layers run as the first"] += 1
    first = {piece.form: piece for piece in reversed(pieces)}

    def run(*inputs: Any) -> Any:
        env = dict(zip(gm.graph.find_nodes(op="placeholder"), inputs, strict=True))
        for piece in pieces:
            one = first[piece.form]
            inside = dict(zip(one.given, (env[node] for node in piece.given), strict=True))
            for node in one.nodes:
                args, kwargs = map_arg((node.args, node.kwargs), inside.__getitem__)
                inside[node] = _called(node, args, kwargs)
            env.update(zip(piece.nodes, (inside[node] for node in one.nodes), strict=True))
        return map_arg(gm.graph.output_node().args[0], env.__getitem__)

    return run


def _called(node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    assert callable(node.target), node
    return node.target(*args, **kwargs)
