"""What the KV buffers of a graph are, or are going to be: the plan of those that are taken over, and all specs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from xquant_fx.cache.allocate import Geometry, Slot, bind_all, quantized_empty
from xquant_fx.cache.growing import STORED_KV, room_for
from xquant_fx.compiler.dynamo_frames import is_partial
from xquant_fx.compiler.options import Request
from xquant_fx.passes.facts import is_quantized_growth
from xquant_fx.passes.find_writes import concatenation
from xquant_fx.passes.records import Buffer, Site
from xquant_fx.passes.trace import fake, value_of
from xquant_fx.plan.config import XQuantConfig
from xquant_fx.plan.plan import Plan, make_plan
from xquant_fx.plan.spec import KVSpec
from xquant_fx.warn_once import warn_once


def plan_graph(
    gm: GraphModule, sites: list[Site], request: Request
) -> tuple[tuple[Buffer, ...], Plan | None, dict[Node, KVSpec]]:
    """The ordinary buffers of ``sites``, their plan (None: there are none), and the specs of all buffers of ``gm``."""
    specs = _existing(gm)
    buffers = _ordinary(gm, sites)
    if not buffers:
        return (), None, specs
    plan = make_plan(_settings(gm, request), 1 + max(buffer.layer for buffer in buffers))
    bound = bind_buffers(plan, buffers, [value_of(buffer.node) for buffer in buffers])
    specs.update(zip((buffer.node for buffer in buffers), bound, strict=True))
    return buffers, plan, specs


def bind_buffers(plan: Plan, buffers: Sequence[Buffer], tensors: Sequence[Tensor]) -> list[KVSpec]:
    """Specs of ``buffers``, which hold ``tensors`` [B, H, N, D]."""
    pairs = zip(buffers, tensors, strict=True)
    return bind_all(plan, [(b.layer, b.role, _geometry(b, t)) for b, t in pairs])


def _geometry(buffer: Buffer, tensor: Tensor) -> Geometry:
    """Of the stored tensors; what grows by concatenation gets room to grow."""
    batch, heads, tokens, dim = tensor.shape
    if buffer.write.past is not None:
        tokens = room_for(tokens if isinstance(tokens, int) else tokens.node.hint)
    return Geometry((batch, heads, tokens, dim), tensor.dtype)


def _ordinary(gm: GraphModule, sites: list[Site]) -> tuple[Buffer, ...]:
    """Ordinary buffers that can be taken over, numbered in layer order (sites may share a layer's)."""
    index = {n: i for i, n in enumerate(n for n in gm.graph.nodes if n.op == "placeholder")}
    found: dict[Node, Buffer] = {}
    layer = 0
    for site in sites:
        if site.is_quantized or not site.rewritable or site.key.root in found:
            continue
        assert site.key_write is not None and site.value_write is not None
        key, value = site.buffers
        found[key] = Buffer(key, index.get(key), layer, "key", site.key_write)
        found[value] = Buffer(value, index.get(value), layer, "value", site.value_write)
        layer += 1
    return tuple(found.values())


def _existing(gm: GraphModule) -> dict[Node, KVSpec]:
    """Specs of the buffers that are quantized already, inputs and such as the graph allocates."""
    specs: dict[Node, KVSpec] = {}
    for node in gm.graph.nodes:
        value = fake(node)
        if node.op == "placeholder" and isinstance(value, STORED_KV):
            specs[node] = value.spec
        elif is_quantized_growth(node):
            past = concatenation(node).past  # type: ignore[union-attr]  # it is one
            specs[node] = value_of(past).spec  # type: ignore[attr-defined,arg-type]
        elif node.target is quantized_empty:
            like, _, lower, _, slot, _ = node.args
            below = specs.get(lower) if isinstance(lower, Node) else None
            specs[node] = Slot.from_json(slot).bind(value_of(like), below)
    return specs


def _settings(gm: GraphModule, request: Request) -> XQuantConfig | Plan:
    """The settings of ordinary buffers: no sharing where only some layers can be seen."""
    settings = request.effective
    if not is_partial(gm) or isinstance(settings, Plan):
        return settings
    alone = settings.replace(share_keys_from=None, share_values_from=None)
    if alone != settings:
        warn_once("a graph break hides the other layers: no layer reads another's codes; an XQuantCache pairs them")
    return alone


def why_not_layers(gm: GraphModule, request: Request) -> str:
    """Why settings that differ by layer cannot be used for the ordinary buffers of ``gm``."""
    settings = request.effective
    if not is_partial(gm):
        return ""
    if isinstance(settings, Plan):
        return "a plan names every layer and a graph break hides the number of layers; use an XQuantCache"
    if isinstance(settings.k_bits, tuple) or isinstance(settings.v_bits, tuple):
        return "bits are given per layer and a graph break hides the number of layers; use an XQuantCache"
    return ""


def why_not_gradients() -> str:
    """Why nothing is taken over while gradients are recorded."""
    if not torch.is_grad_enabled():
        return ""
    return "gradients are enabled; run under torch.no_grad() or torch.inference_mode()"
