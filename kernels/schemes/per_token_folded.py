"""Per token, rotated from outside: ``per_token_rotated`` of tokens that come rotated and are read rotated (values).

Codes and scales are the same, but window and sinks hold rotated tokens, too, and so attention's output is rotated as a
whole. Who appends rotates, and who reads rotates back (``rotation.py``); where a graph's linear layers can do both,
their weights do (``passes/fold_rotation.py``).
"""

from __future__ import annotations

from torch import Tensor

import xquant_fx.kernels.schemes.per_token as per_token
import xquant_fx.kernels.schemes.per_token_rotated as inside
from xquant_fx.kernels.quantize_store.arguments import StoreArguments
from xquant_fx.kernels.schemes.base import Stored

NAME = "per_token_folded"
APPEND = "folded"
BITS, SCALE_DTYPES, RANGE_CODES, TOKEN_NORMS = inside.BITS, inside.SCALE_DTYPES, inside.RANGE_CODES, inside.TOKEN_NORMS

stored_tokens, tokens_of, quantized_limit = inside.stored_tokens, inside.tokens_of, inside.quantized_limit
window_tokens, first_kept, shapes = inside.window_tokens, inside.first_kept, inside.shapes


def store_due(a: StoreArguments, x: Tensor, past: Tensor, in_ring: bool) -> None:
    """Quantize the tokens that the step pushes out of the window of the last R."""
    per_token.store_leaving(a, x, past, in_ring, quantize)


def quantize(a: StoreArguments, values: Tensor, stored: Tensor) -> tuple[Tensor, Tensor, None]:
    """(codes, scale, no zero) of fp32 rotated ``values`` [B, H, tokens, D]."""
    return inside.quantize_rotated(a, values)


def dequantize(stored: Stored, bits: float, group: int, n: int, dim: int) -> Tensor:
    """First ``n`` tokens as fp32 [B, H, n, dim], rotated."""
    return inside.rotated(stored, bits, group, n, dim)
