"""Pictures of reports, with matplotlib, which only these need."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xquant_fx.errors import ArgumentError
from xquant_fx.evaluate.report import Quality, QualityReport

if TYPE_CHECKING:
    from xquant_fx.evaluate.needle import NeedleReport


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points that no other one equals or beats in both coordinates, by rising first coordinate."""
    front: list[int] = []
    for index in sorted(range(len(points)), key=lambda i: points[i]):
        if not front or points[index][1] < points[front[-1]][1]:
            front.append(index)
    return front


def plot_quality(report: QualityReport, path: str | Path) -> None:
    """KL against true bits with the Pareto front, and KL against depth, to an image file.

    Raises:
        ArgumentError: matplotlib is not installed.
    """
    figure, (by_bits, by_depth) = _subplots(2)
    _by_bits(by_bits, report.qualities)
    for quality in report.qualities:
        depths = quality.summary.depths
        by_depth.plot([(d.first + d.last) / 2 for d in depths], [d.kl for d in depths], "o-", label=quality.name)
    by_depth.set(xlabel="position in the window, tokens", ylabel="mean KL, nats")
    by_depth.legend(fontsize="small")
    figure.suptitle(report.title, fontsize="small")
    figure.savefig(path)


def _by_bits(axes: Any, qualities: Sequence[Quality]) -> None:
    points = [(q.size.true_bits, q.summary.kl) for q in qualities]
    for quality, (bits, kl) in zip(qualities, points, strict=True):
        axes.errorbar(bits, kl, yerr=quality.summary.kl_error, fmt="o")
        axes.annotate(quality.name, (bits, kl), textcoords="offset points", xytext=(5, 5), fontsize="small")
    axes.step(*zip(*(points[i] for i in pareto_front(points)), strict=True), "--", where="post", color="grey")
    if all(kl > 0 for _, kl in points):
        axes.set_yscale("log")
    axes.set(xlabel="true bits per element", ylabel="mean KL, nats")


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
