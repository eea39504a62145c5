"""Per token, rotated: one scale per token and group of channels, no zero point (values).

As ``per_token``, but what is quantized is the rotated token (``rotation.py``), on levels that lie about zero, with a
scale without bias (``reference.unbiased``): n = 2**bits - 1, y the rotated token, s the best step for a Gaussian,

    codes = round(y / s + n / 2), kept in 0 .. n           1 bit: the signs
    y ~ scale (codes - n / 2)

    codes  int32 [B, H, tokens * bits / 32, D]    packed along tokens
    scale  uint8 or float16 [B, H, D / group, tokens]    ``small_floats.py``

Sources: docs/quality.md; rotation after QuaRot, the gain after EDEN and TurboQuant (arXiv 2504.19874).
"""

from __future__ import annotations

import torch
from torch import Tensor

import xquant_fx.kernels.schemes.per_token as per_token
from xquant_fx.kernels.packing import WORD_BITS, unpack_words
from xquant_fx.kernels.quantize_store.arguments import StoreArguments
from xquant_fx.kernels.reference import unbiased
from xquant_fx.kernels.rotation import rotate, rotate_back
from xquant_fx.kernels.schemes.base import Shapes, Stored
from xquant_fx.kernels.small_floats import DTYPES, decode_scale, encode_scale

APPEND = "rotated"
BITS: tuple[float, ...] = (1, 2, 3, 4, 8)
SCALE_DTYPES: tuple[torch.dtype, ...] = DTYPES
RANGE_CODES = False
TOKEN_NORMS = False
#: Best step of a uniform quantizer on a unit Gaussian, by bits.
GAUSSIAN_STEP: dict[float, float] = {1: 1.5958, 2: 0.9957, 3: 0.5860, 4: 0.3352, 8: 0.0308}

stored_tokens, tokens_of, quantized_limit = per_token.stored_tokens, per_token.tokens_of, per_token.quantized_limit
window_tokens, first_kept = per_token.window_tokens, per_token.first_kept


def shapes(tokens: int, dim: int, bits: float, group: int, scale_dtype: torch.dtype) -> Shapes:
    """What follows [B, H] in the shape of each tensor, and its dtype."""
    codes = ((tokens * int(bits) // WORD_BITS, dim), torch.int32)
    return {"codes": codes, "scale": ((dim // group, tokens), scale_dtype)}


def store_due(a: StoreArguments, x: Tensor, past: Tensor, in_ring: bool) -> None:
    """Quantize the tokens that the step pushes out of the window of the last R."""
    per_token.store_leaving(a, x, past, in_ring, quantize)


def quantize(a: StoreArguments, values: Tensor, stored: Tensor) -> tuple[Tensor, Tensor, None]:
    """(codes, scale, no zero) of fp32 ``values`` [B, H, tokens, D]."""
    return quantize_rotated(a, rotate(values))


def quantize_rotated(a: StoreArguments, y: Tensor) -> tuple[Tensor, Tensor, None]:
    """The same of rotated tokens."""
    bits = int(a.bits)
    n, group = 2**bits - 1, a.group_size
    y = y.unflatten(3, (y.shape[3] // group, group))
    step = GAUSSIAN_STEP[bits] * (y * y).mean(4, keepdim=True).sqrt()
    codes = torch.floor(y / torch.where(step > 0, step, 1.0) + (n + 1) / 2).clamp(0, n)
    codes = torch.where(codes == codes, codes, 0.0)
    scale = unbiased(y, codes - n / 2, 4)
    return codes.to(torch.int32).flatten(3, 4), encode_scale(scale, a.quantized.scale.dtype), None


def dequantize(stored: Stored, bits: float, group: int, n: int, dim: int) -> Tensor:
    """First ``n`` tokens as fp32 [B, H, n, dim]."""
    return rotate_back(rotated(stored, bits, group, n, dim))


def rotated(stored: Stored, bits: float, group: int, n: int, dim: int) -> Tensor:
    """The same, still rotated."""
    levels = unpack_words(stored.codes, bits, 2, n) - (2 ** int(bits) - 1) / 2
    channel_group = torch.arange(dim, device=stored.codes.device) // group
    scale = decode_scale(stored.scale).transpose(-1, -2)[:, :, :n].index_select(3, channel_group)
    return levels * scale
