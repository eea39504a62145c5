"""How far to relax a group's range: eta (XQuant, Eq. 5) by the group's size, for numbers that are Gaussian.

The range of a group grows with its size, so codes by range stretch more the larger it is: one eta does not serve all.
With x the group, t its levels (codes - n / 2, n = 2**bits - 1) and step = (max x - min x) / n, what is read is
mid + (1 - 2 eta) step t. Two etas are derived, with the means over all groups of one size:

    without bias     (1 - 2 eta)    = E[sum (x - mean x)**2] / E[step sum (t - mean t)(x - mean x)]
    keeping spread   (1 - 2 eta)**2 = E[sum (x - mean x)**2] / E[step**2 sum (t - mean t)**2]

Values want the first: attention averages over tokens, where noise falls and a stretch does not. Keys want the second
(``reference.kept_spread``; docs/quality.md). The means are integrals over the group's least and largest number, given
which all others are independent Gaussians cut off at both.
"""

from __future__ import annotations

import functools
import itertools
import math
from typing import NamedTuple

import torch
from torch import Tensor

#: Points of each axis, and how far they reach, in standard deviations.
POINTS, REACH = 128, 8.0


@functools.cache
def unbiased_eta(group: int, bits: int) -> float:
    """The eta at which codes of ``bits`` bits by the range of ``group`` Gaussian numbers have no bias, at least 0."""
    aligned, _ = _moments(group, bits)
    return _eta((group - 1) / aligned) if aligned > 0 else 0.0


@functools.cache
def spread_eta(group: int, bits: int) -> float:
    """The eta at which they spread as the numbers do, at least 0."""
    _, square = _moments(group, bits)
    return _eta(math.sqrt((group - 1) / square)) if square > 0 else 0.0


def _eta(factor: float) -> float:
    return max((1 - factor) / 2, 0.0)


def _moments(group: int, bits: int) -> tuple[float, float]:
    """E[step sum (t - mean t)(x - mean x)] and E[step**2 sum (t - mean t)**2]; zeros for a group of one number."""
    if group < 2:
        return 0.0, 0.0
    n, rest = 2**bits - 1, group - 2
    width = (torch.arange(POINTS, dtype=torch.float64) + 0.5) * (2 * REACH / POINTS)
    mid = ((torch.arange(POINTS, dtype=torch.float64) + 0.5) / POINTS - 0.5) * (2 * REACH)
    low, high = mid[:, None] - width / 2, mid[:, None] + width / 2
    between = _below(high) - _below(low)
    weight = _density(low) * _density(high) * between.clamp_min(1e-300) ** rest
    step = width / n
    m = _inner(low, step, n, between.clamp_min(1e-300))
    # The least has level -n / 2, the largest n / 2: their levels cancel, their numbers sum to 2 mid.
    tx = n / 2 * width + rest * m.tx - rest * m.t * (2 * mid[:, None] + (rest - 1) * m.x) / group - rest * m.tx / group
    tt = n * n / 2 + rest * m.tt - (rest * m.tt + rest * (rest - 1) * m.t**2) / group
    aligned, square = (float((weight * y).sum() / weight.sum()) for y in (step * tx, step**2 * tt))
    return aligned, square


class _Inner(NamedTuple):
    """Means over a number between the least and the largest: of x, its level t, and their products."""

    x: Tensor
    t: Tensor
    tx: Tensor
    tt: Tensor


def _inner(low: Tensor, step: Tensor, n: int, between: Tensor) -> _Inner:
    # Code k takes what lies within half a step of low + k step, the first and last code half as much.
    edges = [low, *(low + (k + 0.5) * step for k in range(n)), low + n * step]
    share = [(_below(b) - _below(a)) / between for a, b in itertools.pairwise(edges)]
    first = [(_density(a) - _density(b)) / between for a, b in itertools.pairwise(edges)]
    levels = [k - n / 2 for k in range(n + 1)]
    x = torch.stack(first).sum(0)
    t, tx = (sum((lv * y for lv, y in zip(levels, ys, strict=True)), torch.zeros(())) for ys in (share, first))
    tt = sum((lv * lv * y for lv, y in zip(levels, share, strict=True)), torch.zeros(()))
    return _Inner(x, t, tx, tt)


def _below(x: Tensor) -> Tensor:
    return torch.special.ndtr(x)


def _density(x: Tensor) -> Tensor:
    return torch.exp(-x * x / 2) / math.sqrt(2 * math.pi)
