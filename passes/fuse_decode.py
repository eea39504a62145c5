"""Replace an attention and the loads that it reads by one ``decode_attention``.

    k_all, v_all = shared_code_load(...), shared_code_load(...)
    sdpa(q, repeat(k_all), repeat(v_all), mask)            =>   decode_attention(q, codes, ..., mask)

Runs after ``rewrite``. Keys and values are never dequantized to memory then. A chunk of more than
STEP_TOKENS (8) tokens brings its own keys and values. Which attentions, and how, the records say.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from xquant_fx import ops
from xquant_fx.kernels.decode_attention.arguments import of_sides
from xquant_fx.kernels.decode_attention.plain_torch import attend_dense
from xquant_fx.kernels.shared_code_load.arguments import LoadArguments
from xquant_fx.passes.absorb_query import absorb_query, project_result
from xquant_fx.passes.context import Context
from xquant_fx.passes.graph import call
from xquant_fx.passes.growth_masks import (
    end_of_growth,
    first_kept,
    has_more_room,
    kept_of_window,
    over_buffer,
    over_room,
    up_to_length,
)
from xquant_fx.passes.layouts import lie_like
from xquant_fx.passes.masks import build_mask
from xquant_fx.passes.pair_heads import calls, in_order, put_back
from xquant_fx.passes.records import Layout, Site
from xquant_fx.passes.trace import fake, value_of


def fuse_decode(gm: GraphModule, context: Context) -> int:
    """Fuse every site that has a form; returns how many."""
    replaced: dict[Node, Node] = {}  # outputs of attentions before: a query or a mask may be one
    for site in context.detection.sites:
        if site.form is None or not site.is_quantized:
            continue
        replaced[site.form.output] = _replace(gm.graph, site, _stored(site, context), replaced, context)
    context.fused = replaced
    return len(replaced)


def _stored(site: Site, context: Context) -> dict[str, Any]:
    """The op's arguments that the cache has: what the two loads read, and what is fixed for the layer."""
    assert site.key_write is not None and site.value_write is not None
    k, v = (LoadArguments.of(context.loads[write.node]) for write in (site.key_write, site.value_write))
    key, value = (context.detection.specs[buffer] for buffer in site.buffers)
    fixed = key.decode_constants(value)
    keep = site.key_write.keep or kept_of_window(site.key_write)
    if keep:  # the mask says what is seen of what was kept, and a chunk is the longer
        fixed["window"] = keep + k.new_tokens
    return dict(
        of_sides(functools.partial(getattr, k), functools.partial(getattr, v)), start=k.start, past=k.past,
        new_tokens=k.new_tokens, k_new=k.x, v_new=v.x, **fixed,
    )  # fmt: skip


def _replace(graph: Graph, site: Site, stored: dict[str, Any], replaced: dict[Node, Node], context: Context) -> Node:
    form = site.form
    assert form is not None
    with graph.inserting_before(form.output):
        query = _laid_out(graph, replaced.get(form.query, form.query), form.query_layout)
        terms = tuple(dataclasses.replace(term, node=replaced.get(term.node, term.node)) for term in form.terms)
        mask = build_mask(graph, terms, query.meta["example_value"].shape[0], form.heads)
        if form.taken is not None:
            mask = over_buffer(graph, mask, form.taken, site.buffers[0], context)
        is_full = not all(context.detection.specs[buffer].quantized for buffer in site.buffers)
        grows = has_more_room(site)
        first = first_kept(site, context) if grows else None
        if first is not None:  # of latents there are as many as the mask is wide
            query, mask = _absorbed(graph, site, query, mask, context)
        if grows and mask is None and first is None and not is_full and _reads_what_is_written(site, context):
            stored["max_len"] = 0
        elif grows and not (is_full and first is not None):
            written = (site, stored, context)
            mask = end_of_growth(graph, *written) if mask is None else over_room(graph, mask, *written)
        elif not grows and mask is not None:
            mask = up_to_length(graph, mask, site.buffers[0], context)
        if first is None:  # as many as there is room for
            query, mask = _absorbed(graph, site, query, mask, context)
        logits = None if form.sinks is None else replaced.get(form.sinks, form.sinks)
        sinks = None if logits is None else call(graph, torch.reshape, (logits, (form.heads,)))
        ours = in_order(graph, dict(q=query, mask=mask, sink_logits=sinks), form.pairing)
        target, theirs = _op(site, stored, is_full, first, context)
        arguments = dict(**ours, **theirs, scale=form.scale, softcap=form.softcap)
        fused = put_back(
            graph, [call(graph, target, (), each) for each in calls(graph, arguments, form.pairing)], form.pairing
        )
        if context.detection.specs[site.buffers[1]].folded and target is ops.DECODE:
            fused = context.rotations[form.output] = call(graph, ops.ROTATE, (fused, True))
        if form.absorbed is not None:
            fused = project_result(graph, fused, form.absorbed.value)
        output = lie_like(graph, _put_back(graph, fused, form.output_layout), fake(form.output))
    form.output.replace_all_uses_with(output)
    for node in (*(() if form.absorbed is None else form.absorbed.assembling), form.output):
        _erase_unused(graph, node)
    return output


def _reads_what_is_written(site: Site, context: Context) -> bool:
    """Whether a kernel may be left to read as many tokens as are stored, without a mask that hides what comes behind.

    Where codes start over, how many tokens there is room for says where; on GPUs no kernel does so yet.
    """
    on_cpu = all(value_of(buffer).device.type == "cpu" for buffer in site.buffers)
    may_start_over = any(context.detection.specs[buffer].window for buffer in site.buffers)
    return on_cpu and not may_start_over and site.form is not None and site.form.absorbed is None


def _absorbed(graph: Graph, site: Site, query: Node, mask: Node | None, context: Context) -> tuple[Node, Node | None]:
    """Query and mask with the scores of latents, where these are attended to; else as they are."""
    form = site.form
    if form is None or form.absorbed is None or site.value_write is None:
        return query, mask
    latents = context.loads[site.value_write.node]
    return absorb_query(graph, query, latents, mask, form.absorbed, form.scale)


def _op(
    site: Site, stored: dict[str, Any], is_full: bool, first: Node | None, context: Context
) -> tuple[Any, dict[str, Any]]:
    """The op, or in a self-check what it computes, as no kernel reads keys and values of 16 bits; and its arguments."""
    if not is_full:
        return ops.DECODE, stored
    sides = (context.loads[write.node] for write in (site.key_write, site.value_write) if write is not None)
    keys, values = sides
    window = 0 if first is not None else stored["window"]  # what was loaded is what is seen, but for the mask
    return attend_dense, dict(keys=keys, values=values, past=stored["past"], window=window)


def _laid_out(graph: Graph, node: Node, layout: Layout) -> Node:
    """Permuted, then reshaped."""
    if layout.order is not None:
        node = call(graph, torch.permute, (node, layout.order))
    return node if layout.shape is None else call(graph, torch.reshape, (node, layout.shape))


def _put_back(graph: Graph, node: Node, layout: Layout) -> Node:
    """Reshaped, then permuted."""
    if layout.shape is not None:
        node = call(graph, torch.reshape, (node, layout.shape))
    return node if layout.order is None else call(graph, torch.permute, (node, layout.order))


def _erase_unused(graph: Graph, node: Node) -> None:
    """Erase ``node`` and what only it needed, down to inputs."""
    if node.users or node.op == "placeholder" or node._erased:  # two inputs may need the same node
        return
    inputs = node.all_input_nodes
    graph.erase_node(node)
    for each in inputs:
        _erase_unused(graph, each)
