"""``sweep_report``: what the fields of a setting cost and save, one at a time or in all combinations."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import Tensor

from xquant_fx.errors import ConfigError
from xquant_fx.evaluate.measures import paired
from xquant_fx.evaluate.pareto import pareto_front
from xquant_fx.evaluate.quality import Reading, quality_report
from xquant_fx.evaluate.report import Quality, QualityReport, with_error
from xquant_fx.evaluate.results import Results
from xquant_fx.evaluate.settings import Setting
from xquant_fx.evaluate.sweep import Grid, sweep
from xquant_fx.plan.config import XQuantConfig
from xquant_fx.tables import render

COLUMNS = ("setting", "true bits", "bits, all bytes", "mean KL, nats", "more than the base", "same top token, %")
NOTE = (
    "* no other setting has fewer of these bits and a smaller KL (the Pareto front).\n"
    "All bytes have windows and sinks in them, in the dtype of the model: with --dtype bfloat16 as they are in use."
)


@dataclasses.dataclass(frozen=True)
class SweepReport:
    """Settings of a sweep, the base first, all on the same windows."""

    report: QualityReport
    """All that is measured of each setting that can be run."""
    refused: dict[str, str]
    """Every other combination and the rule that it breaks: of the config, or of the config on this model."""

    @property
    def true_front(self) -> list[str]:
        """Names of the settings on the Pareto front of KL and true bits."""
        return self._front([q.size.true_bits for q in self.report.qualities])

    @property
    def front(self) -> list[str]:
        """Names of the settings on the Pareto front of KL and the bits that all bytes come to."""
        return self._front([q.size.bits for q in self.report.qualities])

    def to_dict(self) -> dict[str, Any]:
        """All numbers, as JSON can hold them."""
        fronts = {"true_front": self.true_front, "front": self.front}
        return {"report": self.report.to_dict(), "refused": self.refused, **fronts}

    def __str__(self) -> str:
        rows = [self._row(quality) for quality in self.report.qualities]
        tables = [self.report.title, render("sweep", list(COLUMNS), rows, NOTE)]
        if self.refused:
            tables.append(render("not possible", ["setting", "why"], [list(each) for each in self.refused.items()]))
        return "\n".join(tables)

    def _front(self, bits: list[float]) -> list[str]:
        qualities = self.report.qualities
        points = [(b, q.summary.kl) for b, q in zip(bits, qualities, strict=True)]
        return [qualities[i].name for i in pareto_front(points)]

    def _row(self, quality: Quality) -> list[str]:
        base, summary = self.report.qualities[0], quality.summary
        more = "-" if quality is base else with_error(*paired(summary, base.summary))
        return [
            quality.name,
            f"{quality.size.true_bits:.3f}{_star(quality.name in self.true_front)}",
            f"{quality.size.bits:.3f}{_star(quality.name in self.front)}",
            with_error(summary.kl, summary.kl_error),
            more,
            with_error(summary.same_top, summary.same_top_error, 100, 2),
        ]


def _star(on_front: bool) -> str:
    return " *" if on_front else "  "


def sweep_report(
    model: Any,
    windows: Tensor,
    base: Setting | XQuantConfig,
    *grids: Grid,
    reading: Reading | None = None,
    out: str | None = None,
    progress: bool = False,
) -> SweepReport:
    """Measure a setting with other values in some of its fields.

    Args:
        model: a Hugging Face model in eval mode.
        windows: int64 token ids [windows, T].
        base: config that all other fields are taken from; it is measured, too, as the first.
        grids: field to values. The fields of one grid are combined; several grids are measured one after the other.
        reading: as of ``quality_report``.
        out: JSON file for all numbers, with which a later run goes on, of a sweep or of ``quality_report``.
        progress: show a bar.

    Raises:
        ConfigError: no such field, no values, or the model cannot be run with the base. Any other combination that
            breaks a rule is a row of the report.
        ArgumentError: as of ``quality_report``.
    """
    base = base if isinstance(base, Setting) else Setting("base", base)
    settings, refused = sweep(base, *grids)
    given: dict[str, Any] = dict(reading=reading, out=out, progress=progress)
    report = quality_report(model, windows, settings, skip_invalid=True, **given)
    if base.name in report.refused:
        raise ConfigError(f"{base.name}: {report.refused[base.name]}")
    found = SweepReport(report, {**refused, **report.refused})
    written = [{field: list(map(str, values)) for field, values in grid.items()} for grid in grids]
    Results(out).write({**found.to_dict(), "grids": written})
    return found
