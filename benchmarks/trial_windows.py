"""Residual windows of other lengths: given, or chosen for each group of layers and side by what they cost there.

The bytes of all windows together stay those of the preset. As for the widths of a plan (``xquant plan``), the loss of
each group of layers and side alone is measured for each length, on the built-in text, and the choice of least loss
found exactly.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from xquant_fx import XQuantConfig
from xquant_fx.evaluate.allocation import Option, best_within, pareto_choices
from xquant_fx.evaluate.calibration import Windows as Text
from xquant_fx.evaluate.calibration import calibration_ids
from xquant_fx.evaluate.sensitivity import Item, Probe, items_of

if TYPE_CHECKING:
    from trial_list import Trial

#: Tokens in full precision of each layer, by role.
Windows = dict[str, list[int]]
LENGTHS = (128, 256, 384, 512)
#: Of the built-in text.
TEXT = Text(count=4, tokens=1216, prompt=1152, stride=2)


def same_windows(trial: Trial, layers: int) -> Windows:
    """What a trial says, in all layers alike."""
    usual = XQuantConfig.preset(trial.base).residual_length
    return {"key": [trial.key_window or usual] * layers, "value": [trial.value_window or usual] * layers}


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
            known.append(Option(length, cost, probe.item_loss(item, bits)))
    budget = base.residual_length * sum(len(item.layers) for item in items)
    choice = best_within(pareto_choices(options), budget)
    assert choice is not None
    windows: Windows = {"key": [0] * probe.layers, "value": [0] * probe.layers}
    for item, known, pick in zip(items, options, choice.picks, strict=True):
        for layer in item.layers:
            windows[item.role][layer] = int(known[pick].bits)
    return windows
