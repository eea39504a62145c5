"""Give what is written in several ways one spelling, before anything is looked for.

    stored = buffer.index_copy_(2, pos, k)          buffer.index_copy_(2, pos, k)
    attention(q, stored, ...)                   =>  attention(q, buffer, ...)

``index_copy_`` returns the buffer itself, so that who reads its result after it reads the buffer.
"""

from __future__ import annotations

from torch.fx import Graph, Node

from xquant_fx.passes.vocabulary import kind


def normalize(graph: Graph) -> int:
    """Normalize ``graph`` in place; returns how many results were replaced."""
    replaced = 0
    for node in graph.nodes:
        buffer = node.args[0] if node.args else None
        if kind(node) == "index_copy" and node.users and isinstance(buffer, Node):
            node.replace_all_uses_with(buffer)
            replaced += 1
    return replaced
