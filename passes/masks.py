"""Build the one mask that ``decode_attention`` takes, [B or 1, Hq or 1, q or 1, N], from the masks of a program."""

from __future__ import annotations

import math

import torch
from torch.fx import Graph, Node

from xquant_fx.passes.graph import call
from xquant_fx.passes.layouts import mask_shape
from xquant_fx.passes.records import MaskTerm
from xquant_fx.passes.trace import operand, value_of
from xquant_fx.passes.vocabulary import kind

#: What a finite fill becomes: beside it no score counts, so that a row of nothing else weighs all tokens alike.
LEAST = torch.finfo(torch.float32).min


def build_mask(graph: Graph, terms: tuple[MaskTerm, ...], batch: int, heads: int) -> Node | None:
    """The mask as a node, bool (True: attends) or added to the logits; None where there is none."""
    if not terms:
        return None
    if len(terms) == 1 and _is_plain(terms[0]):
        return _only_mask(graph, terms[0], batch, heads)
    total: Node | None = None
    for term in terms:
        mask = _four_dimensions(graph, term, batch, heads)
        total = _added(graph, total, mask, term.factor) if term.fill is None else _filled(graph, total, mask, term)
    if total is not None and any(term.fill not in (None, -math.inf, LEAST) for term in terms):
        # A fill and a mask of least numbers must not add up to minus infinity, if the program's own number does not: a
        # row of nothing else weighs all alike.
        total = call(graph, torch.clamp, (total,), {"min": LEAST})
    return total


def _is_plain(term: MaskTerm) -> bool:
    """Whether the op takes the term as it is: added, or a fill with minus infinity, which is a bool mask."""
    return term.factor == 1.0 if term.fill is None else term.fill == -math.inf


def _only_mask(graph: Graph, term: MaskTerm, batch: int, heads: int) -> Node:
    mask = _four_dimensions(graph, term, batch, heads)
    return call(graph, torch.logical_not, (mask,)) if term.fill is not None and term.where else mask


def _added(graph: Graph, total: Node | None, mask: Node, factor: float) -> Node:
    if value_of(mask).dtype != torch.float32:
        mask = call(graph, torch.Tensor.to, (mask, torch.float32))
    if factor != 1.0:
        mask = call(graph, torch.mul, (mask, factor))
    return mask if total is None else call(graph, torch.add, (total, mask))


def _filled(graph: Graph, total: Node | None, condition: Node, term: MaskTerm) -> Node:
    fill = -math.inf if term.fill == -math.inf else LEAST
    if total is None:
        total = call(graph, torch.zeros, ((1, 1, 1, 1),), {"device": value_of(condition).device})
    fills = call(graph, torch.full, ((1, 1, 1, 1), fill), {"device": value_of(condition).device})
    return call(graph, torch.where, (condition, fills, total) if term.where else (condition, total, fills))


def _four_dimensions(graph: Graph, term: MaskTerm, batch: int, heads: int) -> Node:
    mask = _unexpanded(term.node)
    shape = mask_shape(tuple(value_of(mask).shape), term.scores, batch, heads)
    assert shape is not None
    if tuple(value_of(mask).shape) == shape:
        return mask
    if not isinstance(shape[-1], int):  # a graph holds no symbols; the others are numbers by now, if as symbols
        shape = (*map(int, shape[:-1]), -1)
    return call(graph, torch.reshape, (mask, shape))


def _unexpanded(mask: Node) -> Node:
    """The mask before it was expanded over batch, heads or queries: the op broadcasts by itself."""
    while kind(mask) == "expand":
        inner = operand(mask)
        if inner is None or value_of(inner).dim() != value_of(mask).dim():
            break
        if value_of(inner).shape[-1] != value_of(mask).shape[-1]:
            break
        mask = inner
    return mask
