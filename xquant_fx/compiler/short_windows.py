"""Sliding windows that a quantized layer would keep in full precision anyhow: they stay, and nothing is amiss."""

from __future__ import annotations

import dataclasses

from xquant_fx.compiler.options import Request
from xquant_fx.passes.records import Detection, Site
from xquant_fx.plan.windows import full_precision_tokens, why_short


def note_short_windows(found: Detection, request: Request) -> Detection:
    """``found``, with sites whose window is within the residual window counted so: ``strict`` does not mind them."""
    held = max((s.residual_length + s.rollback_tokens for s in found.specs.values()), default=0)
    held = held or full_precision_tokens(request.effective)
    return dataclasses.replace(found, sites=tuple(_noted(site, held) for site in found.sites))


def _noted(site: Site, held: int) -> Site:
    if not site.stays_ordinary or not site.window_tokens:
        return site
    reason = why_short(site.window_tokens, held)
    return dataclasses.replace(site, reason=reason, is_short_window=True) if reason else site
