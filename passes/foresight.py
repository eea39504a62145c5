"""What must be computed to know the positions of an append, or a mask, before the graph runs."""

from __future__ import annotations

from collections.abc import Iterable

from torch.fx import Node

from xquant_fx.passes.facts import Facts
from xquant_fx.passes.find_writes import is_opaque
from xquant_fx.passes.records import Foresight, Write

MOST = 256  # nodes; what depends on more than that depends on the model's hidden states


def foresee(write: Write, facts: Facts) -> Foresight:
    """What computes the positions of ``write``."""
    positions = write.positions
    bounds = (positions.start, positions.stop) if isinstance(positions, slice) else (positions,)
    return _foresee(bounds, write.node, "the positions depend", facts)


def foresee_value(node: Node, reader: Node, facts: Facts) -> Foresight:
    """What computes ``node`` as ``reader`` finds it."""
    return _foresee((node,), reader, f"{node.name} depends", facts)


def _foresee(bounds: tuple[object, ...], reader: Node, what: str, facts: Facts) -> Foresight:
    wanted = _closure([bound for bound in bounds if isinstance(bound, Node)], reader, facts)
    if len(wanted) > MOST or any(is_opaque(node) or node in facts.attends for node in wanted):
        return Foresight((), bounds, f"{what} on what the model computes")
    return Foresight(tuple(sorted(wanted, key=facts.order.__getitem__)), bounds)


def _closure(nodes: Iterable[Node], reader: Node, facts: Facts) -> set[Node]:
    """``nodes``, all that they are computed from, and what is written to any of these before ``reader``."""
    found: set[Node] = set()
    queue = list(nodes)
    while queue and len(found) <= MOST:
        node = queue.pop()
        if node in found:
            continue
        found.add(node)
        queue += node.all_input_nodes
        changes = (m.node for m in facts.mutations if m.root is node and facts.order[m.node] < facts.order[reader])
        appends = (w.node for w in facts.writes_to(node) if facts.order[w.node] < facts.order[reader])
        queue += [*changes, *appends]
    return found
