"""What each group of layers, and each side of it, costs in quality at each width, everything else in full precision.

Small errors of independent sources add up in KL, so these losses, summed over groups and sides, predict that of a whole
plan. Only some widths are measured; between and beyond them the logarithm of the loss follows that of a quantizer's
distortion (``kernels/widths.py``). A group that stands out is taken apart, so that single layers may get more bits, or
be left in full precision.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import NamedTuple, get_args

from torch import Tensor

from xquant_fx.errors import ConfigError
from xquant_fx.evaluate.probe import FULL, Probe, Width
from xquant_fx.kernels.packing import WORD_BITS
from xquant_fx.kernels.schemes import SCHEMES
from xquant_fx.kernels.widths import DISTORTION
from xquant_fx.plan.spec import Role

#: Most groups of layers that are measured at first.
GROUPS = 10
#: Widths that an allocation may use beside full precision, where a scheme and head_dim allow them.
WIDTHS = (1, 1.5, 2, 2.5, 3, 4)
#: Of those the ones that are measured; the others are derived.
MEASURED: dict[Role, tuple[float, ...]] = {"key": (1, 2, 3), "value": (1, 2)}
#: A group that makes more than this share of what its side of all layers loses is measured layer by layer.
STANDS_OUT = 0.25
#: No loss is taken for less, in nats: what rounding makes.
LEAST = 1e-9

#: Told of every measurement to come or made, so that a bar can be shown.
Progress = Callable[[int], None]


@dataclasses.dataclass(frozen=True)
class Item:
    """One side of some neighbouring layers, which get one width."""

    role: Role
    first: int
    """Number of the lowest layer, over quantized ones."""
    last: int
    """Of the highest, included."""

    @property
    def layers(self) -> range:
        """Numbers of the layers."""
        return range(self.first, self.last + 1)


def items_of(layers: int) -> list[Item]:
    """Both sides of at most ``GROUPS`` groups, lowest layers first: of one layer, or of whole pairs.

    Pairs (0, 1), (2, 3), ... are what may share codes. Groups are of equal size, as near as that goes.
    """
    size = 1 if layers <= GROUPS else 2
    units = math.ceil(layers / size)
    count = min(GROUPS, units)
    edges = [min(size * (units * i // count), layers) for i in range(count + 1)]
    return [Item(role, a, b - 1) for a, b in itertools.pairwise(edges) for role in get_args(Role)]


def widths_of(role: Role, scheme: str, dim: int) -> tuple[float, ...]:
    """Widths of ``WIDTHS`` that ``scheme`` stores at head_dim ``dim`` without padding in its words."""
    allowed = [bits for bits in WIDTHS if bits in SCHEMES[scheme].BITS]
    return tuple(b for b in allowed if role == "value" or scheme != "per_channel_ranked" or b * dim % WORD_BITS == 0)


def distortion(bits: float) -> float:
    """Mean squared error of a quantizer of ``bits`` bits on a unit Gaussian; between whole bits by its logarithm."""
    low = math.floor(bits)
    return math.exp(_line(bits, low, math.log(DISTORTION[low]), low + 1, math.log(DISTORTION[low + 1])))


def filled_in(measured: dict[float, float], widths: tuple[float, ...]) -> dict[float, float]:
    """Loss of each of ``widths``, falling, from those that were ``measured`` (one at least)."""
    known = sorted(measured)
    found: dict[float, float] = {}
    least = math.inf
    for bits in sorted(widths):
        below = [b for b in known if b <= bits] or known[:1]
        above = [b for b in known if b >= bits] or known[-1:]
        least = min(least, _between(bits, below[-1], above[0], measured))
        found[bits] = least
    return found


def _between(bits: float, low: float, high: float, measured: dict[float, float]) -> float:
    if low == high:
        return measured[low] * distortion(bits) / distortion(low)
    a, b = (math.log(max(measured[each], LEAST)) for each in (low, high))
    x, x0, x1 = (math.log(distortion(each)) for each in (bits, low, high))
    return math.exp(_line(x, x0, a, x1, b))


def _line(x: float, x0: float, y0: float, x1: float, y1: float) -> float:
    return y0 + (y1 - y0) * (x - x0) / (x1 - x0)


class Losses(NamedTuple):
    """What an item loses alone."""

    item: Item
    measured: dict[float, Tensor]
    """Width to the KL in nats of each window, float64 [windows]."""
    means: dict[float, float]
    """Each width that it may have to its mean KL; 0 at full precision."""

    def windows(self, bits: float) -> Tensor:
        """KL in nats of each window at a width that it may have; in proportion to the nearest one that was measured."""
        if bits in self.measured:
            return self.measured[bits]
        nearest = min(self.measured, key=lambda b: (abs(b - bits), b))
        return self.measured[nearest] * (self.means[bits] / max(float(self.measured[nearest].mean()), LEAST))


def widths_of_item(probe: Probe, item: Item) -> tuple[float, ...]:
    """Widths below full precision that all layers of ``item`` may have, rising."""
    scheme = probe.base.scheme(item.role)
    every = (widths_of(item.role, scheme, probe.shape(n, item.role)[3]) for n in item.layers)
    return tuple(sorted(set.intersection(*map(set, every))))


def measured_widths(item: Item, widths: tuple[float, ...]) -> list[float]:
    """Those of ``widths`` that are measured, one at least.

    Raises:
        ConfigError: there are none.
    """
    if not widths:
        raise ConfigError(f"no width fills whole words for the {item.role}s of layers {item.first} to {item.last}")
    return [bits for bits in MEASURED[item.role] if bits in widths] or [widths[0]]


def groups_passes(probe: Probe) -> int:
    """Passes that measuring all groups takes, before any is taken apart."""
    return sum(len(measured_widths(item, widths_of_item(probe, item))) for item in items_of(probe.layers))


def item_losses(probe: Probe, item: Item, progress: Progress) -> Losses:
    """Measure ``item`` at the widths of ``MEASURED``, and derive the others.

    Raises:
        ConfigError: no width is to be had.
    """
    measured, widths = {}, widths_of_item(probe, item)
    for bits in measured_widths(item, widths):
        measured[bits] = probe.losses(probe.alone(item.role, dict.fromkeys(item.layers, Width(bits))), item.first)
        progress(1)
    means = filled_in({bits: float(kl.mean()) for bits, kl in measured.items()}, widths)
    return Losses(item, measured, {**means, FULL: 0.0})


def all_losses(probe: Probe, progress: Progress) -> list[Losses]:
    """Losses of all layers and sides: of groups, and layer by layer where a group stands out."""
    groups = [item_losses(probe, item, progress) for item in items_of(probe.layers)]
    found = []
    for group in groups:
        parts = [group.item]
        if len(group.item.layers) > 1 and stands_out(group, groups):
            parts = [Item(group.item.role, n, n) for n in group.item.layers]
        found += [group] if len(parts) == 1 else [item_losses(probe, part, progress) for part in parts]
    return found


def stands_out(group: Losses, groups: list[Losses]) -> bool:
    """Whether ``group`` makes more than ``STANDS_OUT`` of what its side loses, at a width that was measured."""
    side = [each for each in groups if each.item.role == group.item.role]
    totals = {bits: sum(each.means.get(bits, 0.0) for each in side) for bits in group.measured}
    return any(group.means[bits] > STANDS_OUT * total for bits, total in totals.items())
