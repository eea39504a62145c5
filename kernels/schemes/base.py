"""What a scheme is: a layout of codes and scales, a schedule, and a plain-torch reference of both.

Each other module of this folder is one scheme, and has these names at its top level.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from xquant_fx.kernels.quantize_store.arguments import StoreArguments

Past = TypeVar("Past", int, Tensor)
#: Name of a stored tensor to what follows [B, H] in its shape, and its dtype.
Shapes = dict[str, tuple[tuple[int, ...], torch.dtype]]


class Stored(NamedTuple):
    """What a scheme dequantizes: stored tensors, None for those that it has not."""

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    order: Tensor | None
    center: Tensor | None
    norm: Tensor | None


def wraps_at(tokens: int, spare: int, max_len: int) -> int:
    """After how many tokens codes start over; 0: they do not.

    ``tokens`` is what they have room for, of which ``spare`` are padding (``stored_tokens`` of nothing).
    """
    return tokens - spare if tokens - spare < max_len else 0


class Scheme(Protocol):
    """How keys or values are quantized."""

    APPEND: str
    """Which step of the C++ and Triton appends quantizes for it: "blocks" (of tokens, when full) or "tokens", and
    their kin "ranked", "rotated" and "folded"."""

    BITS: tuple[float, ...]
    """Bits per element that it can store, averages where widths are mixed."""

    SCALE_DTYPES: tuple[torch.dtype, ...]
    """What it can store scales as (and zero points, mid points), the default first; uint8: ``small_floats.py``."""

    RANGE_CODES: bool
    """Whether a group's range alone makes its codes: then eta relaxes it, and scales can be fitted to borrowed ones."""

    TOKEN_NORMS: bool
    """Whether it can divide a token by its norm over all heads first."""

    def stored_tokens(self, max_len: int, dim: int, bits: float, group: int, residual: int) -> int:
        """Tokens that the codes have room for: ``max_len`` and some padding that is never read."""

    def window_tokens(self, reach: int, group: int, residual: int) -> int:
        """Slots of codes where they start over (``layout.WRAP_TOKENS``) and the latest ``reach`` tokens are read."""

    def first_kept(self, end: Past, wrap: int) -> Past:
        """The first token that a chunk leaves in them, with those before ``end`` quantized."""

    def shapes(self, tokens: int, dim: int, bits: float, group: int, scale_dtype: torch.dtype) -> Shapes:
        """Codes, scales and what else it stores, with room for ``tokens``."""

    def tokens_of(self, codes: Sequence[int], scale: Sequence[int]) -> int:
        """Back from the shapes of codes and scales to the tokens they have room for."""

    def quantized_limit(self, past: Past, group: int, residual: int) -> Past:
        """Number of quantized tokens when ``past`` tokens are stored (may be negative: none)."""

    def store_due(self, a: StoreArguments, x: Tensor, past: Tensor, in_ring: bool) -> None:
        """Quantize what becomes due by ``x`` [B, H, q, D] after ``past`` (int64 [1]) tokens.

        ``in_ring`` says that ``x`` is in the ring already.
        """

    def dequantize(self, stored: Stored, bits: float, group: int, n: int, dim: int) -> Tensor:
        """The first ``n`` tokens as fp32 [B, H, n, dim]."""
