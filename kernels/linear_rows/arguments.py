"""What ``xquant::linear_rows`` takes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

#: Rows that the kernel takes: of more, a matrix product reads its weights from the caches.
MOST_ROWS = 8

#: The result is the layers' outputs as one block of memory, [..., out] of the first and so on.
SCHEMA = "linear_rows(Tensor x, Tensor[] weights, Tensor?[] biases, bool in_first=False) -> Tensor"


@dataclasses.dataclass(frozen=True, eq=False)
class LinearArguments:
    """Arguments of the op; all tensors have one dtype: bfloat16, float16 or float32.

    An instance holds tensors, graph nodes or Inductor's buffers alike.
    """

    x: Tensor
    """[..., in], of up to MOST_ROWS rows."""
    weights: Sequence[Tensor]
    """[out, in] of each layer, contiguous; [in, out] of the only one, if ``in_first``."""
    biases: Sequence[Tensor | None]
    """[out] of each layer that has one."""
    in_first: bool = False
    """Whether the weights are laid out as ``addmm`` takes them."""

    @property
    def tensors(self) -> list[Tensor]:
        """All that are there: the input, the weights, the biases."""
        return [self.x, *self.weights, *(bias for bias in self.biases if bias is not None)]

    def mapped(self, function: Callable[[Any], Any]) -> LinearArguments:
        """These arguments with ``function`` applied to the tensors that are there."""
        biases = [None if bias is None else function(bias) for bias in self.biases]
        weights = [function(weight) for weight in self.weights]
        return LinearArguments(function(self.x), weights, biases, self.in_first)
