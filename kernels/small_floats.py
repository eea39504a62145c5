"""Scales and mid points in 8 bits, without a range to be found first; or in 16, as a choice.

    scale       5 bits of exponent, 3 of mantissa, no sign: a float16 cut to 8 bits, in units of SCALE_UNIT.
                From 2**-19 (2**-22 less precisely) to 1920, to within 1/16; 0xFF is NaN.
    mid point   1 bit of sign, 4 of exponent, 3 of mantissa, in units of the scale it stands beside: |mid| up to
                480 scales, to within 1/16 of itself or 2**-11 scales.

Token norms (``schemes/per_channel_ranked.py``) are stored as scales of 8 bits. In 16 bits scales and mid points are
float16: the scale as it is, the mid point in units of the scale. What is stored says by its dtype
what it is. The bytes decode by one shift to float16, on any device. (An e4m3 scale would need a power of two per layer,
which has to be known before the first token is stored; these need nothing.)
"""

from __future__ import annotations

import torch
from torch import Tensor

SCALE_UNIT = 2.0**-5
MID_UNIT = 256.0
#: Least and largest norm of a token: of scales in 8 bits the least of full precision, and the largest.
LEAST_NORM, LARGEST_NORM = 2.0**-19, 1920.0
#: Largest mid point, in scales.
LARGEST_MID = 480.0
#: What they may be stored as: the bytes above, or float16. The first is the default.
DTYPES = (torch.uint8, torch.float16)
_NAN = 0xFF
_DROPPED = 7  # mantissa bits of a float16 that are not kept


def _rounded(half: Tensor) -> Tensor:
    """int32: the bits of float16 ``half`` >= 0 without the last seven, rounded to nearest, halves to even."""
    bits = half.view(torch.int16).to(torch.int32)
    half_up = (1 << (_DROPPED - 1)) - 1
    return (bits + half_up + ((bits >> _DROPPED) & 1)) >> _DROPPED


def _half(bits: Tensor) -> Tensor:
    """float32 of float16 ``bits`` (int32)."""
    return bits.to(torch.int16).view(torch.float16).to(torch.float32)


def encode_scale(scale: Tensor, dtype: torch.dtype = torch.uint8) -> Tensor:
    """float32 ``scale`` >= 0 as ``dtype``, one of DTYPES; NaN, infinity and what is too large become NaN."""
    if dtype == torch.float16:
        half = scale.to(dtype)
        return torch.where(half < torch.inf, half, torch.nan)
    code = _rounded((scale / SCALE_UNIT).to(torch.float16).nan_to_num(torch.inf))
    return torch.where(code >= 0xF8, _NAN, code).to(torch.uint8)


def decode_scale(code: Tensor) -> Tensor:
    """float32 of a stored scale."""
    if code.dtype == torch.float16:
        return code.to(torch.float32)
    return _half(code.to(torch.int32) << _DROPPED) * SCALE_UNIT


def encode_norm(norm: Tensor) -> Tensor:
    """float32 token norms as uint8, read by :func:`decode_scale`: never 0, and NaN or infinity is the largest.

    So what is divided by a norm stays what it was: NaN, infinite, or a token of zeros.
    """
    return encode_scale(norm.nan_to_num(LARGEST_NORM, LARGEST_NORM).clamp(LEAST_NORM, LARGEST_NORM))


def encode_mid(mid: Tensor, dtype: torch.dtype = torch.uint8) -> Tensor:
    """float32 ``mid``, in scales, as ``dtype``; beyond LARGEST_MID the largest, NaN is 0 (the scale says NaN)."""
    if dtype == torch.float16:
        return mid.nan_to_num(0.0).clamp(-LARGEST_MID, LARGEST_MID).to(dtype)
    code = _rounded((mid.abs().nan_to_num(0.0) / MID_UNIT).clamp_max(LARGEST_MID / MID_UNIT).to(torch.float16))
    return (code.clamp_max(0x7F) | ((mid < 0).to(torch.int32) << 7)).to(torch.uint8)


def decode_mid(code: Tensor) -> Tensor:
    """float32 of a stored mid point, in scales."""
    if code.dtype == torch.float16:
        return code.to(torch.float32)
    code = code.to(torch.int32)
    magnitude = _half((code & 0x7F) << _DROPPED) * MID_UNIT
    return torch.where(code >= 0x80, -magnitude, magnitude)
