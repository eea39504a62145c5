"""See through what a program does to growing keys and values that leaves their numbers as they are.

    keys = cat([past.contiguous(), k], dim=1).detach()      keys = cat([past, k], dim=1)
    return keys                                         =>  return keys

OpenAI's Whisper detaches what it keeps; others make it contiguous, or clone the tokens of a window that stay. Only
without gradients, which could tell, and where the graph writes to none of them.
"""

from __future__ import annotations

import torch
from torch.fx import Graph, GraphModule, Node

from xquant_fx.passes.find_writes import written_memory
from xquant_fx.passes.graph import clone
from xquant_fx.passes.trace import argument, fake, full_index, is_returned, memory_of, operand
from xquant_fx.passes.vocabulary import kind

#: Slices that take all of a dimension, whatever its size.
_ALL = (slice(None), slice(0, None))


def without_growth_copies(gm: GraphModule) -> GraphModule:
    """A copy of ``gm`` in which what grows is returned and continued itself; ``gm`` where it is so already."""
    if torch.is_grad_enabled() or not growth_copies(gm.graph):
        return gm
    made = clone(gm)
    for copy in growth_copies(made.graph):
        source = copy.args[0]
        assert isinstance(source, Node)
        copy.replace_all_uses_with(source)
        made.graph.erase_node(copy)
    made.recompile()
    return made


def growth_copies(graph: Graph) -> list[Node]:
    """What stands between a concatenation and the results of ``graph``, or between an input and a concatenation.

    Nothing of what is returned twice, or changed: the copies would be one tensor.
    """
    found = {copy: cat for cat in graph.nodes if _grows(cat) for copy in (*_before(cat), *_behind(cat))}
    if not found:
        return []
    changed = written_memory(graph)
    returned = [memory_of(result) for result in graph.output_node().all_input_nodes]
    pasts = {memory_of(part) for cat in found.values() for part in cat.all_input_nodes}
    fixed = changed | {each for each in returned if each in pasts or returned.count(each) > 1}
    return [copy for copy, cat in found.items() if not {cat, *map(memory_of, cat.all_input_nodes)} & fixed]


def _grows(node: Node) -> bool:
    value, parts = fake(node), argument(node, 0, "tensors")
    is_cat = kind(node) == "cat" and isinstance(parts, tuple | list) and len(parts) == 2
    return is_cat and value is not None and value.dim() in (3, 4) and value.is_floating_point()


def _before(cat: Node) -> list[Node]:
    """From the first part of ``cat`` back to an input."""
    part, found = argument(cat, 0, "tensors")[0], list[Node]()  # type: ignore[index]
    while isinstance(part, Node) and _keeps_all(part) and not is_returned(part):
        found.append(part)
        part = operand(part)
    return found[::-1] if isinstance(part, Node) and part.op == "placeholder" else []


def _behind(node: Node) -> list[Node]:
    """From ``node``, or a part of its tokens, to a result."""
    found: list[Node] = []
    for user in node.users:
        keeps = _keeps_all(user)
        if operand(user) is not node or not (keeps or kind(user) == "getitem"):
            continue
        behind = _behind(user)
        if behind or is_returned(user):
            found += [user, *behind] if keeps else behind
    return found


def _keeps_all(node: Node) -> bool:
    """Whether ``node`` is its first argument as far as numbers go, on the same device."""
    value, source = fake(node), fake(operand(node))
    if kind(node) == "getitem" and source is not None:
        items = full_index(node.args[1], source.dim()) or [None]
        return all(item in _ALL for item in items)  # and no [-n:], of a window that is not full yet
    if kind(node) not in ("detach", "contiguous", "clone", "cast") or value is None or source is None:
        return False
    return (value.dtype, value.device) == (source.dtype, source.device)
