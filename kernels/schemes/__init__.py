"""Quantization schemes: how keys or values are laid out, when they are quantized, and how. One module per scheme.

To add one, write a module with what ``base.Scheme`` names, and put it into ``SCHEMES``.
"""

from __future__ import annotations

import functools

import xquant_fx.kernels.schemes.per_channel as per_channel
import xquant_fx.kernels.schemes.per_channel_ranked as per_channel_ranked
import xquant_fx.kernels.schemes.per_token as per_token
import xquant_fx.kernels.schemes.per_token_folded as per_token_folded
import xquant_fx.kernels.schemes.per_token_rotated as per_token_rotated
from xquant_fx.kernels.schemes.base import Scheme, wraps_at

SCHEMES: dict[str, Scheme] = {
    "per_channel": per_channel,
    "per_channel_ranked": per_channel_ranked,
    "per_token": per_token,
    "per_token_folded": per_token_folded,
    "per_token_rotated": per_token_rotated,
}


@functools.lru_cache(4096)  # chunks are of caches that are as long as what they hold
def _wrap_of(scheme: str, tokens: int, max_len: int, dim: int, bits: float, group: int, residual: int) -> int:
    return wraps_at(tokens, SCHEMES[scheme].stored_tokens(0, dim, bits, group, residual), max_len)


def wrap_of(scheme: str, tokens: int, max_len: int, dim: int, bits: float, group: int, residual: int) -> int:
    """After how many tokens codes with room for ``tokens`` start over in a cache of ``max_len``; 0: they do not."""
    numbers = all(type(size) is int for size in (tokens, max_len, dim))  # a symbol is no key
    return (_wrap_of if numbers else _wrap_of.__wrapped__)(scheme, tokens, max_len, dim, bits, group, residual)
