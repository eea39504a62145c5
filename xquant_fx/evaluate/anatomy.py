"""Where the error comes from: keys, values and attention of each layer and head.

All layers are quantized at once, so queries, keys and values of a layer are those of the quantized model; errors are
measured against the same tensors in full precision, one layer's own share.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from xquant_fx.evaluate.attention import Side, attend, plain
from xquant_fx.evaluate.models import title
from xquant_fx.evaluate.simulate import Prefilled, Seen, simulated_logits
from xquant_fx.plan.config import XQuantConfig
from xquant_fx.plan.plan import Plan
from xquant_fx.tables import render


@dataclasses.dataclass(frozen=True)
class LayerErrors:
    """Relative errors (norm of the difference over the norm) of one layer, a number per head in each list."""

    layer: int
    """Number of the quantized layer, from 0."""
    keys: list[float]
    """Of the keys that were quantized and are read back, per KV head; 0 where none was."""
    values: list[float]
    """Of the values, as ``keys``."""
    output: list[float]
    """Of the attention's output over all steps, per query head, by keys and values together."""
    output_by_keys: list[float]
    """The same with the keys quantized and the values in full precision."""
    output_by_values: list[float]


@dataclasses.dataclass(frozen=True)
class Anatomy:
    """Errors of all quantized layers; print it for a table, worst layers last."""

    title: str
    layers: list[LayerErrors]

    @property
    def worst(self) -> list[int]:
        """Numbers of the layers by falling error of their attention's output."""
        return [each.layer for each in sorted(self.layers, key=lambda each: -_mean(each.output))]

    def to_dict(self) -> dict[str, Any]:
        """All numbers, as JSON can hold them."""
        return {**dataclasses.asdict(self), "worst": self.worst}

    def __str__(self) -> str:
        columns = ["layer", "keys", "values", "output", "by keys", "by values", "worst head", "its output"]
        rows = [[str(each.layer), *_cells(each)] for each in self.layers]
        note = f"worst layers by output: {', '.join(map(str, self.worst[:5]))}"
        return render(self.title, columns, rows, note)


def _cells(errors: LayerErrors) -> list[str]:
    sides = (errors.keys, errors.values, errors.output, errors.output_by_keys, errors.output_by_values)
    head = max(range(len(errors.output)), key=errors.output.__getitem__)
    return [*(f"{_mean(each):.4f}" for each in sides), str(head), f"{errors.output[head]:.4f}"]


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


@torch.no_grad()
def anatomy_report(model: Any, ids: Tensor, config: XQuantConfig | Plan, *, prompt: int = 1024) -> Anatomy:
    """Errors per layer and head over the decode steps of ``ids`` [B, T] after its first ``prompt`` tokens.

    Raises:
        ArgumentError: the model's attention cannot be exchanged.
        ConfigError: ``config`` does not fit the model.
    """
    if isinstance(config, Plan):
        config.check_model(model)
    layers: list[LayerErrors] = []
    window = Prefilled.of(model, ids, prompt)
    last = torch.tensor([ids.shape[1] - 2], device=ids.device)
    simulated_logits(window, last, config, lambda seen: layers.append(_errors(seen)))
    heading = f"{title(model)}, {model.dtype}: relative errors, means over heads, {ids.shape[1] - prompt - 1} steps"
    return Anatomy(heading.replace("torch.", ""), layers)


def _errors(seen: Seen) -> LayerErrors:
    new = seen.query.shape[2]
    full = plain(seen.keys.full, new), plain(seen.values.full, new)
    exact = attend(seen.query, *full, seen.form)
    by_keys = attend(seen.query, seen.keys, full[1], seen.form)
    by_values = attend(seen.query, full[0], seen.values, seen.form)
    outputs = (_relative(out, exact) for out in (seen.out, by_keys, by_values))
    return LayerErrors(seen.layer, _read_error(seen.keys), _read_error(seen.values), *outputs)


def _read_error(side: Side) -> list[float]:
    """Relative error per KV head of what is read back."""
    n = side.read.shape[2]
    return _relative(side.read, side.full[:, :, :n]) if n else [0.0] * side.full.shape[1]


def _relative(other: Tensor, exact: Tensor) -> list[float]:
    """Relative error per head of [B, heads, tokens, D]; 0 for a head of zeros that stays so."""
    difference, size = ((x.double()).square().sum((0, 2, 3)).sqrt() for x in (other.double() - exact.double(), exact))
    return (difference / size.clamp_min(1e-300)).tolist()
