"""Whether all that a graph computes from a KV buffer ends in attention, however it is computed.

A latent that keys and values are projected from, keys that are rotated when they are read, values that a mask is
computed from: what such a buffer holds is read in several ways, and every one of them must be followed to its end.
"""

from __future__ import annotations

from torch.fx import Node

from xquant_fx.passes.facts import Facts
from xquant_fx.passes.find_writes import is_factory, is_opaque, written_by
from xquant_fx.passes.trace import argument, is_shape_query, memory_of

#: Nodes that are looked at, going forward from one reader of a buffer.
FAR = 256


def ends_in_attention(reader: Node, facts: Facts) -> bool:
    """Whether what ``reader`` computes becomes keys, values or masks of attentions in this graph, and nothing else."""
    queue = [reader]
    for node in queue:  # which grows meanwhile
        if node.op == "output" or is_opaque(node) or len(queue) > FAR:
            return False
        for written in written_by(node):
            made = memory_of(written)
            if not is_factory(made):
                return False
            queue += [made] * (made not in queue)
        ends = (user for user in node.users if not (is_shape_query(user) or _attends(user, node, facts)))
        queue += [user for user in ends if user not in queue]
    return True


def _attends(user: Node, operand: Node, facts: Facts) -> bool:
    """Whether ``user`` is an attention that takes ``operand`` as its keys, values or mask."""
    if facts.reads(user, operand, "keys") or facts.reads(user, operand, "values"):
        return True
    return user in facts.attends and operand is not argument(user, 0, "query")
