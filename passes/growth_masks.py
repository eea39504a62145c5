"""Masks of attention to some of what is stored: the op reads a storage with room for more tokens than there are.

Of a cache that grows, and of a buffer whose first tokens are read (``keys[:, :, : p + t]``).

Of a sliding window the program's masks are as wide as what is kept and new, which begins at any token. That of a
buffer that is rolled, too, has room for more.
"""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
from torch.fx import Graph, Node

from xquant_fx.kernels.shared_code_load.arguments import LoadArguments
from xquant_fx.passes.context import Context
from xquant_fx.passes.facts import is_sliding
from xquant_fx.passes.graph import call
from xquant_fx.passes.records import Site, Write
from xquant_fx.passes.trace import value_of


def has_more_room(site: Site) -> bool:
    """Whether what is stored has room for more tokens than ``site`` reads."""
    write = site.key_write
    return write is not None and (write.past is not None or is_sliding(write.buffer))


def end_of_growth(graph: Graph, site: Site, stored: dict[str, Any], context: Context) -> Node:
    """bool [1, 1, 1, room], once per cache and step: False beyond the last token and before those that are kept.

    Made at the insertion point of ``graph``; ``stored`` holds the arguments of the op that the cache has.
    """
    past, new, room = stored["past"], stored["new_tokens"], stored["max_len"]
    first, which = first_kept(site, context), _step_of(site, stored, context)
    if which not in context.ends:
        tokens = call(graph, torch.arange, (room,), {"device": value_of(past).device})
        seen = call(graph, operator.lt, (tokens, call(graph, operator.add, (past, new))))
        if first is not None:
            seen = call(graph, operator.and_, (seen, call(graph, operator.ge, (tokens, first))))
        context.ends[which] = call(graph, torch.reshape, (seen, (1, 1, 1, room)))
    return context.ends[which]


def _step_of(site: Site, stored: dict[str, Any], context: Context) -> tuple[object, ...]:
    """What tells apart the masks of one graph: the cache and the step, how much of it is kept, and how many tokens.

    Layers of one cache may hold different numbers (one was cropped alone, say), which are other symbols of the graph.
    """
    write, first = site.key_write, first_kept(site, context)
    assert write is not None
    past = write.past or write.buffer
    buffer: Any = context.inputs[context.index_of(past)]
    kept = 0 if first is None else stored["window"]
    return id(buffer.live.group), stored["new_tokens"], stored["max_len"], kept, str(value_of(past).shape[2])


def kept_of_window(write: Write) -> int:
    """How many old tokens a full sliding window gives its attention; 0 where it is none."""
    return int(write.slide.old) if write.slide is not None and write.slide.is_full and is_sliding(write.buffer) else 0


def first_kept(site: Site, context: Context) -> Node | None:
    """int64 [1], the first token that attention reads; None: the first of all."""
    assert site.key_write is not None
    return LoadArguments.of(context.loads[site.key_write.node]).first  # type: ignore[return-value]  # in a graph


def over_room(graph: Graph, mask: Node, site: Site, stored: dict[str, Any], context: Context) -> Node:
    """``mask`` [..., T] of the tokens that ``site`` reads as [..., room], made once for all sites that share it."""
    first = first_kept(site, context)
    which = (mask, stored["max_len"]) if first is None else (mask, *_step_of(site, stored, context))
    if which not in context.ends:
        context.ends[which] = widened(graph, mask, stored["max_len"], first)
    return context.ends[which]


def over_buffer(graph: Graph, mask: Node | None, taken: Any, buffer: Node, context: Context) -> Node:
    """``mask`` [..., taken] of the first tokens of ``buffer`` as [..., N], which hides all others; once per mask."""
    value = value_of(buffer)
    which = mask, "taken", taken, value.shape[2]
    if which not in context.ends and mask is not None:
        context.ends[which] = widened(graph, mask, value.shape[2], None)
    elif which not in context.ends:
        tokens = call(graph, torch.arange, (value.shape[2],), {"device": value.device})
        seen = call(graph, operator.lt, (tokens, taken))
        context.ends[which] = call(graph, torch.reshape, (seen, (1, 1, 1, value.shape[2])))
    return context.ends[which]


def up_to_length(graph: Graph, mask: Node, buffer: Node, context: Context) -> Node:
    """``mask`` [..., room] without what lies behind ``buffer``, where a step alone knows how long it is; once per
    mask."""
    length = context.length_of(graph, buffer)
    if length is None or mask is None:
        return mask
    which = mask, "length", length
    if which not in context.ends:
        value = value_of(mask)
        columns = call(graph, torch.arange, (value.shape[-1],), {"device": value.device})
        inside = call(graph, operator.lt, (columns, length))
        hidden = False if value.dtype == torch.bool else -math.inf
        context.ends[which] = call(graph, torch.where, (inside, mask, hidden))
    return context.ends[which]


def widened(graph: Graph, mask: Node, room: int, first: Node | None) -> Node:
    """``mask`` [..., T] of the T tokens from ``first`` on as [..., room], which hides all others.

    It is read at ``room`` columns rather than joined to others: what Inductor then allocates has a size that is known
    when it compiles, which ``kernels/cpu/one_call.py`` asks for.
    """
    value = value_of(mask)
    tokens = value.shape[-1]
    if not isinstance(tokens, int):
        tokens = call(graph, torch.ops.aten.sym_size.int, (mask, value.dim() - 1))
    columns = call(graph, torch.arange, (room,), {"device": value.device})
    if first is not None:
        columns = call(graph, operator.sub, (columns, first))
    inside = call(graph, operator.lt, (columns, tokens))
    if first is not None:
        inside = call(graph, operator.and_, (inside, call(graph, operator.ge, (columns, 0))))
    columns = call(graph, torch.where, (inside, columns, 0))
    moved = call(graph, torch.index_select, (mask, value.dim() - 1, columns))
    hidden = False if value.dtype == torch.bool else -math.inf
    return call(graph, torch.where, (inside, moved, hidden))
