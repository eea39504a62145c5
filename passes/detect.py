"""Detection: everything that is decided about one graph, decided once, on a clone of Dynamo's graph."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from torch._dynamo.utils import counters
from torch.fx import GraphModule, Node

from xquant_fx.cache.allocate import quantized_empty
from xquant_fx.passes.facts import Facts
from xquant_fx.passes.find_sites import NOT_RECOGNISED, Refusal, find_sites
from xquant_fx.passes.foresight import foresee
from xquant_fx.passes.in_place import why_not_in_place
from xquant_fx.passes.match_decode import match_decode
from xquant_fx.passes.match_folding import match_folding
from xquant_fx.passes.match_latent import match_latent
from xquant_fx.passes.normalize import normalize
from xquant_fx.passes.products import query_tokens
from xquant_fx.passes.records import Buffer, Decode, Detection, Site, Source, Write
from xquant_fx.passes.trace import fake, same_value
from xquant_fx.plan.plan import Plan
from xquant_fx.plan.spec import KVSpec, why_not_fused

#: The ordinary buffers of rewritable sites, a plan for each of their caches, and the specs of all buffers.
Planner = Callable[[GraphModule, list[Site]], tuple[tuple[Buffer, ...], tuple[Plan, ...], dict[Node, KVSpec]]]


def detect(gm: GraphModule, refusal: Refusal, planner: Planner, unfused: str = "") -> Detection:
    """What ``gm`` is found to be; ``gm`` is a clone of Dynamo's graph and is normalized in place.

    Args:
        refusal: why the surroundings of the graph, or the tensors of this call, keep an ordinary buffer as it is.
        planner: what quantized and ordinary buffers are, or are going to be.
        unfused: why no attention is fused in this compilation; "" if they may be.
    """
    counters["xquant"]["normalize"] += normalize(gm.graph)
    counters["xquant"]["detect"] += 1
    facts = Facts(gm.graph)
    sites = find_sites(facts, refusal)
    ordinary, plans, specs = planner(gm, sites)
    judged = tuple(_with_form(site, facts, specs, unfused) for site in sites)
    written = (*(mutation.root for mutation in facts.mutations), *(write.buffer for write in facts.writes))
    inputs = frozenset(node for node in written if node.op == "placeholder")
    foresights = {write.node: foresee(write, facts) for write in facts.writes if write.moves}
    return Detection(gm, judged, tuple(facts.writes), inputs, specs, ordinary, plans, foresights)


def _with_form(site: Site, facts: Facts, specs: dict[Node, KVSpec], unfused: str) -> Site:
    """``site`` with the call that it becomes, or why it reads dequantized keys and values."""
    allocates = any(node.target is quantized_empty for node in site.buffers)
    if not site.rewritable or allocates or _begins(site) or _attends_to_itself(site):
        return site
    reason, absorbed = unfused or _why_not_specs(site, specs), None
    if not site.attention.is_recognised:
        reason = f"it is appended to, {NOT_RECOGNISED}"
    elif site.is_latent and not unfused:
        found = match_latent(site.attention, *site.buffers, facts)
        reason, absorbed = (found, None) if isinstance(found, str) else (reason, found)
    form = reason or match_decode(site.attention, site.key, site.value, absorbed)
    if isinstance(form, Decode):
        form = _why_not_step(site, form, facts) or why_not_in_place(site, form, facts) or form
    if isinstance(form, str):
        return dataclasses.replace(site, dequantized=form)
    spec, write = specs[site.buffers[1]], site.value_write
    folds = spec.folded and write is not None and absorbed is None
    folding = match_folding(write, form, spec) if folds and write is not None else None
    return dataclasses.replace(site, form=form, folding=folding)


def _begins(site: Site) -> bool:
    """Whether the site is a prompt's, behind which a cache begins to grow: it runs as it stands."""
    return any(write is not None and write.begins for write in (site.key_write, site.value_write))


def _attends_to_itself(site: Site) -> bool:
    """Whether the site is that of a prompt which is longer than a sliding window, and attends to its own tokens."""
    slides = [write.slide for write in (site.key_write, site.value_write) if write is not None]
    return any(slide is not None and slide.is_prompt for slide in slides)


def _why_not_specs(site: Site, specs: dict[Node, KVSpec]) -> str:
    key, value = (specs.get(node) for node in site.buffers)
    if key is None or value is None:
        return "keys or values are not stored quantized"
    if (key.role, value.role) != ("key", "value"):
        return f"its keys are read from stored {key.role}s and its values from stored {value.role}s"
    return why_not_fused(key, value)


def _why_not_step(site: Site, form: Decode, facts: Facts) -> str:
    """Keys and values must be appended by one step, which brings the query's own tokens, and not again before."""
    key, value = site.key_write, site.value_write
    if key is None or value is None:
        return "keys and values are not appended in this graph"
    if any(getattr(fake(write.past), "is_tail", False) and not write.keep for write in (key, value)):
        return "the last tokens of a sliding window are kept, and all of them returned"
    if key.tokens != value.tokens:
        return "keys and values are not written by one step"
    if not isinstance(key.tokens, int):
        return "the number of new tokens is dynamic"
    if key.tokens != query_tokens(site.attention):
        return "the query has another length than the step"
    if not same_value(key.positions, value.positions):
        return "keys and values are written at different positions"
    sides = [(site.key, site.attention.key_reader, key), (site.value, site.attention.value_reader, value)]
    if form.absorbed is not None:
        rotary, reader = form.absorbed.rotary_read
        sides = [(facts.source(rotary), reader, key)]
        sides += [(facts.source(p.x), p.linear, value) for p in (form.absorbed.key, form.absorbed.value)]
    return next(filter(None, (_why_not_order(*side, form, facts) for side in sides)), "")


def _why_not_order(source: Source, attends: Node, write: Write, form: Decode, facts: Facts) -> str:
    read_at = facts.order[source.reader or attends]
    if read_at < facts.order[write.node]:
        return "the cache is read before it is appended to"
    between = (facts.order[w.node] for w in facts.writes_to(source.root))
    if any(read_at < other < facts.order[form.output] for other in between):
        return "the cache is appended to once more before the attention"
    return ""
