"""Rewrite a graph so that buffers which are parts of one tensor are inputs of their own.

    kv[0, :, :, pos] = k                           part_0[:, :, pos] = k
    kv[:, :, :, pos] = torch.stack([k, v])    =>   part_0[:, :, pos] = k; part_1[:, :, pos] = v
    attention(q, kv[0], kv[1])                     attention(q, part_0, part_1)

for ``kv`` [2, B, H, N, D]. Everything behind this knows one buffer for keys and one for values of each layer.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch.fx import Graph, Node

from xquant_fx.passes.find_writes import appended, is_opaque, written_by
from xquant_fx.passes.graph import call, note_added, part_source
from xquant_fx.passes.trace import argument, fake, full_index, is_int, is_whole, shares_memory, value_of
from xquant_fx.passes.vocabulary import kind


def stacked_dim(buffer: Node) -> int | None:
    """The dimension along which all uses of ``buffer`` take one part, or write to each; None if there is none."""
    value = fake(buffer)
    if value is None or not all(isinstance(size, int) for size in value.shape):
        return None
    return next((at for at in range(value.dim() - 2) if _is_stack(buffer, at)), None)


def _is_stack(buffer: Node, at: int) -> bool:
    uses = list(buffer.users)
    return all(_fits(use, buffer, at) for use in uses) and any(kind(use) in _READS for use in uses)


def split(graph: Graph, buffer: Node, at: int, values: Sequence[Any]) -> list[Node] | None:
    """Put an input for each part in the place of ``buffer``; ``values`` is what is to be known of each.

    Returns:
        The inputs; None if ``buffer`` is written to otherwise than by its parts: ``graph`` is of no use any more then.
    """
    parts = [_part(graph, buffer, index, value) for index, value in enumerate(values)]
    for use in list(buffer.users):
        fits = _fits(use, buffer, at)
        if not fits and not _is_only_read(use, buffer):
            return None
        with graph.inserting_before(use):
            if fits:
                (_split_write if kind(use) in _WRITES else _split_read)(graph, use, at, parts)
            else:
                use.replace_input_with(buffer, call(graph, torch.stack, (parts, at)))
    graph.erase_node(buffer)
    return parts


def _is_only_read(use: Node, buffer: Node) -> bool:
    """Whether ``use`` does not write to ``buffer``, nor does what shows a part of it."""
    left = [(use, buffer)]
    for user, shown in left:  # which grows meanwhile
        if shown in written_by(user) or is_opaque(user) or user.op == "output":
            return False
        if shares_memory(user):
            left += [(each, user) for each in user.users]
    return True


def _part(graph: Graph, buffer: Node, index: int, value: Any) -> Node:
    with graph.inserting_before(buffer):
        part = graph.placeholder(f"{buffer.target}_{index}")
    part._dynamo_source = part_source(buffer, index)
    part.meta.update({**buffer.meta, "example_value": value})
    note_added(part)
    return part


_READS = ("getitem", "select", "unbind", "split")
_WRITES = ("setitem", "index_copy")


def _fits(use: Node, buffer: Node, at: int) -> bool:
    """Whether ``use`` takes one part of ``buffer`` along ``at``, takes them apart, or writes to one or to each."""
    size, rank = value_of(buffer).shape[at], value_of(buffer).dim()
    if use.args[:1] != (buffer,) or list(use.all_input_nodes).count(buffer) != 1:
        return False
    if kind(use) == "getitem":
        items = full_index(use.args[1], rank)
        return items is not None and _is_part(items[at], size)
    if kind(use) == "select":
        return argument(use, 1, "dim") in (at, at - rank) and _is_part(argument(use, 2, "index"), size)
    if kind(use) in ("unbind", "split"):
        pieces = use.meta.get("example_value")
        # Pieces of size 1 are as many as there are parts.
        along = argument(use, 1 if kind(use) == "unbind" else 2, "dim", 0) in (at, at - rank)
        return along and isinstance(pieces, tuple | list) and len(pieces) == size and _is_taken_apart(use)
    return kind(use) in _WRITES and _fits_write(use, at, value_of(buffer).shape)


def _is_taken_apart(use: Node) -> bool:
    return all(kind(user) == "getitem" and isinstance(user.args[1], int) for user in use.users)


def _is_part(item: object, size: int) -> bool:
    return isinstance(item, int) and not isinstance(item, bool) and -size <= item < size


def _fits_write(use: Node, at: int, shape: Sequence[int]) -> bool:
    rank, x = len(shape), fake(appended(use))
    if kind(use) == "index_copy":
        dim = argument(use, 1, "dim")
        return not use.users and isinstance(dim, int) and dim % rank != at and x is not None
    items = full_index(use.args[1], rank)
    if items is None or _is_part(items[at], shape[at]):
        return items is not None
    chosen = [item for item, size in zip(items, shape, strict=True) if not is_whole(item, size)]
    # One item says where, or what is written would have its dimensions in another order.
    return is_whole(items[at], shape[at]) and len(chosen) == 1 and x is not None and x.dim() <= rank - is_int(chosen[0])


def _split_read(graph: Graph, use: Node, at: int, parts: Sequence[Node]) -> None:
    if kind(use) == "getitem":
        items = full_index(use.args[1], value_of(parts[0]).dim() + 1) or []
        part = parts[items.pop(at)]
        whole = all(item == slice(None) for item in items)
        use.replace_all_uses_with(part if whole else _read(graph, use, part, tuple(items)))
    elif kind(use) == "select":
        use.replace_all_uses_with(parts[argument(use, 2, "index")])  # type: ignore[call-overload]
    else:
        for piece in list(use.users):
            part = parts[piece.args[1]]  # type: ignore[index]
            for user in list(piece.users):  # a view for each, or one would be made before an append that it shows
                with graph.inserting_before(user):
                    shown = part if kind(use) == "unbind" else call(graph, torch.unsqueeze, (part, at))
                    user.replace_input_with(piece, shown)
            graph.erase_node(piece)
    graph.erase_node(use)


def _read(graph: Graph, use: Node, part: Node, items: tuple[Any, ...]) -> Node:
    node = graph.call_function(operator.getitem, (part, items))
    node.meta.update(use.meta)
    return node


def _split_write(graph: Graph, use: Node, at: int, parts: Sequence[Node]) -> None:
    rank = value_of(parts[0]).dim() + 1
    if kind(use) == "index_copy":
        dim, x = argument(use, 1, "dim"), appended(use)
        assert isinstance(dim, int) and isinstance(x, Node)
        inner = dim % rank - (dim % rank > at)
        for part, share in zip(parts, _shares(graph, x, at, rank, len(parts)), strict=True):
            graph.call_method("index_copy_", cast(Any, (part, inner, argument(use, 2, "index"), share)))
    else:
        items, x = full_index(use.args[1], rank) or [], use.args[2]
        taken = items.pop(at)
        if isinstance(taken, int):
            graph.call_function(operator.setitem, (parts[taken], tuple(items), x))
        else:
            assert isinstance(x, Node)
            before = sum(is_int(item) for item in items[:at])  # dimensions that what is written does not have
            rank -= sum(map(is_int, items))
            for part, share in zip(parts, _shares(graph, x, at - before, rank, len(parts)), strict=True):
                graph.call_function(operator.setitem, (part, tuple(items), share))
    graph.erase_node(use)


def _shares(graph: Graph, x: Node, at: int, rank: int, count: int) -> list[Node]:
    """What each of ``count`` parts gets of ``x``, broadcast to ``rank`` dimensions and stacked along ``at``."""
    value = value_of(x)
    at -= rank - value.dim()
    if at < 0:
        return [x] * count
    if value.shape[at] == 1:
        return [call(graph, torch.select, (x, at, 0))] * count
    tensors = argument(x, 0, "tensors")
    if kind(x) == "stack" and argument(x, 1, "dim", 0) in (at, at - value.dim()) and isinstance(tensors, tuple | list):
        return list(tensors)
    return [call(graph, torch.select, (x, at, index)) for index in range(count)]
