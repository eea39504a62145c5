"""The table that ``explain`` prints: one row per column. A new column is a new row of ``COLUMNS``."""

from __future__ import annotations

import re
from collections.abc import Callable

from xquant_fx.reports.sites import Site
from xquant_fx.tables import render


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:,}"


def _eta(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _short(name: str) -> str:
    """The end of a source expression: ``layers[3].keys`` of ``L['kwargs']['past_key_values'].layers[3].keys``."""
    parts = re.split(r"\.(?![^\[]*\])", name)
    return ".".join(parts[-2:]) if len(parts) > 2 or len(name) > 30 else name


def _reason(site: Site) -> str:
    parts = [site.reason]
    if site.dequantized:
        parts.append(f"read dequantized: {site.dequantized}")
    return "; ".join([*parts, *site.notes])


#: Heading to what stands below it.
COLUMNS: dict[str, Callable[[Site], str]] = {
    "layer": lambda site: _number(site.layer),
    "buffer": lambda site: _short(site.name),
    "write": lambda site: site.write,
    "read": lambda site: site.read.replace("scaled_dot_product_attention", "sdpa"),
    "rewritten": lambda site: "yes" if site.rewritten else "no",
    "K bits": lambda site: _number(site.k_bits),
    "V bits": lambda site: _number(site.v_bits),
    "eta of K, V": lambda site: f"{_eta(site.k_eta)}, {_eta(site.v_eta)}",
    "codes of": lambda site: _number(site.partner),
    "bytes": lambda site: _number(site.bytes),
    "reason": _reason,
}


def table(sites: list[Site], graphs: int) -> str:
    """The table as text, with what it sums up to below."""
    rows = [[cell(site) for cell in COLUMNS.values()] for site in sites]
    done = sum(site.rewritten for site in sites)
    note = f"{done} of {len(sites)} attention sites rewritten, in {graphs} graph(s)"
    return render("xquant", list(COLUMNS), rows, note)
