"""Replace ``shared_code_load`` and the attention that reads it by one ``decode_attention``.

    k_all, v_all = shared_code_load(...), shared_code_load(...)
    sdpa(q, repeat(k_all), repeat(v_all), mask)            =>   decode_attention(q, codes, ..., mask)

Runs after ``rewrite``. Keys and values are never dequantized to memory then. A chunk of more than
STEP_TOKENS (8) tokens brings its own keys and values. 16-bit storage and attentions that ``match_decode``
rejects stay as they are.
"""

from __future__ import annotations

import dataclasses
import logging

import torch
from torch.fx import Graph, GraphModule, Node

from xquant_fx import ops
from xquant_fx.kernels.decode_attention.arguments import why_not_fused
from xquant_fx.kernels.quantize_store.arguments import StoreArguments
from xquant_fx.kernels.shared_code_load.arguments import LoadArguments
from xquant_fx.passes.graph import call
from xquant_fx.passes.match_decode import Decode, match_decode
from xquant_fx.passes.records import Attention
from xquant_fx.passes.trace import fake, op_name, source_of

log = logging.getLogger(__name__)


def fuse_decode(gm: GraphModule, attentions: list[Attention]) -> None:
    """Fuse every one of ``attentions`` that reads two loads of one step; the others are logged."""
    fused: dict[Node, Node] = {}  # outputs of attentions before: a query may be one
    for found_before in attentions:
        attention = dataclasses.replace(found_before, query=fused.get(found_before.query, found_before.query))
        key, value = (source_of(operand, {}) for operand in (attention.key, attention.value))
        if key.root.target is not ops.LOAD or value.root.target is not ops.LOAD:
            continue
        found = _why_not_loads(key.root, value.root, attention.query)
        found = found or match_decode(attention, key, value, {})
        if isinstance(found, Decode) and _written_between(gm.graph, (key.root, value.root), found.output):
            found = "the cache is appended to once more before the attention"
        if isinstance(found, str):
            log.info("%s reads dequantized keys and values: %s", attention.node.name, found)
            continue
        fused[found.output] = _replace(gm.graph, found, LoadArguments.of(key.root), LoadArguments.of(value.root))


def _why_not_loads(key: Node, value: Node, query: Node) -> str:
    k, v = LoadArguments.of(key), LoadArguments.of(value)
    if reason := why_not_fused(k.scheme, k.bits, v.scheme, v.bits):
        return reason
    if (k.x is None) != (v.x is None) or k.new_tokens != v.new_tokens:
        return "keys and values are not written by one step"
    if k.new_tokens != fake(query).shape[-2]:
        return "the query has another length than the step"
    if not _same_value(k.past, v.past):
        return "keys and values are written at different positions"
    return ""


def _written_between(graph: Graph, loads: tuple[Node, Node], output: Node) -> bool:
    """Whether a store changes, after its load, what the op would read in the load's place."""
    order = {node: i for i, node in enumerate(graph.nodes)}
    stores = [n for n in graph.nodes if n.target in (ops.STORE, ops.STORE_BORROWED)]
    rings = [LoadArguments.of(load).ring for load in loads]
    return any(
        StoreArguments.of(store).ring is ring and order[load] < order[store] < order[output]
        for load, ring in zip(loads, rings, strict=True) for store in stores
    )  # fmt: skip


def _same_value(a: object, b: object, depth: int = 6) -> bool:
    """Whether two nodes compute the same from the same inputs (positions: no op in them has effects)."""
    if not (isinstance(a, Node) and isinstance(b, Node)):
        return not isinstance(a, Node) and not isinstance(b, Node) and a == b
    if a is b:
        return True
    if depth == 0 or "placeholder" in (a.op, b.op) or (a.op, a.target) != (b.op, b.target) or a.kwargs != b.kwargs:
        return False
    pairs = zip(a.args, b.args, strict=False)
    return len(a.args) == len(b.args) and all(_same_value(x, y, depth - 1) for x, y in pairs)


def _replace(graph: Graph, found: Decode, key: LoadArguments, value: LoadArguments) -> Node:
    node = found.output
    names = ("codes", "scale", "zero", "ring", "sink", "bits")
    state = {f"{side}_{name}": getattr(a, name) for side, a in (("k", key), ("v", value)) for name in names}
    with graph.inserting_before(node):
        mask = _unexpanded(found.mask)
        while mask is not None and fake(mask).dim() < 4:
            mask = call(graph, torch.unsqueeze, (mask, 0))
        sinks = found.sinks
        if sinks is not None:
            sinks = call(graph, torch.reshape, (sinks, (fake(found.query).shape[1],)))
        given = dict(
            q=found.query, **state, start=key.start, past=key.past, mask=mask, sink_logits=sinks,
            new_tokens=key.new_tokens, max_len=key.n, k_group=key.group_size, v_group=value.group_size,
            residual_length=key.residual_length, scale=found.scale, softcap=found.softcap, window=0,
            k_new=key.x, v_new=value.x,
        )
        fused = call(graph, ops.DECODE, (), given)
    node.replace_all_uses_with(fused)
    _erase_unused(graph, node)
    return fused


def _unexpanded(mask: Node | None) -> Node | None:
    """The mask before it was expanded over batch, heads or queries: the op broadcasts by itself."""
    while mask is not None and op_name(mask) == "expand" and fake(mask.args[0]).dim() == fake(mask).dim():
        if fake(mask.args[0]).shape[-1] != fake(mask).shape[-1]:
            break
        mask = mask.args[0]
    return mask


def _erase_unused(graph: Graph, node: Node) -> None:
    """Erase ``node`` and what only it needed, down to inputs."""
    if node.users or node.op == "placeholder":
        return
    inputs = node.all_input_nodes
    graph.erase_node(node)
    for each in inputs:
        _erase_unused(graph, each)
