"""What must be computed to know the positions of an append before the graph runs."""

from __future__ import annotations

from collections.abc import Iterable

from torch.fx import Node

from xquant_fx.passes.facts import Facts
from xquant_fx.passes.find_writes import is_opaque
from xquant_fx.passes.records import Foresight, Write

MOST = 256  # nodes; positions that depend on more than that depend on the model's hidden states


def foresee(write: Write, facts: Facts) -> Foresight:
    """What computes the positions of ``write``."""
    positions = write.positions
    bounds = (positions.start, positions.stop) if isinstance(positions, slice) else (positions,)
    wanted = _closure([bound for bound in bounds if isinstance(bound, Node)], write, facts)
    if len(wanted) > MOST or any(is_opaque(node) or node in facts.attends for node in wanted):
        return Foresight((), bounds, "the positions depend on what the model computes")
    return Foresight(tuple(sorted(wanted, key=facts.order.__getitem__)), bounds)


def _closure(nodes: Iterable[Node], write: Write, facts: Facts) -> set[Node]:
    """``nodes``, all that they are computed from, and what is written to any of these before ``write``."""
    found: set[Node] = set()
    queue = list(nodes)
    while queue and len(found) <= MOST:
        node = queue.pop()
        if node in found:
            continue
        found.add(node)
        queue += node.all_input_nodes
        changes = (m.node for m in facts.mutations if m.root is node and facts.order[m.node] < facts.order[write.node])
        appends = (w.node for w in facts.writes_to(node) if facts.order[w.node] < facts.order[write.node])
        queue += [*changes, *appends]
    return found
