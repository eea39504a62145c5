"""``flex_attention`` of a step of a few tokens becomes ``scaled_dot_product_attention`` under a mask of bool.

    flex_attention(q, k, v, score_mod, block_mask)   =>   sdpa(q, k, v, attn_mask=mask, enable_gqa=...)
    mask_mod(b, h, q_idx, kv_idx)                    =>   its ops on four ``arange``, each along its own dimension
    torch.where(seen, score, -inf) as a score_mod    =>   ``seen`` likewise

What flex attention computes of a pair of tokens at a time is computed of all pairs at once, which is the same as long
as each op works element by element or looks something up. The blocks of a ``BlockMask`` count, too: of those that it
does not list nothing is seen, in those that it lists as full everything is. Layers with one mask share it. A longer
chunk stays flex attention, whose point is to make no such mask.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from xquant_fx.kernels.layout import STEP_TOKENS
from xquant_fx.passes.graph import call
from xquant_fx.passes.layouts import lie_like
from xquant_fx.passes.trace import argument, fake, memory_of
from xquant_fx.passes.vocabulary import FLEX, is_in_place, kind, op_name

#: Ops that give of all pairs of tokens what they give of each.
_POINTWISE = frozenset(
    {"add", "sub", "mul", "truediv", "floordiv", "div", "floor_divide", "mod", "remainder", "fmod", "neg",
     "abs", "pow", "lshift", "rshift", "minimum", "maximum", "clamp", "lt", "le", "gt", "ge", "eq", "ne", "and",
     "or", "xor", "invert", "and_", "or_", "logical_and", "logical_or", "logical_xor", "logical_not",
     "bitwise_and", "bitwise_or", "bitwise_xor", "bitwise_not", "where", "to", "bool", "int", "long", "float"}
)  # fmt: skip
#: A number as a tensor, by ``size=()``.
_NUMBERS = frozenset({"new_ones", "new_zeros", "new_full"})

Dims = tuple[Node, Node, Node, Node]


class _NotUnderstood(Exception):
    """Why the attention stays as it is."""


def name_flex_steps(graph: Graph) -> int:
    """Rewrite what is understood, and note of the others why they are not; returns how many were rewritten."""
    done, masks = 0, dict[Any, Node | None]()
    for node in graph.find_nodes(op="call_function", target=torch.ops.higher_order.flex_attention):
        try:
            _replace(graph, node, masks)
            done += 1
        except _NotUnderstood as why:
            node.meta[FLEX] = str(why)
    return done


def _replace(graph: Graph, node: Node, masks: dict[Any, Node | None]) -> None:
    query, key, value, score_mod, blocks, scale = node.args[:6]
    of_scores, of_mask = (tuple(node.args[at]) if at < len(node.args) else () for at in (7, 8))  # type: ignore[arg-type]
    sizes = _sizes(query, key, value)
    outputs = [user for user in node.users if user.users]
    if any(kind(user) != "getitem" or user.args[1] != 0 for user in outputs):
        raise _NotUnderstood("its logsumexp or its largest scores are read")
    if not isinstance(blocks, tuple) or len(blocks) < 9 or not isinstance(scale, int | float):
        raise _NotUnderstood("its block mask or its scale is written in another way than torch 2.11 and 2.13 do")
    with graph.inserting_before(node):
        dims = _index_dims(graph, sizes, _device(query), masks)
        parts = [_seen_by_score_mod(graph, _body(node, score_mod), dims, of_scores, masks)]
        parts.append(_seen_by_blocks(graph, _body(node, blocks[-1]), blocks, dims, of_mask, sizes, masks))
        seen = [part for part in parts if part is not None]
        mask = seen[0] if len(seen) == 1 else call(graph, operator.and_, tuple(seen)) if seen else None
        grouped = dict(enable_gqa=True) if sizes[1] != _shape(key)[1] else {}
        given = dict(attn_mask=mask, scale=float(scale), **grouped)
        new = call(graph, torch.nn.functional.scaled_dot_product_attention, (query, key, value), given)
        new.meta[FLEX] = ""
        for user in list(node.users):
            user.replace_all_uses_with(lie_like(graph, new, fake(user)) if user.users else new)
            graph.erase_node(user)
    graph.erase_node(node)


def _shape(node: Any) -> torch.Size:
    """Shape of the tensor ``node``."""
    value = fake(node)
    if value is None:
        raise _NotUnderstood("shapes are unknown")
    return value.shape


def _device(node: Any) -> torch.device:
    """Device of the tensor ``node``."""
    value = fake(node)
    assert value is not None
    return value.device


def _sizes(query: Any, key: Any, value: Any) -> tuple[int, int, int, int]:
    """Batch, query heads, new tokens and tokens of the cache."""
    of_query, of_key, of_value = (_shape(each) for each in (query, key, value))
    sizes = (*of_query[:3], of_key[2])
    if not all(isinstance(size, int) for size in (*of_query, *of_key, *of_value)):
        raise _NotUnderstood("the number of tokens is dynamic")
    if of_query[2] > STEP_TOKENS:
        raise _NotUnderstood(f"the step has {of_query[2]} tokens, more than {STEP_TOKENS}")
    if of_key[0] != of_query[0] or of_value[:3] != of_key[:3]:
        raise _NotUnderstood("queries, keys and values differ in their batch or their tokens")
    return sizes  # type: ignore[return-value]


def _body(node: Node, of: Any) -> GraphModule:
    module = node.graph.owning_module
    body = getattr(module, str(of.target), None) if isinstance(of, Node) and of.op == "get_attr" else None
    if not isinstance(body, GraphModule):
        raise _NotUnderstood("its score_mod or mask_mod is no graph")
    return body


def _index_dims(graph: Graph, sizes: tuple[int, ...], device: torch.device, masks: dict[Any, Node | None]) -> Dims:
    """Numbers of rows, heads, new tokens and tokens of the cache, each along its own of four dimensions."""
    if ("dims", sizes) not in masks:
        for dim, size in enumerate(sizes):
            numbers = call(graph, torch.arange, (size,), dict(device=device))
            masks["dims", sizes, dim] = call(graph, torch.reshape, (numbers, [1] * dim + [-1] + [1] * (3 - dim)))
        masks["dims", sizes] = None
    return tuple(masks["dims", sizes, dim] for dim in range(4))  # type: ignore[return-value]


def _seen_by_score_mod(
    graph: Graph, body: GraphModule, dims: Dims, captured: tuple[Any, ...], masks: dict[Any, Node | None]
) -> Node | None:
    """What a score_mod leaves to be seen; None if all: it changes no score that it leaves."""
    score = next(iter(body.graph.nodes))
    result = body.graph.output_node().args[0]
    if result is score:
        return None
    by_hand = isinstance(result, Node) and kind(result) == "where" and result.args[1:] in [(score, -float("inf"))]
    if not by_hand or len(score.users) != 1 or not isinstance(result, Node):
        raise _NotUnderstood("its score_mod is no torch.where(seen, score, -inf)")
    return _evaluated(graph, body, result.args[0], (None, *dims), captured, masks)


def _seen_by_blocks(
    graph: Graph,
    body: GraphModule,
    blocks: tuple[Any, ...],
    dims: Dims,
    captured: tuple[Any, ...],
    sizes: tuple[int, ...],
    masks: dict[Any, Node | None],
) -> Node | None:
    """What a BlockMask lets be seen; None if all."""
    _, length, counts, listed, full_counts, full_listed = blocks[:6]
    _, width = blocks[-3:-1]
    in_all = isinstance(counts, Node) and kind(counts) == "factory" and op_name(counts) == "ones" and width >= sizes[3]
    result = body.graph.output_node().args[0]
    of_all = isinstance(result, Node) and op_name(result) == "new_ones"
    if in_all and of_all:
        return None  # what flex attention makes where it is given no block mask
    seen = None if of_all else _evaluated(graph, body, result, dims, captured, masks)
    if in_all:
        return seen
    if not isinstance(length, int) or length != sizes[3]:
        raise _NotUnderstood(f"its block mask is for {length} keys, and there are {sizes[3]}")
    key = ("blocks", id(seen), counts, listed, full_counts, full_listed, sizes)
    if key not in masks:
        within = _tokens_of_blocks(graph, counts, listed, dims[3], width, sizes[3])
        found = within if seen is None else call(graph, operator.and_, (seen, within))
        if full_counts is not None:
            whole = _tokens_of_blocks(graph, full_counts, full_listed, dims[3], width, sizes[3])
            found = call(graph, operator.or_, (found, whole))
        masks[key] = found
    return masks[key]


def _tokens_of_blocks(graph: Graph, counts: Any, listed: Any, tokens: Node, width: int, length: int) -> Node:
    """Whether each of ``length`` tokens is in one of the first ``counts`` [B, H, 1] blocks ``listed`` [B, H, 1, n]."""
    shape = _shape(listed)
    if shape[2] != 1:
        raise _NotUnderstood("its blocks have fewer query tokens than the step")
    numbers = [call(graph, torch.arange, (n,), dict(device=_device(listed))) for n in (shape[3], -(-length // width))]
    of_slots = call(graph, operator.lt, (numbers[0], call(graph, torch.unsqueeze, (counts, -1))))
    is_block = call(graph, operator.eq, (call(graph, torch.unsqueeze, (listed, -1)), numbers[1]))
    both = call(graph, operator.and_, (is_block, call(graph, torch.unsqueeze, (of_slots, -1))))
    present = call(graph, torch.any, (both, -2))
    block = call(graph, operator.floordiv, (call(graph, torch.reshape, (tokens, [-1])), width))
    return call(graph, torch.index_select, (present, -1, block))


def _evaluated(
    graph: Graph,
    body: GraphModule,
    result: Any,
    dims: tuple[Node | None, ...],
    captured: tuple[Any, ...],
    masks: dict[Any, Node | None],
) -> Node:
    """``result`` of ``body``, a graph of one pair of tokens, of all pairs."""
    shown = {memory_of(each) for each in captured if isinstance(each, Node)}
    changes = shown and any(is_in_place(node) and memory_of(node) in shown for node in graph.nodes)
    key = (body.code, str(result), captured, dims, id(body) if changes else 0)
    if key not in masks:
        masks[key] = _Evaluation(graph, body, (*dims, *captured)).of(result)
    found = masks[key]
    assert found is not None
    return found


class _Evaluation:
    """Copies what a result needs of ``body`` to ``graph``, with ``inputs`` for its placeholders."""

    def __init__(self, graph: Graph, body: GraphModule, inputs: tuple[Any, ...]) -> None:
        self.graph = graph
        places = body.graph.find_nodes(op="placeholder")
        if len(places) != len(inputs):
            raise _NotUnderstood("its score_mod or mask_mod takes other arguments than torch 2.11 and 2.13 give it")
        self.made: dict[Node, Any] = dict(zip(places, inputs, strict=True))
        #: What has been looked up so far of a tensor of more dimensions: (the tensor, indices).
        self.part: dict[Node, tuple[Any, tuple[Any, ...]]] = {}

    def of(self, result: Any) -> Node:
        """The node of ``result``, of bool."""
        found = self._value(result)
        value = fake(found)
        if value is None or value.dtype != torch.bool:
            raise _NotUnderstood("its mask is no tensor of bool")
        if value.dim() == 0:
            found = call(self.graph, torch.reshape, (found, [1] * 4))
        return found  # type: ignore[no-any-return]

    def _value(self, node: Any) -> Any:
        if not isinstance(node, Node):
            return node
        if node not in self.made:
            self.made[node] = self._copy(node)
        if self.made[node] is None:
            raise _NotUnderstood("its mask depends on scores, or on a row of a table")
        return self.made[node]

    def _copy(self, node: Node) -> Any:
        if node.op not in ("call_function", "call_method"):
            raise _NotUnderstood(f"its mask_mod has a {node.op}")
        if kind(node) == "getitem":
            return self._looked_up(node)
        name = op_name(node)
        is_number = name in _NUMBERS and argument(node, 1, "size", None) in ((), [])
        if is_in_place(node) or not (is_number or name in _POINTWISE or name.strip("_") in _POINTWISE):
            raise _NotUnderstood(f"its mask_mod has a {name}, which is not known to work element by element")
        args, kwargs = map_arg((node.args, node.kwargs), self._value)
        target = node.target if node.op == "call_function" else getattr(torch.Tensor, str(node.target))
        return call(self.graph, target, args, kwargs)

    def _looked_up(self, node: Node) -> Any:
        """``table[b, kv]``, also as ``table[b][kv]``: all indices at once, whose dimensions broadcast."""
        table, index = node.args
        if isinstance(table, Node) and kind(table) == "getitem" and table not in self.made:
            self.made[table] = self._looked_up(table)
        before, indices = self.part.get(table, (None, ())) if isinstance(table, Node) else (None, ())
        whole = before if indices else self._value(table)
        given = index if isinstance(index, tuple) else (index,)
        indices = (*indices, *(self._value(each) for each in given))
        if not all(isinstance(each, int | Node) for each in indices):
            raise _NotUnderstood("its mask_mod looks up a slice")
        if len(_shape(whole)) > len(indices):
            self.part[node] = whole, indices
            return None
        return call(self.graph, operator.getitem, (whole, indices))
