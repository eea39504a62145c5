"""What the KV buffers of a graph are, or are going to be: the plans of those that are taken over, and all specs."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from xquant_fx.cache.allocate import Geometry, Slot, bind_all, quantized_empty
from xquant_fx.cache.growing import STORED_KV
from xquant_fx.cache.growth import first_room, with_lasting_room
from xquant_fx.compiler.dynamo_frames import is_partial
from xquant_fx.compiler.options import Request
from xquant_fx.compiler.proof import Call
from xquant_fx.compiler.stacks import numbered, stack_of
from xquant_fx.passes.facts import is_quantized_growth
from xquant_fx.passes.find_sites import buffer_name
from xquant_fx.passes.find_writes import concatenation
from xquant_fx.passes.records import Buffer, Site, Write
from xquant_fx.passes.trace import at_hand, fake, value_of
from xquant_fx.plan.config import XQuantConfig
from xquant_fx.plan.plan import Plan, make_plan
from xquant_fx.plan.spec import KVSpec, Role
from xquant_fx.warn_once import warn_once

#: Lengths of caches that are many, if each is compiled for.
MANY_LENGTHS = 3


def plan_graph(
    gm: GraphModule, sites: list[Site], request: Request, call: Call
) -> tuple[tuple[Buffer, ...], tuple[Plan, ...], dict[Node, KVSpec]]:
    """The ordinary buffers of ``sites``, a plan for each of their caches, and the specs of all buffers of ``gm``."""
    specs = _existing(gm)
    buffers = _ordinary(gm, sites, call, is_together=_names_layers(request.effective))
    plans = []
    for group in range(1 + max((buffer.group for buffer in buffers), default=-1)):
        members = [buffer for buffer in buffers if buffer.group == group]
        plans.append(make_plan(_settings(gm, request), 1 + max(buffer.layer for buffer in members)))
        bound = bind_buffers(plans[-1], members, [value_of(buffer.node) for buffer in members])
        specs.update(zip((buffer.node for buffer in members), bound, strict=True))
    return buffers, tuple(plans), specs


def bind_buffers(plan: Plan, buffers: Sequence[Buffer], tensors: Sequence[Tensor]) -> list[KVSpec]:
    """Specs of ``buffers``, which hold ``tensors`` [B, H, N, D]."""
    pairs = zip(buffers, tensors, strict=True)
    bound = bind_all(plan, [(b.layer, b.role, geometry_of(b, t)) for b, t in pairs])
    grows = [buffer.write.past is not None for buffer in buffers]
    return [with_lasting_room(spec, spec.shape[2]) if one else spec for spec, one in zip(bound, grows, strict=True)]


def geometry_of(buffer: Buffer, tensor: Tensor, any_room: bool = False) -> Geometry:
    """Of the stored tensors; what grows by concatenation gets room to grow, less where graphs are of ``any_room``."""
    batch, heads, tokens, dim = tensor.shape
    if buffer.write.past is not None:
        held = tokens if isinstance(tokens, int) else tokens.node.hint
        tokens = first_room(held, any_room)
    shape = (batch, heads, tokens, dim)
    return Geometry(shape, tensor.dtype, buffer.rotary, buffer.write.window, buffer.write.per_row)


def _ordinary(gm: GraphModule, sites: list[Site], call: Call, is_together: bool) -> tuple[Buffer, ...]:
    """Ordinary buffers that can be taken over, numbered in layer order within their cache (sites may share a layer's).

    With ``is_together`` all are layers of one cache: the settings name each.
    """
    index = {n: i for i, n in enumerate(gm.graph.find_nodes(op="placeholder"))}
    layers = _layers(sites)
    rotary = {site.key.root for site in sites if site.key_is_rotary}
    writes = {w.buffer: w for site in sites for w in (site.key_write, site.value_write) if w is not None}
    firsts = [next(iter(layer)) for layer in layers]
    stacks = [_stack(list(layer), writes[first], is_together) for layer, first in zip(layers, firsts, strict=True)]
    groups = numbered(_with_slides(stacks, [_begin(writes[first], call) for first in firsts]))
    found = []
    for number, (buffers, group) in enumerate(zip(layers, groups, strict=True)):
        layer = groups[:number].count(group)
        for node, role in buffers.items():
            foresight = call.foresight_of(writes[node])
            at = index.get(node)
            found.append(Buffer(node, at, layer, role, writes[node], group, foresight, node in rotary))
    return tuple(found)


def _layers(sites: list[Site]) -> list[dict[Node, Role]]:
    """The ordinary buffers of each layer with their roles; a site that brings none of its own reads another layer's.

    A site that shares its keys or its values with one before it, or computes both from one latent, brings one buffer.
    """
    layers: list[dict[Node, Role]] = []
    known: set[Node] = set()
    for site in sites:
        if site.rewritable and not site.is_quantized:
            # As values where it is both: a latent's channels are no keys' (docs/quality.md).
            roles: dict[Node, Role] = {site.key.root: "key"}
            roles[site.value.root] = "value"
            layers.append({node: role for node, role in roles.items() if node not in known})
            known.update(roles)
    return [layer for layer in layers if layer]


def _stack(layer: list[Node], write: Write, is_together: bool) -> str:
    """What the program keeps the buffers of a layer in. A prompt's are kept nowhere yet, and taken for one cache's."""
    return "" if is_together or write.begins else stack_of(buffer_name(layer[0]), buffer_name(layer[-1]))


def _with_slides(stacks: list[str], begins: list[object]) -> list[tuple[str, object]]:
    """What tells the cache of each layer. Windows that move (None) say nothing of where: they go with their stack."""
    others = {stack: begin for stack, begin in zip(stacks, begins, strict=True) if begin is not None}
    return [(stack, others.get(stack) if begin is None else begin) for stack, begin in zip(stacks, begins, strict=True)]


def _begin(write: Write, call: Call) -> object:
    """Where the layers of one cache append, all of them; None of a window that moves."""
    if write.slide is not None:
        return None
    if write.past is None:
        return call.first_position(write)
    held = 0 if write.begins else value_of(write.past).shape[2]  # a symbol per buffer, where Dynamo leaves it open
    return f"behind {held if at_hand(held) is None else at_hand(held)} tokens, {write.tokens} of them"


def _names_layers(settings: XQuantConfig | Plan) -> bool:
    """Whether the settings say something of each layer, so that layers are counted through."""
    return isinstance(settings, Plan) or isinstance(settings.k_bits, tuple) or isinstance(settings.v_bits, tuple)


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
            like, _, lower, _, slot = node.args[:5]
            below = specs.get(lower) if isinstance(lower, Node) else None
            specs[node] = Slot.from_json(slot).bind(value_of(like), at_hand(value_of(node).shape[2]) or 0, below)
    return specs


def _settings(gm: GraphModule, request: Request) -> XQuantConfig | Plan:
    """The settings of ordinary buffers: no sharing where only some layers can be seen."""
    settings = request.effective
    if not is_partial(gm) or isinstance(settings, Plan):
        return settings
    alone = without_sharing(settings)
    if alone != settings:
        warn_once("a graph break hides the other layers: no layer reads another's codes; an XQuantCache pairs them")
    return alone


def without_sharing(settings: XQuantConfig | Plan) -> XQuantConfig | Plan:
    """What becomes of ``settings`` where a graph break hides the other layers; a plan names them itself."""
    return settings if isinstance(settings, Plan) else settings.replace(share_keys_from=None, share_values_from=None)


_lengths: dict[str, set[int]] = {}


def warn_of_lengths(specs: Sequence[KVSpec]) -> None:
    """Warn where caches that differ in nothing but their length are compiled for again and again."""
    alike = repr([dataclasses.replace(spec, shape=(*spec.shape[:2], 0, spec.shape[3])) for spec in specs])
    lengths = _lengths.setdefault(alike, set())
    lengths.update(spec.shape[2] for spec in specs)
    if len(lengths) >= MANY_LENGTHS:
        warn_once(
            f"caches of {len(lengths)} lengths, {sorted(lengths)}: every max_cache_len is compiled anew, and Dynamo "
            "stops compiling after some; make caches of one length, or reset() one cache",
            key="lengths of caches",
        )


def why_not_layers(gm: GraphModule, request: Request) -> str:
    """Why settings that differ by layer cannot be used for the ordinary buffers of ``gm``."""
    settings = request.effective
    if not is_partial(gm):
        return ""
    if isinstance(settings, Plan):
        return "a plan names every layer and a graph break hides the number of layers; use an XQuantCache"
    if _names_layers(settings):
        return "bits are given per layer and a graph break hides the number of layers; use an XQuantCache"
    return ""


def why_not_gradients() -> str:
    """Why nothing is taken over while gradients are recorded."""
    if not torch.is_grad_enabled():
        return ""
    return "gradients are enabled; run under torch.no_grad() or torch.inference_mode()"
