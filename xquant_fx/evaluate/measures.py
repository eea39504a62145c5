"""Next-token distributions beside those of full precision: per position, then over all windows."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

#: Positions at a time: bounds what fp64 distributions over a vocabulary take.
ROWS = 32
PERCENTILES = (50.0, 90.0, 99.0, 99.9)


@dataclasses.dataclass(frozen=True)
class Measured:
    """The measured positions of one window, one entry per position in each list."""

    position: list[int]
    """Index of the token that was read, in the window."""
    kl: list[float]
    """KL(full precision || quantized) of the next token, in nats."""
    nll_full: list[float]
    """Minus the log probability of the true next token in full precision, in nats."""
    nll: list[float]
    same_top: list[int]
    """1 where both have their maximum at the same token."""


def measure(full: Tensor, other: Tensor, targets: Tensor, positions: Tensor) -> Measured:
    """Compare logits [n, V] at ``positions`` with those of full precision; ``targets`` int64 [n] are what came next."""
    rows: list[Tensor] = []
    for i in range(0, len(targets), ROWS):
        log_p, log_q = (x[i : i + ROWS].double().log_softmax(-1) for x in (full, other))
        p, true = log_p.exp(), targets[i : i + ROWS, None]
        kl = torch.where(p > 0, p * (log_p - log_q), 0.0).sum(-1).clamp_min(0.0)
        same = (log_p.argmax(-1) == log_q.argmax(-1)).double()
        rows.append(torch.stack([kl, -log_p.gather(-1, true)[:, 0], -log_q.gather(-1, true)[:, 0], same]))
    kls, nll_full, nll, top = torch.cat(rows, 1).tolist()
    return Measured(positions.tolist(), kls, nll_full, nll, [int(x) for x in top])


@dataclasses.dataclass(frozen=True)
class Depth:
    """A part of the positions of all windows."""

    first: int
    last: int
    """Positions in the window, both included."""
    kl: float
    """Mean over positions, in nats."""
    same_top: float
    """Share of positions, 0 to 1."""


@dataclasses.dataclass(frozen=True)
class Summary:
    """Statistics over all measured positions of all windows."""

    windows: int
    positions: int
    kl: float
    """Mean KL divergence in nats."""
    kl_error: float | None
    """Standard error of the mean, over windows; None for one window."""
    kl_windows: list[float]
    """Mean KL of each window."""
    kl_percentiles: dict[str, float]
    """Percent of positions to the KL that they do not exceed."""
    kl_max: float
    perplexity_full: float
    perplexity: float
    p_rms: float
    """Root mean square change of the probability of the true token, 0 to 1."""
    same_top: float
    """Share of positions with the same most likely token, 0 to 1."""
    same_top_error: float | None
    """Standard error over windows."""
    depths: list[Depth]


def summarize(windows: Sequence[Measured], bins: int = 4) -> Summary:
    """Statistics of windows of one length; ``bins`` parts of equal length go by position."""
    kl, full, nll, top = (
        torch.tensor([getattr(w, name) for w in windows], dtype=torch.float64)
        for name in ("kl", "nll_full", "nll", "same_top")
    )
    percents = torch.tensor(PERCENTILES, dtype=torch.float64) / 100
    reached = kl.flatten().quantile(percents).tolist()
    change = torch.exp(-nll) - torch.exp(-full)
    return Summary(
        windows=len(windows), positions=kl.numel(), kl=kl.mean().item(), kl_error=_error(kl),
        kl_windows=kl.mean(1).tolist(),
        kl_percentiles={f"{p:g}": value for p, value in zip(PERCENTILES, reached, strict=True)},
        kl_max=kl.max().item(), perplexity_full=math.exp(full.mean().item()), perplexity=math.exp(nll.mean().item()),
        p_rms=change.square().mean().sqrt().item(), same_top=top.mean().item(), same_top_error=_error(top),
        depths=_depths(windows[0].position, kl, top, bins),
    )  # fmt: skip


def paired(ours: Summary, theirs: Summary) -> tuple[float, float | None]:
    """(how much larger our mean KL is, its standard error): by windows, so that what they have in common falls out."""
    apart = torch.tensor([ours.kl_windows, theirs.kl_windows], dtype=torch.float64)
    difference = (apart[0] - apart[1])[:, None]
    return difference.mean().item(), _error(difference)


def _error(values: Tensor) -> float | None:
    """Standard error of the mean over windows of ``values`` [windows, positions]."""
    windows = len(values)
    return values.mean(1).std().item() / math.sqrt(windows) if windows > 1 else None


def _depths(position: list[int], kl: Tensor, top: Tensor, bins: int) -> list[Depth]:
    count, bins = len(position), min(bins, len(position))
    edges = [count * i // bins for i in range(bins + 1)]
    return [
        Depth(position[a], position[b - 1], kl[:, a:b].mean().item(), top[:, a:b].mean().item())
        for a, b in itertools.pairwise(edges)
    ]
