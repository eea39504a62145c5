"""Residual windows of other lengths: given, or chosen for each group of layers and side by what they cost there.

The bytes of all windows together stay those of the preset. As for the widths of a plan (``xquant plan``), the loss of
each group of layers and side alone is measured for each length, on the built-in text, and the choice of least loss
found exactly.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any, get_args

import torch

from xquant_fx import XQuantConfig
from xquant_fx.evaluate.allocation import Option, best_within, pareto_choices
from xquant_fx.evaluate.calibration import Windows as Text
from xquant_fx.evaluate.calibration import calibration_ids
from xquant_fx.evaluate.probe import Probe, Width
from xquant_fx.evaluate.sensitivity import Item
from xquant_fx.plan.plan import make_plan
from xquant_fx.plan.spec import Role

if TYPE_CHECKING:
    from trial_list import Trial

#: Tokens in full precision of each layer, by role.
Windows = dict[str, list[int]]
LENGTHS = (128, 256, 384, 512)
#: Of the built-in text.
TEXT = Text(count=4, tokens=1216, prompt=1152, stride=2)


def same_windows(trial: Trial, layers: int) -> Windows:
    """What a trial says, in all layers alike."""
    usual = make_plan(XQuantConfig.preset(trial.base), layers).layers
    return {
        "key": [trial.key_window or layer.key.residual_length for layer in usual],
        "value": [trial.value_window or layer.value.residual_length for layer in usual],
    }


def items_of(layers: int) -> list[Item]:
    """Both sides of ten groups of equal size, as near as that goes, lowest layers first."""
    count = min(10, layers)
    edges = [layers * i // count for i in range(count + 1)]
    return [Item(role, a, b - 1) for a, b in itertools.pairwise(edges) for role in get_args(Role)]


def _loss(probe: Probe, item: Item, bits: float) -> float:
    """Mean KL in nats with ``item`` at ``bits`` and all else in full precision."""
    return probe.loss(probe.alone(item.role, dict.fromkeys(item.layers, Width(bits))), item.first)


@torch.no_grad()
def chosen_windows(model: Any, trial: Trial) -> Windows:
    """Lengths of least loss that take as many bytes as the preset's."""
    base = XQuantConfig.preset(trial.base)
    ids = calibration_ids(model, None, None, TEXT)
    items: list[Item] = []
    options: list[list[Option]] = []
    for length in LENGTHS:
        probe = Probe(model, ids, TEXT.prompt, TEXT.stride, base.replace(residual_length=length))
        items = items_of(probe.layers)
        options = options or [[] for _ in items]
        for item, known in zip(items, options, strict=True):
            bits = base.k_bits if item.role == "key" else base.v_bits
            assert isinstance(bits, int | float)
            cost = length * len(item.layers)
            known.append(Option(length, cost, _loss(probe, item, bits)))
    budget = sum(map(sum, same_windows(trial, probe.layers).values()))
    choice = best_within(pareto_choices(options), budget)
    assert choice is not None
    windows: Windows = {"key": [0] * probe.layers, "value": [0] * probe.layers}
    for item, known, pick in zip(items, options, choice.picks, strict=True):
        for layer in item.layers:
            windows[item.role][layer] = int(known[pick].what)
    return windows
