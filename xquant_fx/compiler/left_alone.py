"""Telling people what stays in full precision: a warning for each reason, an error under ``strict``."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from xquant_fx.compiler.options import Request
from xquant_fx.errors import NotRewrittenError
from xquant_fx.passes.records import Site
from xquant_fx.warn_once import warn_once

log = logging.getLogger(__name__)

#: What a reason begins with that a self-check found.
CHECKED = "self_check: "


def report_left(sites: tuple[Site, ...], request: Request) -> None:
    """Log every site; warn once per reason, or raise under strict, where a KV cache is left alone."""
    for number, site in enumerate(sites):
        kind, name = site.attention.kind, site.buffer_name
        log.info("attention %d (%s, %s): %s", number, kind, name, site.reason or "quantized")
        if site.rewritable and site.dequantized:
            log.info("attention %d (%s) reads dequantized keys and values: %s", number, name, site.dequantized)
    report_buffers([(site.buffer_name, site.reason) for site in sites if site.stays_ordinary], request)


def report_unfused(sites: tuple[Site, ...], request: Request) -> None:
    """Warn once, or raise under strict, where a self-check gave up a fused attention."""
    found = [(site.buffer_name, site.dequantized) for site in sites if site.dequantized.startswith(CHECKED)]
    if found and request.strict:
        lines = "\n".join(f"  {name}: {reason}" for name, reason in found)
        raise NotRewrittenError(f"strict=True: {len(found)} attention(s) are rewritten to something else:\n{lines}")
    for name, reason in found:
        warn_once(f"the attention over {name} reads dequantized keys and values: {reason}", key=f"{CHECKED}{name}")


def report_uncompiled(names: Sequence[str], reason: str, request: Request) -> None:
    """Warn once, or raise under strict: a graph of quantized buffers runs as the program has it, op by op."""
    message = f"the steps of a quantized cache ({names[0]} and {len(names) - 1} more) run uncompiled: {reason}"
    if request.strict:
        raise NotRewrittenError(f"strict=True: {message}")
    warn_once(message, key=f"{CHECKED}{names}")


def report_buffers(left: Sequence[tuple[str, str]], request: Request) -> None:
    """Warn once per reason, or raise under strict; ``left`` has names of KV caches and why they are left alone.

    Raises:
        NotRewrittenError: under ``strict``, if there are any.
    """
    if left and request.strict:
        lines = "\n".join(f"  {name}: {reason}" for name, reason in left)
        raise NotRewrittenError(f"strict=True: {len(left)} KV cache(s) are not quantized:\n{lines}")
    for name, reason in left:
        warn_once(f"KV cache {name} stays in full precision: {reason}", key=reason)
