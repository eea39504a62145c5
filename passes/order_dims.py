"""Rewrite a graph so that KV buffers whose dimensions are in another order are inputs [B, H, N, D].

    keys[:, pos] = k                             keys[:, :, pos] = k.permute(0, 2, 1, 3)
    attention(q, keys.transpose(1, 2), ...)  =>  attention(q, keys.permute(0, 2, 1, 3).transpose(1, 2), ...)

for ``keys`` [B, N, H, D]. Which dimension tokens are along, appends say; the others are in the order of [B, H, D] or,
where there are two, [H, D]. Everything behind this knows one order.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.fx import Graph, Node

from xquant_fx.cache.aliases import ORDER
from xquant_fx.passes.find_writes import appended
from xquant_fx.passes.graph import call
from xquant_fx.passes.trace import argument, fake, value_of
from xquant_fx.passes.vocabulary import kind

_LENGTHS = (int, torch.SymInt)


def dims_of(node: Node) -> str:
    """The dimensions of the buffer ``node``, such as "BNHD", by its appends; "" if they are usual, or do not show."""
    value = fake(node)
    if node.op != "placeholder" or value is None or value.dim() not in (3, 4) or not value.is_floating_point():
        return ""
    if isinstance(value, torch.nn.Parameter) or not all(isinstance(size, int) for size in value.shape):
        return ""
    found = set(_places_of_tokens(node, value))
    if len(found) != 1 or None in found:
        return ""
    (place,) = found
    assert place is not None
    rest = "BHD" if value.dim() == 4 else "BD" if place == 1 and _gets_heads(node) else "HD"
    dims = f"{rest[:place]}N{rest[place:]}"
    return "" if dims == "BHND" else dims


def _gets_heads(buffer: Node) -> bool:
    """Whether a buffer [B, N, D] of one head gets a dimension of heads where it is read."""
    return any(kind(user) == "unsqueeze" and argument(user, 1, "dim") in (1, -3) for user in buffer.users)


def _places_of_tokens(buffer: Node, value: torch.Tensor) -> Iterator[int | None]:
    """Of each write to ``buffer`` the one dimension that it chooses places of; None if it is no append."""
    for user in buffer.users:
        if user.args[:1] == (buffer,) and kind(user) in ("index_copy", "setitem"):
            yield _place(user, value)


def _place(write: Node, value: torch.Tensor) -> int | None:
    if kind(write) == "setitem":
        return place_of(write.args[1], value)
    dim = argument(write, 1, "dim")
    return dim % value.dim() if isinstance(dim, int) else None


def place_of(index: object, value: torch.Tensor) -> int | None:
    """The one dimension of ``value`` that ``index`` does not take whole: by positions, a span or a position."""
    items = full_index(index, value.dim())
    if items is None:
        return None
    chosen = [i for i, item in enumerate(items) if not _is_whole(item, value.shape[i])]
    if len(chosen) != 1:
        return None
    item = items[chosen[0]]
    known = item.meta.get("example_value") if isinstance(item, Node) else item
    if isinstance(known, torch.Tensor):
        return chosen[0] if known.dim() == 1 and known.dtype in (torch.int64, torch.int32) else None
    is_span = isinstance(item, slice) and item.step in (None, 1)
    return chosen[0] if is_span or (isinstance(known, _LENGTHS) and not isinstance(known, bool)) else None


def full_index(index: object, rank: int) -> list[Any] | None:
    """``index`` as one item per dimension; None if it adds dimensions or is no plain one."""
    items = list(index) if isinstance(index, tuple) else [index]
    if any(item is None or isinstance(item, list | bool) for item in items):
        return None
    if Ellipsis in items:
        at = items.index(Ellipsis)
        items[at : at + 1] = [slice(None)] * (rank - len(items) + 1)
    return items + [slice(None)] * (rank - len(items)) if len(items) <= rank else None


def _is_whole(item: object, size: object) -> bool:
    if not isinstance(item, slice) or any(isinstance(bound, Node) for bound in (item.start, item.stop)):
        return False
    return item == slice(None) or (isinstance(size, int) and item.indices(size) == (0, size, 1))


def order_dims(graph: Graph, inputs: Mapping[Node, tuple[str, Any]]) -> bool:
    """Put inputs [B, H, N, D] in the place of ``inputs``: of each its dimensions, and the value to be known of it.

    Returns:
        Whether it can be done; if not, ``graph`` is of no use any more.
    """
    return all(_order(graph, node, dims, value) for node, (dims, value) in inputs.items())


def _order(graph: Graph, buffer: Node, dims: str, value: Any) -> bool:
    with graph.inserting_before(buffer):
        ordered = graph.placeholder(str(buffer.target))
    ordered._dynamo_source = getattr(buffer, "_dynamo_source", None)
    ordered.meta.update({**buffer.meta, "example_value": value})
    writes = [user for user in buffer.users if user.args[:1] == (buffer,) and kind(user) in ("index_copy", "setitem")]
    if not all(_order_write(graph, write, ordered, dims) for write in writes):
        return False
    for user in list(buffer.users):  # a view for each, or one would be made before an append that it shows
        with graph.inserting_before(user):
            user.replace_input_with(buffer, _seen(graph, ordered, dims))
    graph.erase_node(buffer)
    return True


def _seen(graph: Graph, ordered: Node, dims: str) -> Node:
    """``ordered`` as the program sees it."""
    there = [dim for dim in ORDER if dim in dims]
    if len(dims) < 4:
        sizes = dict(zip(ORDER, value_of(ordered).shape, strict=True))
        ordered = call(graph, torch.reshape, (ordered, [sizes[dim] for dim in there]))
    return call(graph, torch.permute, (ordered, [there.index(dim) for dim in dims]))


def _order_write(graph: Graph, write: Node, ordered: Node, dims: str) -> bool:
    value, x = fake(write.args[0]), appended(write)
    numbers = fake(x)
    if value is None or numbers is None or not isinstance(x, Node) or _place(write, value) != dims.index("N"):
        return False
    if kind(write) == "index_copy":
        tokens, written = argument(write, 2, "index"), dims
    else:
        items = full_index(write.args[1], len(dims)) or []
        tokens = items[dims.index("N")]
        drops = not isinstance(tokens, slice) and fake(tokens) is None  # a number leaves the dimension out
        written = dims.replace("N", "") if drops else dims
    if numbers.dim() != len(written):
        return False
    with graph.inserting_before(write):
        x = _ordered(graph, x, written)
        x = call(graph, torch.select, (x, 2, 0)) if written != dims else x
    where = (2, tokens) if kind(write) == "index_copy" else ((slice(None), slice(None), tokens),)
    write.args, write.kwargs = (ordered, *where, x), {}
    return True


def _ordered(graph: Graph, x: Node, dims: str) -> Node:
    """``x`` with dimensions ``dims`` as [B, H, n, D]."""
    there = [dim for dim in ORDER if dim in dims]
    x = call(graph, torch.permute, (x, [dims.index(dim) for dim in there]))
    for at, dim in enumerate(ORDER):
        if dim not in dims:
            x = call(graph, torch.unsqueeze, (x, at))
    return x
