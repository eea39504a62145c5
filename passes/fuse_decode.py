"""Replace an attention and the loads that it reads by one ``decode_attention``.

    k_all, v_all = shared_code_load(...), shared_code_load(...)
    sdpa(q, repeat(k_all), repeat(v_all), mask)            =>   decode_attention(q, codes, ..., mask)

Runs after ``rewrite``. Keys and values are never dequantized to memory then. A chunk of more than
STEP_TOKENS (8) tokens brings its own keys and values. Which attentions, and how, the records say.
"""

from __future__ import annotations

import dataclasses

import torch
from torch.fx import Graph, GraphModule, Node

from xquant_fx import ops
from xquant_fx.kernels.shared_code_load.arguments import LoadArguments
from xquant_fx.passes.context import Context
from xquant_fx.passes.graph import call
from xquant_fx.passes.masks import build_mask
from xquant_fx.passes.records import Decode, Layout, Site

OF_SIDE = ("codes", "scale", "zero", "ring", "sink")


def fuse_decode(gm: GraphModule, context: Context) -> int:
    """Fuse every site that has a form; returns how many."""
    replaced: dict[Node, Node] = {}  # outputs of attentions before: a query or a mask may be one
    for site in context.detection.sites:
        if site.form is None or not site.is_quantized:
            continue
        assert site.key_write is not None and site.value_write is not None
        key, value = (context.loads[write.node] for write in (site.key_write, site.value_write))
        replaced[site.form.output] = _replace(gm.graph, site, site.form, key, value, replaced)
    return len(replaced)


def _replace(graph: Graph, site: Site, form: Decode, key: Node, value: Node, replaced: dict[Node, Node]) -> Node:
    k, v = LoadArguments.of(key), LoadArguments.of(value)
    stored = {f"{side}_{name}": getattr(load, name) for side, load in (("k", k), ("v", v)) for name in OF_SIDE}
    with graph.inserting_before(form.output):
        query = _laid_out(graph, replaced.get(form.query, form.query), form.query_layout)
        terms = tuple(dataclasses.replace(term, node=replaced.get(term.node, term.node)) for term in form.terms)
        mask = build_mask(graph, terms, query.meta["example_value"].shape[0], form.heads)
        logits = None if form.sinks is None else replaced.get(form.sinks, form.sinks)
        sinks = None if logits is None else call(graph, torch.reshape, (logits, (form.heads,)))
        fused = call(graph, ops.DECODE, (), dict(
            q=query, **stored, start=k.start, past=k.past, mask=mask, sink_logits=sinks, new_tokens=k.new_tokens,
            max_len=k.n, k_bits=k.bits, k_group=k.group_size, v_bits=v.bits, v_group=v.group_size,
            residual_length=k.residual_length, scale=form.scale, softcap=form.softcap, window=0, k_new=k.x, v_new=v.x,
        ))  # fmt: skip
        output = _put_back(graph, fused, form.output_layout)
    form.output.replace_all_uses_with(output)
    _erase_unused(graph, form.output)
    return output


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
    if node.users or node.op == "placeholder":
        return
    inputs = node.all_input_nodes
    graph.erase_node(node)
    for each in inputs:
        _erase_unused(graph, each)
