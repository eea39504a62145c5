"""Writes inside a graph's inner graphs: ``torch.utils.checkpoint``, ``nested_compile_region``, control flow."""

from __future__ import annotations

from collections.abc import Iterator

from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from xquant_fx.passes.find_writes import is_opaque, written_by
from xquant_fx.passes.trace import fake, operand
from xquant_fx.passes.vocabulary import kind


def written_inside(node: Node) -> list[Node]:
    """The operands of three dimensions or more that ``node`` passes to a graph of its own, which writes to them.

    The places of the inner graph's inputs are those of the last operands.
    """
    bodies = [inner for inner in node.all_input_nodes if inner.op == "get_attr"] if is_opaque(node) else []
    given = [n for n in _flat(node) if n not in bodies]
    found: list[Node] = []
    for body in bodies:
        owner = body.graph.owning_module
        inner = getattr(owner, str(body.target), None)
        if isinstance(inner, GraphModule):
            inputs = inner.graph.find_nodes(op="placeholder")
            written = {root for each in inner.graph.nodes for root in _roots_written(each)}
            pairs = zip(reversed(given), reversed(inputs), strict=False)
            found += [outer for outer, placeholder in pairs if placeholder in written and _may_be_cache(outer)]
    return found[::-1]


def _roots_written(node: Node) -> Iterator[Node]:
    for written in [*written_by(node), *written_inside(node)]:
        root: Node | None = written
        while root is not None and root.op != "placeholder" and kind(root) in ("getitem", "view"):
            root = operand(root)
        if root is not None:
            yield root


def _may_be_cache(node: Node) -> bool:
    value = fake(node)
    return value is not None and value.dim() >= 3 and value.dtype.is_floating_point


def _flat(node: Node) -> list[Node]:
    found: list[Node] = []
    map_arg((node.args, node.kwargs), found.append)
    return found
