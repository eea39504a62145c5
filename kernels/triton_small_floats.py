"""Scales and mid points in 8 bits (``small_floats.py``) in Triton: bytes to float32, float32 to bytes."""

from __future__ import annotations

import triton
import triton.language as tl

from xquant_fx.kernels.small_floats import LARGEST_MID, MID_UNIT, SCALE_UNIT

UNIT_OF_SCALES = tl.constexpr(SCALE_UNIT)
SCALES_OF_UNIT = tl.constexpr(1 / SCALE_UNIT)
UNIT_OF_MIDS = tl.constexpr(MID_UNIT)
MIDS_OF_UNIT = tl.constexpr(1 / MID_UNIT)
LARGEST_OF_MIDS = tl.constexpr(LARGEST_MID)


@triton.jit
def half_of_byte(code):
    """float32 of bytes (uint8) that are float16 numbers without their last seven bits and without a sign."""
    return (code.to(tl.int16) << 7).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def byte_of_half(x):
    """int32: ``x`` >= 0 as a float16 without its last seven bits, rounded to nearest, halves to even."""
    bits = x.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32)
    return (bits + 63 + ((bits >> 7) & 1)) >> 7


@triton.jit
def decode_scale(code):
    """float32 of uint8 ``code``."""
    return half_of_byte(code) * UNIT_OF_SCALES


@triton.jit
def decode_mid(code):
    """float32 of uint8 ``code``, in scales."""
    magnitude = half_of_byte(code & 0x7F) * UNIT_OF_MIDS
    return tl.where(code >= 0x80, -magnitude, magnitude)


@triton.jit
def encode_scale(scale):
    """uint8 of float32 ``scale`` >= 0; NaN, infinity and what is too large become NaN."""
    known = scale == scale
    code = byte_of_half(tl.where(known, scale * SCALES_OF_UNIT, 0.0))
    return tl.where(known & (code < 0xF8), code, 0xFF).to(tl.uint8)


@triton.jit
def encode_mid(mid):
    """uint8 of float32 ``mid``, in scales; beyond the largest the largest, NaN is 0."""
    magnitude = tl.minimum(tl.where(mid == mid, tl.abs(mid), 0.0), LARGEST_OF_MIDS)
    code = tl.minimum(byte_of_half(magnitude * MIDS_OF_UNIT), 0x7F)
    return (code | tl.where(mid < 0, 0x80, 0)).to(tl.uint8)
