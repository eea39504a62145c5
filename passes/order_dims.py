"""Rewrite a graph so that KV buffers whose dimensions are in another order are inputs [B, H, N, D].

    keys[:, pos] = k                             keys[:, :, pos] = k.permute(0, 2, 1, 3)
    attention(q, keys.transpose(1, 2), ...)  =>  attention(q, keys.permute(0, 2, 1, 3).transpose(1, 2), ...)
    keys.view(B, N, H * D)                       keys.permute(0, 2, 1, 3).reshape(B, N, H * D)

for ``keys`` [B, N, H, D]. Which dimension tokens are along, appends say; the others are in the order of [B, H, D] or,
where there are two, [H, D]; or heads are merged into the channels, [B, N, H * D], and views split them. Everything
behind this knows one order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.fx import Graph, Node

from xquant_fx.cache.aliases import ORDER, View, from_order, to_order
from xquant_fx.passes.find_writes import appended
from xquant_fx.passes.graph import call, input_beside
from xquant_fx.passes.trace import argument, fake, full_index, is_int, is_view_like, is_whole, value_of
from xquant_fx.passes.vocabulary import kind


def dims_of(node: Node) -> str:
    """The dimensions of the buffer ``node``, such as "BNHD", by its appends; "" if they are usual, or do not show."""
    value = fake(node)
    if node.op != "placeholder" or value is None or value.dim() not in (3, 4) or not value.is_floating_point():
        return ""
    if isinstance(value, torch.nn.Parameter):
        return ""
    if value.dim() == 3 and not all(isinstance(size, int) for size in value.shape):
        return ""  # its views name sizes, and a graph holds no symbols
    found = {_place(write, value) for write in _writes(node)}
    if len(found) != 1 or None in found:
        return ""
    (place,) = found
    assert place is not None
    return dims_along(node, place)


def dims_along(node: Node, place: int) -> str:
    """The dimensions of ``node``, whose tokens are along dimension ``place``; "" if they are usual."""
    rank = value_of(node).dim()
    if rank == 3 and place < 2 and (heads := split_heads(node)):
        return f"{'NB' if place == 0 else 'BN'}{heads}D"
    rest = "BHD" if rank == 4 else "BD" if place == 1 and gets_heads(node) else "HD"
    dims = f"{rest[:place]}N{rest[place:]}"
    return "" if dims == ORDER else dims


def gets_heads(buffer: Node) -> bool:
    """Whether a buffer [B, N, D] of one head gets a dimension of heads where it is read."""
    return any(kind(user) == "unsqueeze" and argument(user, 1, "dim") in (1, -3) for user in buffer.users)


def split_heads(node: Node) -> int:
    """Into how many heads views split the channels of ``node`` [B, N, C] or [N, B, C], or of its first tokens; or 0."""
    *_, channels = value_of(node).shape
    for view in node.users:
        value = fake(view)
        if value is None or view.args[0] is not node:
            continue
        if kind(view) in ("view", "reshape") and value.dim() == 4:
            heads, each = value.shape[2:]
            if isinstance(heads, int) and heads * each == channels:
                return heads
        some = kind(view) in ("getitem", "narrow", "transpose") and value.dim() == 3 and value.shape[2] == channels
        if some and (heads := split_heads(view)):
            return heads
    return 0


def _writes(buffer: Node) -> list[Node]:
    return [user for user in buffer.users if user.args[:1] == (buffer,) and kind(user) in ("index_copy", "setitem")]


def _place(write: Node, value: torch.Tensor) -> int | None:
    """The one dimension of ``value`` that ``write`` chooses places of; None if it is no append."""
    if kind(write) == "setitem":
        return place_of(write.args[1], value)
    dim = argument(write, 1, "dim")
    return dim % value.dim() if isinstance(dim, int) else None


def place_of(index: object, value: torch.Tensor) -> int | None:
    """The one dimension of ``value`` that ``index`` does not take whole: by positions, a span or a position."""
    items = full_index(index, value.dim())
    chosen = [i for i, item in enumerate(items or ()) if not is_whole(item, value.shape[i])]
    if items is None or len(chosen) != 1:
        return None
    item = items[chosen[0]]
    positions = fake(item)
    if positions is not None:
        return chosen[0] if positions.dim() == 1 and positions.dtype in (torch.int64, torch.int32) else None
    return chosen[0] if is_int(item) or (isinstance(item, slice) and item.step in (None, 1)) else None


def order_dims(graph: Graph, inputs: Mapping[Node, tuple[str, Any]]) -> bool:
    """Put inputs [B, H, N, D] in the place of ``inputs``: of each its dimensions, and the value to be known of it.

    Returns:
        Whether it can be done; if not, ``graph`` is of no use any more.
    """
    return all(_order(graph, node, dims, value) for node, (dims, value) in inputs.items())


def _order(graph: Graph, buffer: Node, dims: str, value: Any) -> bool:
    ordered = input_beside(graph, buffer, value)
    if not all(_order_write(graph, write, ordered, dims) for write in _writes(buffer)):
        return False
    use_ordered(graph, buffer, ordered, dims)
    return True


def use_ordered(graph: Graph, old: Node, ordered: Node, dims: str) -> None:
    """Give all that takes ``old`` views of ``ordered`` [B, H, N, D] with dimensions ``dims``, and erase ``old``."""
    for user in list(old.users):  # a view for each, or one would be made before an append that it shows
        with graph.inserting_before(user):
            shown = applied(graph, ordered, from_order(dims, value_of(ordered).shape))
        user.replace_input_with(old, shown)
        _let_copy(shown)
    graph.erase_node(old)


def _let_copy(node: Node) -> None:
    """Make every ``view`` of ``node`` a ``reshape``: numbers in another order have other strides than the program's."""
    for user in node.users:
        if not is_view_like(user) or user.args[0] is not node:
            continue
        is_of_dtype = "dtype" in user.kwargs or isinstance(user.args[-1], torch.dtype)
        if user.op == "call_method" and user.target == "view" and not is_of_dtype:
            user.target = "reshape"
        _let_copy(user)


def _order_write(graph: Graph, write: Node, ordered: Node, dims: str) -> bool:
    value, x = fake(write.args[0]), appended(write)
    numbers = fake(x)
    if value is None or numbers is None or not isinstance(x, Node) or _place(write, value) != dims.index("N"):
        return False
    if kind(write) == "index_copy":
        tokens, written = argument(write, 2, "index"), dims
    else:
        items = full_index(write.args[1], value.dim()) or []
        tokens = items[dims.index("N")]
        drops = not isinstance(tokens, slice) and fake(tokens) is None  # a number leaves the dimension out
        written = dims.replace("N", "") if drops else dims
    if numbers.dim() != value.dim() - (written != dims):
        return False
    with graph.inserting_before(write):
        x = applied(graph, x, to_order(written))
        x = call(graph, torch.select, (x, 2, 0)) if written != dims else x
    where = (2, tokens) if kind(write) == "index_copy" else ((slice(None), slice(None), tokens),)
    write.args, write.kwargs = (ordered, *where, x), {}
    return True


def applied(graph: Graph, x: Node, views: Sequence[View]) -> Node:
    """``views`` of ``x``, at the graph's insertion point."""
    for op, *args in views:
        x = call(graph, op, (x, *args))
    return x
