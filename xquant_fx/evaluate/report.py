"""``QualityReport``: what an evaluation found, as numbers and as tables."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from xquant_fx.evaluate.measures import Summary, paired
from xquant_fx.evaluate.size import Size
from xquant_fx.tables import render


@dataclasses.dataclass(frozen=True)
class Quality:
    """One setting: how far it moves the model, and what it stores."""

    name: str
    summary: Summary
    size: Size


@dataclasses.dataclass(frozen=True)
class QualityReport:
    """Settings beside full precision, all on the same windows; print it, or take its numbers."""

    title: str
    """Model, windows and way of measuring, for people."""
    qualities: list[Quality]
    refused: dict[str, str] = dataclasses.field(default_factory=dict)
    """Settings that the model cannot be run with, where these were to be left out, and why."""

    def __getitem__(self, name: str) -> Quality:
        """The setting called ``name``; raises KeyError where there is none."""
        return {quality.name: quality for quality in self.qualities}[name]

    def to_dict(self) -> dict[str, Any]:
        """All numbers, as JSON can hold them."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        names = [quality.name for quality in self.qualities]
        rows = [[row, *(cell(q) for q in self.qualities)] for row, cell in ROWS.items()]
        if len(names) > 1:
            rows.insert(1, [f"more than {names[0]}", *(self._more(q) for q in self.qualities)])
        tables = [self.title, render("next tokens", ["", *names], rows)]
        depths = zip(*(q.summary.depths for q in self.qualities), strict=True)
        by_depth = [[f"{each[0].first:,} to {each[0].last:,}", *(_number(d.kl) for d in each)] for each in depths]
        tables.append(render("mean KL by position", ["tokens before", *names], by_depth))
        return "\n".join(tables)

    def _more(self, quality: Quality) -> str:
        first = self.qualities[0]
        return "-" if quality is first else with_error(*paired(quality.summary, first.summary))


def _number(value: float) -> str:
    return f"{value:.4f}" if value < 10 else f"{value:.2f}"


def with_error(value: float, error: float | None, scale: float = 1.0, digits: int = 4) -> str:
    """``value ± error``, both times ``scale``."""
    spread = "" if error is None else f" ± {error * scale:.{digits}f}"
    return f"{value * scale:.{digits}f}{spread}"


def _kl(percent: str) -> Callable[[Quality], str]:
    return lambda q: _number(q.summary.kl_percentiles[percent])


#: Heading of a row to what stands in it, for one setting. A new row is a new entry.
ROWS: dict[str, Callable[[Quality], str]] = {
    "mean KL, nats": lambda q: with_error(q.summary.kl, q.summary.kl_error),
    "maximum KL": lambda q: _number(q.summary.kl_max),
    "99.9% KL": _kl("99.9"),
    "99% KL": _kl("99"),
    "90% KL": _kl("90"),
    "median KL": _kl("50"),
    "perplexity, full precision": lambda q: _number(q.summary.perplexity_full),
    "perplexity": lambda q: _number(q.summary.perplexity),
    "perplexity ratio": lambda q: f"{q.summary.perplexity / q.summary.perplexity_full:.4f}",
    "RMS change of p, %": lambda q: f"{100 * q.summary.p_rms:.3f}",
    "same top token, %": lambda q: with_error(q.summary.same_top, q.summary.same_top_error, 100, 2),
    "true bits per element": lambda q: f"{q.size.true_bits:.3f}",
    "bits per element, all bytes": lambda q: f"{q.size.bits:.3f}",
    "bytes at the end": lambda q: f"{q.size.bytes:,}",
    "times smaller": lambda q: f"{q.size.ratio:.2f}",
}
