"""Whether the layers of a pair may share codes: what it loses, measured, and the rule by which it counts as free.

The upper layer of a pair stores no codes but scales and zero points, fitted to the lower layer's codes. Where the
config's own schemes cannot share, both layers are stored per channel (keys) or per token (values) for it, with the eta
that their group's size asks for (``kernels/relaxation.py``).

Sharing is free where it takes fewer bits than codes of one's own and loses no more: with d the loss with shared codes
minus that of the narrowest codes of one's own that take at least as many bits, window by window,

    mean d <= standard error of mean d          (0 where there is but one window)

Only then an allocation may choose it. What was tried is reported in any case.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from xquant_fx.evaluate.probe import FULL, Probe, Width
from xquant_fx.evaluate.sensitivity import Losses
from xquant_fx.plan.spec import Role

#: Bits of shared codes that are tried: those of the paper (XQuant, Yang et al., EMNLP 2025).
SHARED_BITS: dict[Role, float] = {"key": 2, "value": 1}

#: Items that are chosen for together: one of whole pairs, or the two layers of a pair that were measured apart.
Block = tuple[Losses, ...]


@dataclasses.dataclass(frozen=True)
class SharingTrial:
    """What one side of some layers loses with shared codes, beside codes of its own."""

    role: Role
    first: int
    """Lowest layer, counted over quantized ones."""
    last: int
    """Highest, included."""
    bits: float
    """Of the shared codes."""
    true_bits: float
    """Codes, scales and zero points per element, all layers together."""
    kl: float | None
    """What it adds to the KL alone, in nats; None: it could not be tried."""
    own_bits: float
    """Of codes of their own: the narrowest that take at least as many true bits."""
    own_true_bits: float
    own_kl: float
    noise: float
    """Standard error over windows of the difference of the two losses."""
    reason: str = ""
    """Why it could not be tried."""

    @property
    def is_free(self) -> bool:
        """Whether an allocation may choose it."""
        return self.kl is not None and self.kl - self.own_kl <= self.noise


def blocks_of(losses: list[Losses]) -> list[Block]:
    """What is chosen for together: both layers of a pair that were measured apart, and each other item alone."""
    found: dict[tuple[Role, int, bool], list[Losses]] = {}
    for each in losses:
        item = each.item
        is_single = item.first == item.last
        found.setdefault((item.role, item.first // 2 if is_single else item.first, is_single), []).append(each)
    return [tuple(block) for block in found.values()]


def layers_of(block: Block) -> list[int]:
    """Numbers of a block's layers, rising."""
    return [n for each in block for n in each.item.layers]


def shared_widths(block: Block) -> dict[int, Width]:
    """The width of each layer of ``block`` where its pairs share codes; of a layer without a partner, its own.

    Empty where there is no pair, or the layer without a partner cannot have that width.
    """
    layers, bits = layers_of(block), SHARED_BITS[block[0].item.role]
    widths = {n: Width(bits, shared=n ^ 1 in layers) for n in layers}
    pairs = any(width.shared for width in widths.values())
    fits = all(width.shared for width in widths.values()) or all(bits in each.means for each in block)
    return widths if pairs and fits else {}


def try_sharing(probe: Probe, block: Block) -> SharingTrial | None:
    """Measure ``block`` with shared codes; None where no pair is in it."""
    widths = shared_widths(block)
    if not widths:
        return None
    role, layers = block[0].item.role, list(widths)
    cost = probe.cost(role, widths)
    common = sorted(set.intersection(*(set(each.means) for each in block)))
    costs = {bits: probe.cost(role, dict.fromkeys(layers, Width(bits))) for bits in common}
    own_bits = next(bits for bits in common if costs[bits] >= cost or bits == FULL)
    own = torch.stack([each.windows(own_bits) for each in block]).sum(0)
    reason = _why_not(probe, role, widths)
    shared = None if reason else probe.losses(probe.alone(role, widths), layers[0])
    return SharingTrial(
        role=role, first=layers[0], last=layers[-1], bits=SHARED_BITS[role], true_bits=FULL * cost / costs[FULL],
        kl=None if shared is None else float(shared.mean()), own_bits=own_bits,
        own_true_bits=FULL * costs[own_bits] / costs[FULL], own_kl=float(own.mean()),
        noise=0.0 if shared is None else _standard_error(shared - own), reason=reason,
    )  # fmt: skip


def _why_not(probe: Probe, role: Role, widths: dict[int, Width]) -> str:
    """Why the pairs of these layers cannot share; "": they can."""
    specs = [s for s in probe.specs(probe.alone(role, widths)) if s.role == role and s.layer in widths]
    return next((s.reason for s in specs if widths[s.layer].shared and s.layer % 2 and not s.borrowed), "")


def _standard_error(difference: Tensor) -> float:
    count = len(difference)
    return float(difference.std(correction=1)) / math.sqrt(count) if count > 1 else 0.0
