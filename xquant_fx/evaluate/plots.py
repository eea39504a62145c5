"""Pictures of reports, with matplotlib, which only these need."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xquant_fx.errors import ArgumentError
from xquant_fx.evaluate.pareto import pareto_front
from xquant_fx.evaluate.report import Quality, QualityReport
from xquant_fx.evaluate.size import Size

if TYPE_CHECKING:
    from xquant_fx.evaluate.needle import NeedleReport
    from xquant_fx.evaluate.sweep_report import SweepReport

TRUE_BITS, ALL_BYTES = "true bits per element", "bits per element, all bytes"
BITS: dict[str, Callable[[Size], float]] = {TRUE_BITS: lambda size: size.true_bits, ALL_BYTES: lambda size: size.bits}


def plot_quality(report: QualityReport, path: str | Path) -> None:
    """KL against true bits with the Pareto front, and KL against depth, to an image file.

    Raises:
        ArgumentError: matplotlib is not installed.
    """
    figure, (by_bits, by_depth) = _subplots(2)
    _by_bits(by_bits, report.qualities, TRUE_BITS)
    for quality in report.qualities:
        depths = quality.summary.depths
        by_depth.plot([(d.first + d.last) / 2 for d in depths], [d.kl for d in depths], "o-", label=quality.name)
    by_depth.set(xlabel="position in the window, tokens", ylabel="mean KL, nats")
    by_depth.legend(fontsize="small")
    figure.suptitle(report.title, fontsize="small")
    figure.savefig(path)


def plot_sweep(report: SweepReport, path: str | Path) -> None:
    """KL against true bits, and against the bits that all bytes come to, each with its front, to an image file.

    Raises:
        ArgumentError: matplotlib is not installed.
    """
    figure, panels = _subplots(2)
    for axes, label in zip(panels, (TRUE_BITS, ALL_BYTES), strict=True):
        _by_bits(axes, report.report.qualities, label, names=False)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize="small")
    figure.suptitle(report.report.title, fontsize="small")
    figure.savefig(path)


def _by_bits(axes: Any, qualities: Sequence[Quality], label: str, names: bool = True) -> None:
    """Points with their front; ``names`` beside them, or else for a legend."""
    points = [(BITS[label](q.size), q.summary.kl) for q in qualities]
    for quality, (bits, kl) in zip(qualities, points, strict=True):
        axes.errorbar(bits, kl, yerr=quality.summary.kl_error, fmt="o", label=quality.name)
        if names:
            axes.annotate(quality.name, (bits, kl), textcoords="offset points", xytext=(5, 5), fontsize="small")
    axes.step(*zip(*(points[i] for i in pareto_front(points)), strict=True), "--", where="post", color="grey")
    if all(kl > 0 for _, kl in points):
        axes.set_yscale("log")
    axes.set(xlabel=label, ylabel="mean KL, nats")


def plot_needle(report: NeedleReport, path: str | Path) -> None:
    """A heat map per setting of the answers found, to an image file.

    Raises:
        ArgumentError: matplotlib is not installed.
    """
    figure, all_axes = _subplots(len(report.found))
    for axes, (name, shares) in zip(all_axes, report.found.items(), strict=True):
        axes.imshow(shares, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
        axes.set(title=name, xlabel="tokens", ylabel="depth, %")
        axes.set_xticks(range(len(report.lengths)), [f"{length:,}" for length in report.lengths])
        axes.set_yticks(range(len(report.depths)), [f"{100 * depth:.0f}" for depth in report.depths])
    figure.suptitle(report.title, fontsize="small")
    figure.savefig(path)


def _subplots(count: int) -> tuple[Any, Sequence[Any]]:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ArgumentError("a plot needs matplotlib: pip install 'xquant-fx[eval]'") from error
    figure = Figure(figsize=(5.5 * count, 4.5), dpi=120, layout="constrained")
    return figure, figure.subplots(1, count, squeeze=False)[0]
