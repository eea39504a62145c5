"""How the operands of an attention that is written out relate to [B, heads, tokens, channels].

A product is an einsum; the axes of the key and value operands are known (``track_axes``), so each of its letters
has a meaning. Batch and heads may be one dimension or two, grouped queries may have a dimension of their own, and
an einsum may have its dimensions in any order: the op gets a permuted, reshaped query, and its result is put back.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.fx import Graph, Node

from xquant_fx.passes.graph import call
from xquant_fx.passes.pair_heads import NOT_HEADS, heads_of
from xquant_fx.passes.records import Layout, Product
from xquant_fx.passes.trace import value_of
from xquant_fx.passes.track_axes import Axes, Tracked


class _Sides(NamedTuple):
    """A product of queries with keys, or of weights with values, by its letters."""

    moving: str
    """Letters of the query or the weights,"""
    stored: str
    """of the keys or the values,"""
    result: str
    """and of the result."""
    meaning: dict[str, tuple[str, ...]]
    """Axes of the cache that a letter of keys or values stands for."""
    size: dict[str, int]
    """Of the letters of the query or the weights."""
    is_broadcast: bool
    """Whether keys or values have several of what the other operand has one of: the result is larger than it."""


def _sides(product: Product, stored: Node, axes: Axes) -> _Sides | None:
    """``product`` of something with ``stored``, whose axes are ``axes``; None where that is not understood."""
    if product.equation is None:
        return None
    left, right, result = product.equation
    is_right = product.right is stored
    ours, theirs = (left, right) if is_right else (right, left)
    size = dict(zip(ours, value_of(product.left if is_right else product.right).shape, strict=True))
    lengths = zip(theirs, value_of(stored).shape, strict=True)
    is_broadcast = any(size.get(letter) == 1 != length for letter, length in lengths)
    return _Sides(ours, theirs, result, dict(zip(theirs, axes, strict=True)), size, is_broadcast)


def query_layout(product: Product, keys: Node, found: Tracked, batch: int) -> tuple[Layout, tuple[int, ...]] | str:
    """How to bring the query to [B, Hq, q, D], and the KV head of each Hq; ``found`` is of the operand ``keys``."""
    sides = _sides(product, keys, found.axes)
    if sides is None:
        return "the product of queries and keys is none that is understood"
    query, key, scores, meaning, size, is_broadcast = sides
    inner = [letter for letter in key if letter not in scores]
    if len(inner) != 1 or meaning[inner[0]] != ("D",) or inner[0] not in query:
        return "queries and keys are not multiplied along the channels"
    if not scores or scores[-1] not in key or scores[-1] in query or meaning[scores[-1]] != ("N",):
        return "the scores' last dimension is not that of the tokens"
    rows = scores[:-1]
    if sorted(rows + inner[0]) != sorted(query):
        return "the scores have other dimensions than queries and tokens"
    if is_broadcast:
        return "the query is broadcast over batch or heads"
    heads = _heads_of_rows(rows, meaning, size, found)
    if heads is None:
        return f"keys {NOT_HEADS}"
    permuted = tuple(size[letter] for letter in rows + inner[0])
    order = tuple(query.index(letter) for letter in rows + inner[0])
    return _layout(order, permuted, (batch, math.prod(permuted[:-2]) // batch, *permuted[-2:])), heads


def _heads_of_rows(
    rows: str, meaning: dict[str, tuple[str, ...]], size: dict[str, int], found: Tracked
) -> tuple[int, ...] | None:
    """The KV head of each query head, if the scores' dimensions ``rows`` are batch, heads, query tokens; else None.

    ``meaning`` has the axes of those that keys (or values) have, too. Axes of size 1 have no name: where the
    query has several of one, the operand is repeated by broadcasting.
    """
    if not rows or rows[-1] in meaning:
        return None
    flat: list[tuple[str, int]] = []
    for letter in rows[:-1]:
        if meaning.get(letter):
            flat += [(name, found.sizes[name]) for name in meaning[letter]]
        elif size[letter] != 1:
            flat.append((f"repeated by {letter}", size[letter]))
    return heads_of(flat[1:] if flat and flat[0][0] == "B" else flat, found)


def _layout(order: tuple[int, ...], permuted: tuple[int, ...], shape: tuple[int, ...]) -> Layout:
    identity = order == tuple(range(len(order)))
    return Layout(None if identity else order, None if permuted == shape else shape)


def output_layout(
    product: Product, values: Node, found: Tracked, batch: int, heads: int
) -> tuple[Layout, tuple[int, ...]] | str:
    """How the result [B, Hq, q, Dv] becomes that of the product of weights and ``values``, and the KV head of each Hq.

    ``found`` is of the operand ``values``.
    """
    sides = _sides(product, values, found.axes)
    if sides is None:
        return "the product of weights and values is none that is understood"
    if product.added is not None:
        return "baddbmm adds to the output"
    weights, value, result, meaning, size, is_broadcast = sides
    tokens, rows = weights[-1], weights[:-1]
    if tokens not in value or tokens in result or meaning[tokens] != ("N",):
        return "weights and values are not multiplied along the tokens"
    channels = [letter for letter in value if letter not in weights]
    if len(channels) != 1 or meaning[channels[0]] != ("D",) or sorted(rows + channels[0]) != sorted(result):
        return "the output has other dimensions than queries and channels"
    if is_broadcast:
        return "the weights are broadcast over batch or heads"
    of_heads = _heads_of_rows(rows, meaning, size, found)
    if of_heads is None or len(of_heads) != heads:
        return f"values {NOT_HEADS}"
    laid_out = (*(size[letter] for letter in rows), value_of(product.node).shape[result.index(channels[0])])
    order = tuple((rows + channels[0]).index(letter) for letter in result)
    return _layout(order, (batch, heads, *laid_out[-2:]), laid_out), of_heads


def mask_shape(
    mask: tuple[int, ...], scores: tuple[int, ...], batch: int, heads: int
) -> tuple[int, int, int, int] | None:
    """The mask's shape with four dimensions [B or 1, Hq or 1, q or 1, N]; None where it does not fit.

    ``scores`` is the shape of what the mask is added to: [.., q, N] with batch and heads in one dimension or more.
    """
    if len(mask) > len(scores) or len(scores) < 3 or not mask:
        return None
    full = (1,) * (len(scores) - len(mask)) + tuple(mask)
    if full[-1] != scores[-1] or full[-2] not in (1, scores[-2]):
        return None
    lead, sizes = full[:-2], scores[:-2]
    if any(size not in (1, want) for size, want in zip(lead, sizes, strict=True)):
        return None
    if len(sizes) == 1:
        rows = (1, 1) if lead[0] == 1 and sizes[0] != 1 else (batch, heads)
        return (*rows, full[-2], full[-1])
    of_batch, of_heads = math.prod(lead[:1]), math.prod(lead[1:])
    if sizes[0] != batch or of_heads not in (1, heads):
        return None
    return of_batch, of_heads, full[-2], full[-1]


def lie_like(graph: Graph, node: Node, like: Tensor | None) -> Node:
    """``node`` with the strides of ``like``, of the same shape: what a program views behind an op must stay a view.

    Nothing is added where only dimensions of size 1 differ (steps of one token), or where ``like`` is not dense.
    """
    value = value_of(node)
    if like is None or _steps(like) == _steps(value):
        return node
    order = sorted(range(like.dim()), key=lambda dim: (-like.stride()[dim], dim))
    if not like.permute(order).is_contiguous():
        return node
    dense = call(graph, torch.Tensor.contiguous, (call(graph, torch.permute, (node, order)),))
    return call(graph, torch.permute, (dense, [order.index(dim) for dim in range(like.dim())]))


def _steps(value: Tensor) -> list[tuple[int, int]]:
    return [(dim, value.stride()[dim]) for dim in range(value.dim()) if value.shape[dim] != 1]
