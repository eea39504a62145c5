"""Have a prompt's queries computed before its keys are appended, which rank their channels by them.

Many models compute both before they update the cache. Where a query comes later (a slice of a fused projection, a
scaling), what computes it is moved before the append, if it neither needs the append nor meets a write on the way.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch.fx import Graph, Node

from xquant_fx.passes.find_writes import is_opaque, written_by
from xquant_fx.passes.trace import memory_of


def compute_queries_early(graph: Graph, queries: Mapping[Node, Node]) -> int:
    """``queries`` are those of the attention that reads what the node appends; returns how many were moved."""
    order = {node: i for i, node in enumerate(graph.nodes)}
    moved = 0
    for append, query in queries.items():
        if order[query] < order[append]:
            continue
        later = _behind(append, query, order)
        if later and not _meets_a_write(later, append, query):
            for node in sorted(later, key=order.__getitem__):
                append.prepend(node)
            order = {node: i for i, node in enumerate(graph.nodes)}
            moved += 1
    return moved


def _behind(append: Node, query: Node, order: Mapping[Node, int]) -> set[Node]:
    """The nodes behind ``append`` that ``query`` is computed by; none if it needs the append."""
    found, waiting = set[Node](), [query]
    while waiting:
        node = waiting.pop()
        if node is append:
            return set()
        if node not in found and order[node] > order[append]:
            found.add(node)
            waiting.extend(node.all_input_nodes)
    return found


def _meets_a_write(later: set[Node], append: Node, query: Node) -> bool:
    """Whether something between writes to what ``later`` reads, or one of them writes."""
    read = {memory_of(each) for node in later for each in node.all_input_nodes}
    node = append
    while node is not query:
        if is_opaque(node) or any(memory_of(target) in read for target in written_by(node)):
            return True
        node = node.next
    return any(written_by(each) for each in later)
