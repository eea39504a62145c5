"""Sliding windows that a quantized layer would keep in full precision anyhow: they stay, and nothing is amiss."""

from __future__ import annotations

import dataclasses

from torch.fx import Node

from xquant_fx.compiler.options import Request
from xquant_fx.passes.facts import Facts
from xquant_fx.passes.records import Detection, Site
from xquant_fx.passes.why_left_alone import window_tokens
from xquant_fx.plan.windows import full_precision_tokens, why_not_window, why_short


def note_short_windows(found: Detection, request: Request) -> Detection:
    """``found``, with sites whose window is within the residual window counted so: ``strict`` does not mind them."""
    held = max((s.residual_length + s.rollback_tokens for s in found.specs.values()), default=0)
    held = held or full_precision_tokens(request.effective)
    return dataclasses.replace(found, sites=tuple(_noted(site, held) for site in found.sites))


def why_not_sliding_window(node: Node, facts: Facts, request: Request) -> str:
    """Why the sliding window ``node``, a buffer or what grows, stays as it is; "" if it does not, or if it is none."""
    tokens = window_tokens(node, facts)
    if not tokens:
        return ""
    keys = {facts.source(attention.key).root for attention in facts.attention}
    caches = [root for root in keys if facts.growth(root) is not None or facts.writes_to(root)]
    others = sum(not window_tokens(root, facts) for root in caches)
    return why_not_window(tokens, others, request.effective)


def _noted(site: Site, held: int) -> Site:
    if not (site.stays_ordinary or site.allocated_here) or not site.window_tokens:  # or would, at the next step
        return site
    reason = why_short(site.window_tokens, held)
    return dataclasses.replace(site, reason=reason, is_short_window=True) if reason else site
