"""Rewrite a graph so that keys and values that grow along another dimension than 2 of [B, H, N, D] grow along that.

    keys = cat([past, k], dim=1)                     keys = cat([past, k.permute(0, 2, 1, 3)], dim=2)
    attention(q, keys.transpose(1, 2), ...)      =>  attention(q, keys.permute(0, 2, 1, 3).transpose(1, 2), ...)
    return keys, ...                                 return keys, ...

for ``past`` [B, N, H, D], an input that becomes [B, H, N, D]. Which dimension tokens are along, the concatenation says;
the others are in the order of [B, H, D]. Of three dimensions one is missing: the batch, or, where reads add it, the
heads; or a view splits channels into heads.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from xquant_fx.cache.aliases import merged_heads, to_order
from xquant_fx.cache.laid_out_growing import LaidOutGrowingKV
from xquant_fx.passes.facts import Facts
from xquant_fx.passes.graph import call, input_beside
from xquant_fx.passes.order_dims import applied, dims_along, place_of, use_ordered
from xquant_fx.passes.records import Attention
from xquant_fx.passes.trace import argument, fake, full_index, is_returned, value_of
from xquant_fx.passes.track_axes import followed
from xquant_fx.passes.vocabulary import kind


class Concatenation(NamedTuple):
    """``cat([past, x], dim)`` that the graph returns, or the last tokens of it."""

    node: Node
    past: Node
    """An input, or nothing."""
    x: Node
    dims: str
    """Of what is returned: "BNHD", say."""
    kept: tuple[Node, ...]
    """The last tokens, where these are returned."""


def concatenations(graph: Graph) -> list[Concatenation]:
    """What grows along another dimension than 2 of four, in program order, be it read by attention or not."""
    return [found for node in graph.nodes if (found := _concatenation(node)) is not None]


def _concatenation(node: Node) -> Concatenation | None:
    value, parts = fake(node), argument(node, 0, "tensors")
    if kind(node) != "cat" or value is None or value.dim() not in (3, 4) or not value.is_floating_point():
        return None
    if not isinstance(parts, tuple | list) or len(parts) != 2 or not all(isinstance(part, Node) for part in parts):
        return None
    (past, x), dim = parts, argument(node, 1, "dim", 0)
    if not isinstance(dim, int) or not _is_past(past):
        return None
    dims, kept = _dims(node, past, dim % value.dim()), _kept(node, dim % value.dim())
    others = [size for i, size in enumerate(value.shape) if i != dim % value.dim()]
    if not dims or not (kept or is_returned(node)) or not all(isinstance(size, int) for size in others):
        return None
    return Concatenation(node, past, x, dims, kept)


def _is_past(node: Node) -> bool:
    """Whether ``node`` is an input that is not written to, or a tensor without any numbers."""
    value = fake(node)
    if value is None or isinstance(value, torch.nn.Parameter):
        return False
    is_nothing = all(isinstance(size, int) for size in value.shape) and value.numel() == 0
    return is_nothing or node.op == "placeholder"


def _dims(node: Node, past: Node, place: int) -> str:
    """The dimensions of what grows along ``place``; "" if they are usual, or do not show."""
    known = fake(past)
    if isinstance(known, LaidOutGrowingKV):
        return known.dims if known.token_dim == place else ""
    return dims_along(node, place)


def _kept(node: Node, place: int) -> tuple[Node, ...]:
    """Tokens of ``node`` that the graph returns: of a sliding window, say."""
    users = [user for user in node.users if kind(user) == "getitem" and is_returned(user)]
    return tuple(
        user
        for user in users
        if place_of(user.args[1], value_of(node)) == place and isinstance(_tokens(user, place), slice)
    )


def _tokens(part: Node, place: int) -> Any:
    """Which tokens of its first argument ``part`` takes, by index."""
    items = full_index(part.args[1], value_of(part.args[0]).dim())  # type: ignore[arg-type]
    return items[place] if items else None


def attended(graph: Graph, found: list[Concatenation]) -> list[Concatenation]:
    """Those that are quantized already, or that attention reads and nothing writes to: other states grow, too."""
    if not found:
        return []
    facts, by_node = Facts(graph), {each.node: each for each in found}
    changed = {mutation.root for mutation in facts.mutations} | {write.buffer for write in facts.writes}
    orders = {each.past: {other.dims for other in found if other.past is each.past} for each in found}
    read = set()
    for attention in facts.attention:
        for operand in (attention.key, attention.value):
            each = by_node.get(facts.source(operand).root)
            if each is not None and _is_over_tokens(attention, operand, each):
                read.add(each.node)
    return [
        each
        for each in found
        if isinstance(fake(each.past), LaidOutGrowingKV)
        or (each.node in read and not {each.node, each.past} & changed and len(orders[each.past]) == 1)
    ]


def _is_over_tokens(attention: Attention, taken: Node, found: Concatenation) -> bool:
    """Whether what grows is what an attention, whose operand is ``taken``, takes for tokens, as far as views show."""
    chain: list[Node] = [taken]
    while chain[-1] is not found.node:
        chain.append(chain[-1].args[0])  # type: ignore[arg-type]  # a view
    shape, heads = value_of(found.node).shape, merged_heads(found.dims)
    names: list[str] = [*found.dims]
    sizes = dict(zip(names, shape, strict=False))
    if heads:
        names = [*found.dims[:2], "HD"]
        sizes.update(H=int(heads), D=shape[2] // int(heads))
    axes = tuple(tuple(name for name in dim if sizes[name] != 1) for dim in names)
    followed_axes = followed(chain[-2::-1], axes, sizes)
    at = None if followed_axes is None else next((i for i, dim in enumerate(followed_axes) if "N" in dim), None)
    return at is None or at == _place_of_tokens(attention, taken)


def _place_of_tokens(attention: Attention, taken: Node) -> int | None:
    """The dimension of the operand ``taken`` that an attention sums over, in the softmax or with the weights."""
    if attention.scores is None or attention.output is None:
        return value_of(taken).dim() - 2
    product = attention.scores if taken is attention.key else attention.output
    if product.equation is None:
        return None
    left, right, result = product.equation
    ours, theirs = (left, right) if product.left is taken else (right, left)
    if taken is attention.key:
        return next((i for i, letter in enumerate(ours) if letter in result and letter not in theirs), None)
    return next((i for i, letter in enumerate(ours) if letter not in result), None)


def order_growth(graph: Graph, found: list[Concatenation], inputs: Mapping[Node, tuple[str, Any]]) -> dict[int, str]:
    """Have ``found`` grow along dimension 2 of [B, H, N, D], and ``inputs`` be in this order.

    Args:
        inputs: of each the dimensions, and the value to be known of what takes its place.

    Returns:
        Of the graph's results that are in this order now: the dimensions that the program has them in.
    """
    ordered = {node: input_beside(graph, node, value) for node, (_, value) in inputs.items()}
    results: dict[int, str] = {}
    for each in found:
        results.update(_order_one(graph, each, ordered.get(each.past)))
    for node, (dims, _) in inputs.items():
        use_ordered(graph, node, ordered[node], dims)
    return results


def _order_one(graph: Graph, found: Concatenation, past: Node | None) -> dict[int, str]:
    node, dims = found.node, found.dims
    with graph.inserting_before(node):
        if past is None:
            past = found.past if value_of(found.past).dim() == 1 else applied(graph, found.past, to_order(dims))
        x = applied(graph, found.x, to_order(dims))
        whole = call(graph, torch.cat, ((past, x), 2))
    replaced = {node: whole}
    for kept in found.kept:
        with graph.inserting_before(kept):
            index = slice(None), slice(None), _tokens(kept, dims.index("N"))
            replaced[kept] = call(graph, kept.target, (whole, index))
    output = graph.output_node()
    results = {i: dims for i, result in enumerate(output.args[0]) if result in replaced}  # type: ignore[arg-type,union-attr]
    output.args = map_arg(output.args, lambda n: replaced.get(n, n))
    for old in reversed(replaced):  # what is kept is read from the concatenation
        use_ordered(graph, old, replaced[old], dims)
    return results
