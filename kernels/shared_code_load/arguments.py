"""What ``xquant::shared_code_load`` takes; see ``KVSpec`` for the shapes of the stored tensors."""

from __future__ import annotations

import dataclasses
from typing import Annotated

from torch import Tensor

from xquant_fx.kernels.arguments import Arguments, Elements, Symbolic


@dataclasses.dataclass(frozen=True, eq=False)
class LoadArguments(Arguments):
    """Arguments of the op."""

    codes: Annotated[Tensor, Elements("int32_t")]
    scale: Annotated[Tensor | None, Elements("S")]
    zero: Annotated[Tensor | None, Elements("S")]
    ring: Annotated[Tensor | None, Elements("T")]
    sink: Annotated[Tensor | None, Elements("T")]
    order: Annotated[Tensor | None, Elements("int32_t")]
    center: Annotated[Tensor | None, Elements("float")]
    norm: Annotated[Tensor | None, Elements("uint8_t")]
    start: Annotated[Tensor, Elements("int64_t")]
    past: Annotated[Tensor, Elements("int64_t")]
    """int64 [1], tokens stored before the step; [B] where each row has its own number."""
    new_tokens: Symbolic
    """Tokens that the step brings."""
    n: Symbolic
    """Tokens to give back."""
    scheme: str
    bits: float
    group_size: int
    residual_length: int
    max_len: int
    x: Annotated[Tensor | None, Elements("T")] = None
    """The step's own tokens, where they are too many for the ring; the ring is as it was before them."""
    first: Annotated[Tensor | None, Elements("int64_t")] = None
    """int64 [1], the first token to give back; None: 0."""


#: What the op takes of a layer's stored tensors, by name.
STORED = tuple(name for name in LoadArguments.tensor_names() if name not in ("past", "x", "first"))
