"""Masks of attention to a cache that grows: the op reads a storage with room for more tokens than there are."""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
from torch.fx import Graph, Node

from xquant_fx.passes.context import Context
from xquant_fx.passes.graph import call
from xquant_fx.passes.records import Site
from xquant_fx.passes.trace import value_of


def end_of_growth(graph: Graph, site: Site, stored: dict[str, Any], context: Context) -> Node | None:
    """bool [1, 1, 1, room], False beyond the last token, once per cache and step; None for a cache that does not grow.

    Made at the insertion point of ``graph``; ``stored`` holds the arguments of the op that the cache has.
    """
    if site.key_write is None or site.key_write.past is None:
        return None
    past, new, room = stored["past"], stored["new_tokens"], stored["max_len"]
    buffer: Any = context.inputs[context.index_of(site.key_write.past)]
    which = id(buffer.live.group), new, room
    if which not in context.ends:
        tokens = call(graph, torch.arange, (room,), {"device": value_of(past).device})
        seen = call(graph, operator.lt, (tokens, call(graph, operator.add, (past, new))))
        context.ends[which] = call(graph, torch.reshape, (seen, (1, 1, 1, room)))
    return context.ends[which]


def widened(graph: Graph, mask: Node, room: int) -> Node:
    """``mask`` [..., T] as [..., room], which hides what lies beyond T."""
    value = value_of(mask)
    tokens = value.shape[-1]
    if not isinstance(tokens, int):
        tokens = call(graph, torch.ops.aten.sym_size.int, (mask, value.dim() - 1))
    beyond = call(graph, operator.sub, (room, tokens))
    hidden = False if value.dtype == torch.bool else -math.inf
    # Not torch.nn.functional.pad: a symbolic width is an error of its bool kernel (torch 2.13).
    options = {"dtype": value.dtype, "device": value.device}
    rows = (int(size) for size in value.shape[:-1])  # batch, heads and queries are numbers by now, if as symbols
    rest = call(graph, torch.full, ((*rows, beyond), hidden), options)
    return call(graph, torch.cat, ([mask, rest], -1))
