"""A few weights of a model, by which a plan knows it again: the same whatever the dtype, the device and the folder.

Elements of the matrices of some decoder layers are compared one by one. Rounding to bfloat16 moves each by at most
2**-9 = 0.2 percent and to float16 by less, so that ``TOLERANCE`` is five times what any dtype makes; training, a merged
adapter or quantized weights move some matrix further. What moves none of them by 1 percent is no other model to a plan.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

#: Decoder layers that are looked at, evenly spaced; matrices of each, the first ones; elements of each, evenly spaced.
LAYERS, MATRICES, ELEMENTS = 8, 12, 4
#: Relative distance of two models' elements of one matrix from which on they are two models.
TOLERANCE = 0.01
#: Distances are relative to the elements or to this, if all are smaller: float16 has no digits for the very small.
SMALL = 1e-4
DIGITS = 5

#: (layer and name of a matrix, some of its elements), for each that was looked at.
Sample = tuple[tuple[str, tuple[float, ...]], ...]


def decoder_layers(model: Any) -> list[nn.Module]:
    """The layers of a Hugging Face decoder, lowest first; none where they cannot be told."""
    count = model.config.get_text_config(decoder=True).num_hidden_layers
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    return list(lists[0]) if lists else []


def sample_of(model: Any) -> Sample | None:
    """Some weights of a Hugging Face ``model``; None where they are not in memory, or its layers cannot be told.

    Matrices that are no plain floating-point tensors (quantized weights) are left out.
    """
    layers = decoder_layers(model)
    count = min(LAYERS, len(layers))
    indices = sorted({i * (len(layers) - 1) // max(count - 1, 1) for i in range(count)})
    named = [(f"{i}.{name}", matrix) for i in indices for name, matrix in _matrices(layers[i])]
    if not named or any(matrix.is_meta for _, matrix in named):
        return None
    return tuple((name, _elements(matrix)) for name, matrix in named)


def _matrices(layer: nn.Module) -> list[tuple[str, Tensor]]:
    named = [(name, parameter.detach()) for name, parameter in layer.named_parameters() if parameter.dim() >= 2]
    return [(name, p) for name, p in named if type(p) is Tensor and p.is_floating_point()][:MATRICES]


def _elements(matrix: Tensor) -> tuple[float, ...]:
    # By indices of each axis: a matrix may be a view whose elements do not follow each other.
    last = matrix.numel() - 1
    flat = torch.arange(ELEMENTS, device=matrix.device) * last // max(ELEMENTS - 1, 1)
    chosen = matrix[torch.unravel_index(flat, matrix.shape)].to(torch.float64)
    return tuple(float(f"{x:.{DIGITS}g}") for x in chosen.tolist())


def why_another(ours: Sample, theirs: Sample) -> str:
    """What tells two models apart by their weights, in words; "": nothing does."""
    other = dict(theirs)
    missing = [name for name, _ in ours if name not in other]
    if missing:
        return f"it has no floating-point weights called {missing[0]!r} in its decoder layers"
    apart = {name: _distance(values, other[name]) for name, values in ours}
    farthest = max(apart, key=lambda name: apart[name])
    if apart[farthest] <= TOLERANCE:
        return ""
    return (
        f"its weights {farthest!r} are {apart[farthest]:.1%} apart from those it was made on (up to {TOLERANCE:.0%} is "
        "the same model), as after training or merging an adapter"
    )


def _distance(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    if len(a) != len(b):
        return float("inf")
    x, y = (torch.tensor(values, dtype=torch.float64) for values in (a, b))
    return float((x - y).norm() / x.norm().clamp_min(SMALL))
