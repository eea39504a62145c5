"""Whether two runs of one program differ by more than rounding."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

#: dtype to the relative error (root of the mean square) that rounding explains: scores in 16 bits are off by some
#: hundredths, and so are the weights that come of them.
ROUNDING = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 6e-2}


class Difference(NamedTuple):
    """One value that differs; prints as a clause."""

    what: str
    error: float
    most: float

    def __str__(self) -> str:
        return f"{self.what} differs from the program's by {self.error:.2g} (relative), more than {self.most:.2g}"


def beyond_rounding(what: str, mine: Any, theirs: Any) -> Difference | None:
    """How ``mine`` differs from ``theirs``; None if by rounding at most.

    Of whole numbers only the shape is compared: the largest of two logits that differ by rounding may be another. Where
    ``theirs`` is NaN (a query that may see nothing) ``mine`` may be anything.
    """
    if not isinstance(theirs, Tensor):
        return None if mine == theirs else Difference(what, float("inf"), 0.0)
    if not isinstance(mine, Tensor) or mine.shape != theirs.shape or mine.dtype != theirs.dtype:
        return Difference(f"{what} (its shape or dtype)", float("inf"), 0.0)
    most = ROUNDING.get(theirs.dtype)
    if most is None:
        return None
    error = relative_error(mine, theirs)
    return None if error <= most else Difference(what, error, most)


def relative_error(mine: Tensor, theirs: Tensor) -> float:
    """Root of the mean square of the difference, beside that of ``theirs``; inf if only ``mine`` has NaN somewhere."""
    a, b = mine.detach().double(), theirs.detach().double()
    known = b.isfinite()
    a, b = a[known], b[known]
    size, distance = b.square().sum().sqrt().item(), (a - b).square().sum().sqrt().item()
    if distance != distance:
        return float("inf")
    return distance / max(size, 1e-6)
