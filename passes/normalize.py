"""Give what is written in several ways one spelling, before anything is looked for.

    stored = buffer.index_copy_(2, pos, k)          buffer.index_copy_(2, pos, k)
    attention(q, stored, ...)                   =>  attention(q, buffer, ...)

    buffer[:, :, p] = k[:, :, 0]                =>  buffer[:, :, p : p + 1] = k[:, :, 0].unsqueeze(-2)
    buffer.narrow(2, p, n).copy_(k)             =>  buffer[:, :, p : p + n] = k
    buffer[:, :, p - N : p - N + n] = k         =>  buffer[:, :, p : p + n] = k, where p is no number
    buffer.data[:, :, pos] = k                  =>  buffer[:, :, pos] = k
    buffer[:batch, ...].index_copy_(2, pos, k)  =>  buffer.index_copy_(2, pos, k), where these are all rows
    aten.index_put_(buffer, [None, None, pos], k)   likewise
    buffer[arange(B), :, pos] = k[:, :, 0]      =>  write_rows_(buffer, pos[:, None], k)    (row_writes.py)
    p.to(v), p.type_as(v)                       =>  p.to(v.dtype)
    flex_attention(q, k, v, score_mod, mask)    =>  sdpa(q, k, v, attn_mask=...), where q are few (flex_step.py)

``index_copy_`` returns the buffer itself, so that who reads its result after it reads the buffer.
"""

from __future__ import annotations

import operator
from typing import Any, cast

import torch
from torch.fx import Graph, Node
from torch.fx.experimental.symbolic_shapes import guard_or_false

from xquant_fx.passes.flex_step import name_flex_steps
from xquant_fx.passes.graph import call
from xquant_fx.passes.kept_positions import keep_positions
from xquant_fx.passes.known_sizes import name_known_sizes
from xquant_fx.passes.row_loops import merge_row_loops
from xquant_fx.passes.row_writes import name_row_writes
from xquant_fx.passes.trace import argument, fake, is_int, is_returned, operand, takes_all
from xquant_fx.passes.vocabulary import kind


def normalize(graph: Graph) -> int:
    """Normalize ``graph`` in place; returns how many results and writes were replaced."""
    name_known_sizes(graph)
    replaced = name_assignments(graph) + name_flex_steps(graph)
    for node in list(graph.nodes):
        replaced += _assign_to_tokens(graph, node)
    return replaced + name_row_writes(graph) + merge_row_loops(graph) + keep_positions(graph)


def name_assignments(graph: Graph) -> int:
    """Only what does not depend on the order of a buffer's dimensions: writes are ``index_copy_`` and assignments."""
    replaced = 0
    for node in list(graph.nodes):
        replaced += _name_dtype(node) or _take_whole(graph, node) or _write_to_itself(graph, node) or _put(graph, node)
    for node in list(graph.nodes):
        buffer = node.args[0] if node.args else None
        if kind(node) == "index_copy" and node.users and isinstance(buffer, Node):
            node.replace_all_uses_with(buffer)
            replaced += 1
        replaced += _copy_into_part(graph, node)
    return replaced


def _name_dtype(node: Node) -> bool:
    """``x.to(other)`` and ``x.type_as(other)`` read nothing of ``other``: a cast to its dtype, on its device."""
    x, other = fake(node.args[0] if node.args else None), fake(operand(node, 1))
    if kind(node) != "cast" or x is None or other is None or len(node.args) != 2 or node.kwargs:
        return False
    if x.device != other.device:
        return False
    node.target, node.args = "to", (node.args[0], other.dtype)
    return True


def _take_whole(graph: Graph, node: Node) -> bool:
    """``buffer[:batch, ...]`` of as many rows as there are is the buffer."""
    x = node.args[0] if node.args else None
    if kind(node) != "getitem" or not isinstance(x, Node) or x.op != "placeholder" or fake(x) is None:
        return False
    if is_returned(node) or not takes_all(node):
        return False
    node.replace_all_uses_with(x)
    graph.erase_node(node)
    return True


def _write_to_itself(graph: Graph, node: Node) -> bool:
    """What is assigned to ``x.data`` or ``x.detach()`` is assigned to ``x``; only gradients could tell."""
    x = node.args[0] if node.args else None
    if kind(node) != "detach" or not isinstance(x, Node) or torch.is_grad_enabled():
        return False
    writers = [user for user in node.users if kind(user) in ("setitem", "index_copy") and user.args[0] is node]
    for user in writers:
        user.replace_input_with(node, x)
    if writers and not node.users:
        graph.erase_node(node)
    return bool(writers)


def _put(graph: Graph, node: Node) -> bool:
    """``index_put_`` becomes an assignment, where nothing reads its result."""
    buffer, indices, x = (argument(node, i, name) for i, name in enumerate(("self", "indices", "values")))
    puts = kind(node) == "index_put" and not node.users and not argument(node, 3, "accumulate", False)
    if not puts or not isinstance(buffer, Node) or not isinstance(indices, tuple | list):
        return False
    index = tuple(slice(None) if part is None else part for part in indices)
    with graph.inserting_before(node):
        graph.call_function(operator.setitem, cast(Any, (buffer, index, x)))
    graph.erase_node(node)
    return True


def _copy_into_part(graph: Graph, node: Node) -> bool:
    """``part.copy_(x)`` becomes an assignment, where ``part`` is a part of a buffer that nothing else reads."""
    part, x = argument(node, 0, "self"), argument(node, 1, "src")
    if kind(node) != "copy" or node.users or not isinstance(part, Node) or len(part.users) != 1:
        return False
    buffer, index = argument(part, 0, "input"), _index_of(graph, part)
    if index is None or not isinstance(buffer, Node) or fake(buffer) is None:
        return False
    with graph.inserting_before(node):
        graph.call_function(operator.setitem, cast(Any, (buffer, index, x)))
    graph.erase_node(node)
    graph.erase_node(part)
    return True


def _index_of(graph: Graph, part: Node) -> object:
    """The index that ``part`` is of its first argument, made of ints and slices; None if it is no such part."""
    if kind(part) == "getitem":
        items = part.args[1] if isinstance(part.args[1], tuple) else (part.args[1],)
        return None if any(isinstance(item, list) or fake(item) is not None for item in items) else items
    value = fake(argument(part, 0, "input"))
    dim, start, length = (argument(part, i, n) for i, n in ((1, "dim"), (2, "start"), (3, "length")))
    if value is None or not isinstance(dim, int) or kind(part) not in ("select", "narrow"):
        return None
    whole = [slice(None)] * (dim % value.dim())
    if kind(part) == "select":
        return (*whole, argument(part, 2, "index"))
    if fake(start) is not None or not isinstance(length, int | Node):
        return None
    with graph.inserting_before(part):
        return (*whole, slice(start, _plus(graph, start, length)))


def _assign_to_tokens(graph: Graph, node: Node) -> bool:
    """An int in the place of tokens becomes a slice of one; bounds that are no numbers count from the front."""
    if kind(node) != "setitem" or not isinstance(node.args[1], tuple):
        return False
    value, at, x = fake(node.args[0]), _place_of_tokens(node.args[1]), node.args[2]
    if value is None or value.dim() != 4 or at is None:
        return False
    items, length = list(node.args[1]), value.shape[2]
    tokens = items[at]
    with graph.inserting_before(node):
        if is_int(tokens):
            written = fake(x)
            if not isinstance(x, Node) or written is None or written.dim() < 1:
                return False
            start = _from_front(graph, tokens, length)
            items[at] = slice(start, _plus(graph, start, 1))
            x = call(graph, torch.unsqueeze, (x, -2)) if written.dim() > 1 else x
        elif isinstance(tokens, slice) and tokens.step in (None, 1):
            bounds = [_from_front(graph, b, length) if isinstance(b, Node) else b for b in (tokens.start, tokens.stop)]
            items[at] = slice(*bounds)
    if items[at] == tokens:
        return False
    node.args = (node.args[0], tuple(items), x)
    return True


def _place_of_tokens(index: tuple[object, ...]) -> int | None:
    """Where in the index of a [B, H, N, D] buffer tokens are chosen, if all other dimensions have slices."""
    place = 2
    if Ellipsis in index and index.index(Ellipsis) <= 2:
        place = len(index) - 2
        if place <= index.index(Ellipsis):  # x[..., 0] chooses among channels
            return None
    others = [item for i, item in enumerate(index) if i != place]
    return place if place < len(index) and all(isinstance(item, slice) or item is Ellipsis for item in others) else None


def _plus(graph: Graph, a: object, b: object) -> object:
    if isinstance(a, Node) or isinstance(b, Node):
        return call(graph, operator.add, (a, b))
    return a + b  # type: ignore[operator]


def _from_front(graph: Graph, bound: object, length: object) -> object:
    """``bound`` counted from the front; Dynamo guards on the sign of one that is no number."""
    number = bound.meta.get("example_value") if isinstance(bound, Node) else bound
    is_negative = isinstance(number, int | torch.SymInt) and guard_or_false(number < 0)
    return _plus(graph, bound, length) if is_negative else bound
