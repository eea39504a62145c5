"""Which KV heads each query head reads, and the calls of the op that read them so.

The op pairs key head i with value head i, and gives each pair the same number of query heads in a row. Programs repeat
heads in another order, or read some of them, not the same of keys and of values:

    keys.repeat(1, 2, 1, 1)                     query heads take turns: they are put in order
    values.chunk(2, 1)[0].repeat(1, 2, 1, 1)    each half of the keys has the same half of the values: two calls
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import Graph, Node

from xquant_fx.kernels.decode_attention.arguments import OF_SIDE
from xquant_fx.passes.graph import call
from xquant_fx.passes.records import HeadPart, Pairing
from xquant_fx.passes.trace import value_of
from xquant_fx.passes.track_axes import FIRST, Tracked, expected, tracked

#: Calls that one attention may become: each reads the codes of its heads, and what the programs here need are two.
MOST_CALLS = 4
#: Arguments that have query heads, and the dimension of these; those with KV heads, in dimension 1.
OF_QUERY = {"q": 1, "mask": 1, "sink_logits": 0}
OF_KEYS = ("keys", "k_new", *(f"k_{name}" for name in (*OF_SIDE, "order", "center")))
OF_VALUES = ("values", "v_new", *(f"v_{name}" for name in OF_SIDE))
NOT_HEADS = "are neither the cache nor its heads repeated"


def heads_of_operand(node: Node, root: Node, what: str) -> tuple[int, ...] | str:
    """The head of the buffer ``root`` behind each head of ``node`` [B, heads, N, D], or why there is none."""
    found = tracked(node, root)
    batch, _, tokens, channels = expected(value_of(root).shape, *"BHND")
    if found is None or len(found.axes) != 4 or (found.axes[0], *found.axes[2:]) != (batch, tokens, channels):
        return f"{what} {NOT_HEADS}"
    heads = heads_of([(name, found.sizes[name]) for name in found.axes[1]], found)
    return f"{what} {NOT_HEADS}" if heads is None else heads


def heads_of(axes: Sequence[tuple[str, int]], found: Tracked) -> tuple[int, ...] | None:
    """The head of the buffer at each place of ``axes`` (name, size), in order; None where they are not heads alone."""
    names = [name for name, _ in axes]
    if {"B", "N", "D"} & set(names) or len({"H", "part"} & set(names)) > 1:
        return None
    at = next((i for i, name in enumerate(names) if name in ("H", "part")), None)
    first = found.sizes.get(FIRST, 0)
    return tuple(
        first + (0 if at is None else place[at]) for place in itertools.product(*(range(size) for _, size in axes))
    )


def paired(keys: Sequence[int], values: Sequence[int], kv_heads: int) -> Pairing | str:
    """The calls in which each query head reads its heads of keys and values, of ``kv_heads``; or why there are none."""
    pairs = list(zip(keys, values, strict=True))
    order = sorted(range(len(pairs)), key=pairs.__getitem__)
    turned = None if order == list(range(len(pairs))) else _turn(order)
    together = [(pair, len(list(group))) for pair, group in itertools.groupby(pairs[i] for i in order)]
    group = together[0][1]
    if (turned is None and order != sorted(order)) or any(size != group for _, size in together):
        return "query heads read keys and values in an order that is not understood"
    parts: list[HeadPart] = []
    for i, ((key, value), _) in enumerate(together):
        last = parts[-1] if parts else None
        if last is not None and (last.keys.stop, last.values.stop) == (key, value):
            longer = zip(last, (group, 1, 1), strict=True)
            parts[-1] = HeadPart(*(slice(heads.start, heads.stop + more) for heads, more in longer))
        else:
            parts.append(HeadPart(slice(group * i, group * (i + 1)), slice(key, key + 1), slice(value, value + 1)))
    if len(parts) > MOST_CALLS:
        return f"query heads read keys and values in an order that takes {len(parts)} calls, more than {MOST_CALLS}"
    every = slice(0, kv_heads)
    return Pairing(turned, () if [(part.keys, part.values) for part in parts] == [(every, every)] else tuple(parts))


def _turn(order: list[int]) -> tuple[int, int, int] | None:
    """(a, b, c) where ``order`` takes heads [a, b, c] as [b, a, c]."""
    n = len(order)
    for a, b in itertools.product(range(2, n + 1), repeat=2):
        if n % (a * b) == 0:
            c = n // (a * b)
            if order == [(j * b + i) * c + k for i in range(b) for j in range(a) for k in range(c)]:
                return a, b, c
    return None


def in_order(graph: Graph, of_query: dict[str, Node | None], pairing: Pairing) -> dict[str, Node | None]:
    """``OF_QUERY`` with the query heads in the order of the calls; what has one head for all as it is."""
    if pairing.turned is None:
        return of_query
    return {
        name: node if node is None or _heads(node, name) == 1 else _turned(graph, node, pairing.turned, OF_QUERY[name])
        for name, node in of_query.items()
    }


def calls(graph: Graph, arguments: dict[str, Any], pairing: Pairing) -> list[dict[str, Any]]:
    """The arguments of each call, made of those of one call for all heads."""
    return [{name: _some(graph, name, value, part) for name, value in arguments.items()} for part in pairing.parts] or [
        arguments
    ]


def _some(graph: Graph, name: str, value: Any, part: HeadPart) -> Any:
    """The heads of one argument that ``part`` takes. Kernels read what is stored as one block of memory."""
    if not isinstance(value, Node):
        return value
    if name in OF_QUERY:
        dim, heads = OF_QUERY[name], part.query
        return value if _heads(value, name) == 1 else call(graph, torch.narrow, (value, dim, *_length(heads)))
    heads = part.keys if name in OF_KEYS else part.values
    if name not in (*OF_KEYS, *OF_VALUES):
        return value
    return call(graph, torch.Tensor.contiguous, (call(graph, torch.narrow, (value, 1, *_length(heads))),))


def _length(heads: slice) -> tuple[int, int]:
    return heads.start, heads.stop - heads.start


def _heads(node: Node, name: str) -> int:
    return int(value_of(node).shape[OF_QUERY[name]])


def put_back(graph: Graph, results: list[Node], pairing: Pairing) -> Node:
    """The results [B, some heads, q, D] of the calls together, with the heads in the order of the program."""
    node = results[0] if len(results) == 1 else call(graph, torch.cat, (results, 1))
    if pairing.turned is None:
        return node
    a, b, c = pairing.turned
    return _turned(graph, node, (b, a, c), 1)


def _turned(graph: Graph, node: Node, sizes: tuple[int, int, int], dim: int) -> Node:
    node = call(graph, torch.unflatten, (node, dim, sizes))
    node = call(graph, torch.transpose, (node, dim, dim + 1))
    return call(graph, torch.flatten, (node, dim, dim + 2))
