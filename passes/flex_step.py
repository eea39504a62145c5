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

from xquant_fx.kernels.layout import STEP_TOKENS
from xquant_fx.passes.flex_masks import Masks, NotUnderstood, device_of, shape_of
from xquant_fx.passes.graph import call
from xquant_fx.passes.layouts import lie_like
from xquant_fx.passes.trace import fake
from xquant_fx.passes.vocabulary import FLEX, kind


def name_flex_steps(graph: Graph) -> int:
    """Rewrite what is understood, and note of the others why they are not; returns how many were rewritten."""
    done, masks = 0, Masks(graph)
    for node in graph.find_nodes(op="call_function", target=torch.ops.higher_order.flex_attention):
        try:
            _replace(graph, node, masks)
            done += 1
        except NotUnderstood as why:
            node.meta[FLEX] = str(why)
    return done


def _replace(graph: Graph, node: Node, masks: Masks) -> None:
    query, key, value, _, _, scale = node.args[:6]
    sizes = _sizes(query, key, value)
    outputs = [user for user in node.users if user.users]
    if any(kind(user) != "getitem" or user.args[1] != 0 for user in outputs):
        raise NotUnderstood("its logsumexp or its largest scores are read")
    if not isinstance(scale, int | float):
        raise NotUnderstood("its scale is no number")
    with graph.inserting_before(node):
        mask = _mask(graph, node, sizes, masks)
        grouped = dict(enable_gqa=True) if sizes[1] != shape_of(key)[1] else {}
        given = dict(attn_mask=mask, scale=float(scale), **grouped)
        new = call(graph, torch.nn.functional.scaled_dot_product_attention, (query, key, value), given)
        new.meta[FLEX] = ""
        for user in list(node.users):
            user.replace_all_uses_with(lie_like(graph, new, fake(user)) if user.users else new)
            graph.erase_node(user)
    graph.erase_node(node)


def _mask(graph: Graph, node: Node, sizes: tuple[int, ...], masks: Masks) -> Node | None:
    """What its score_mod and its block mask let be seen; None if all."""
    query, _, _, score_mod, blocks = node.args[:5]
    of_scores, of_mask = (tuple(node.args[at]) if at < len(node.args) else () for at in (7, 8))  # type: ignore[arg-type]
    if not isinstance(blocks, tuple) or len(blocks) < 9:
        raise NotUnderstood("its block mask is written in another way than torch 2.11 and 2.13 do")
    dims = masks.dims(sizes, device_of(query))
    parts = (
        masks.by_score_mod(_body(node, score_mod), dims, of_scores),
        masks.by_blocks(_body(node, blocks[-1]), blocks, dims, of_mask),
    )
    seen = [part for part in parts if part is not None]
    return call(graph, operator.and_, tuple(seen)) if len(seen) == 2 else next(iter(seen), None)


def _sizes(query: Any, key: Any, value: Any) -> tuple[int, int, int, int]:
    """Batch, query heads, new tokens and tokens of the cache."""
    of_query, of_key, of_value = (shape_of(each) for each in (query, key, value))
    sizes = (*of_query[:3], of_key[2])
    if not all(isinstance(size, int) for size in (*of_query, *of_key, *of_value)):
        raise NotUnderstood("the number of tokens is dynamic")
    if of_query[2] > STEP_TOKENS:
        raise NotUnderstood(f"the step has {of_query[2]} tokens, more than {STEP_TOKENS}")
    if of_key[0] != of_query[0] or of_value[:3] != of_key[:3]:
        raise NotUnderstood("queries, keys and values differ in their batch or their tokens")
    return sizes  # type: ignore[return-value]


def _body(node: Node, of: Any) -> GraphModule:
    module = node.graph.owning_module
    body = getattr(module, str(of.target), None) if isinstance(of, Node) and of.op == "get_attr" else None
    if not isinstance(body, GraphModule):
        raise NotUnderstood("its score_mod or mask_mod is no graph")
    return body
