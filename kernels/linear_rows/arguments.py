"""What ``xquant::linear_rows`` takes."""

from __future__ import annotations

import dataclasses
from typing import Annotated

from torch import Tensor

from xquant_fx.kernels.arguments import Arguments, Elements

#: Rows that the kernel takes: of more, a matrix product reads its weights from the caches.
MOST_ROWS = 8


@dataclasses.dataclass(frozen=True, eq=False)
class LinearArguments(Arguments):
    """Arguments of the op; all tensors have one dtype: bfloat16, float16 or float32."""

    x: Annotated[Tensor, Elements("T")]
    """[..., in], of up to MOST_ROWS rows."""
    weight: Annotated[Tensor, Elements("T")]
    """[out, in], contiguous."""
    bias: Annotated[Tensor | None, Elements("T")] = None
    """[out]."""
