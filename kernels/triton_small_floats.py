"""Scales and mid points (``small_floats.py``) in Triton: bytes or float16 to float32, and back."""

from __future__ import annotations

import triton
import triton.language as tl

from xquant_fx.kernels.small_floats import LARGEST_MID, LARGEST_NORM, LEAST_NORM, MID_UNIT, SCALE_UNIT

UNIT_OF_SCALES = tl.constexpr(SCALE_UNIT)
SCALES_OF_UNIT = tl.constexpr(1 / SCALE_UNIT)
UNIT_OF_MIDS = tl.constexpr(MID_UNIT)
MIDS_OF_UNIT = tl.constexpr(1 / MID_UNIT)
LARGEST_OF_MIDS = tl.constexpr(LARGEST_MID)
LEAST_OF_NORMS = tl.constexpr(LEAST_NORM)
LARGEST_OF_NORMS = tl.constexpr(LARGEST_NORM)


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
def decode_scale(scale):
    """float32 of a stored scale."""
    if scale.dtype == tl.uint8:
        return half_of_byte(scale) * UNIT_OF_SCALES
    else:
        return scale.to(tl.float32)


@triton.jit
def scale_in_units(scale):
    """The same in units of which a scale of uint8 is a float16."""
    return half_of_byte(scale) if scale.dtype == tl.uint8 else scale.to(tl.float32)


@triton.jit
def largest_exponent(scales):
    """The largest exponent of ``scale_in_units``, as a float16 has it: with a bias of 15."""
    if scales.dtype == tl.uint8:
        return tl.max(scales.to(tl.int32), 0) >> 3
    else:
        return tl.max(scales.to(tl.int16, bitcast=True).to(tl.int32), 0) >> 10


@triton.jit
def decode_mid(mid):
    """float32 of a stored mid point, in scales."""
    if mid.dtype == tl.uint8:
        magnitude = half_of_byte(mid & 0x7F) * UNIT_OF_MIDS
        return tl.where(mid >= 0x80, -magnitude, magnitude)
    else:
        return mid.to(tl.float32)


@triton.jit
def encode_scale(scale, DTYPE: tl.constexpr):
    """float32 ``scale`` >= 0 as DTYPE, uint8 or float16; NaN, infinity and what is too large become NaN."""
    known = scale == scale
    if tl.uint8 == DTYPE:
        code = byte_of_half(tl.where(known, scale * SCALES_OF_UNIT, 0.0))
        return tl.where(known & (code < 0xF8), code, 0xFF).to(tl.uint8)
    else:
        half = scale.to(tl.float16)
        return tl.where(known & (half.to(tl.float32) < float("inf")), half.to(tl.float32), float("nan")).to(tl.float16)


@triton.jit
def encode_norm(norm):
    """float32 token norms as uint8, read by ``decode_scale``: never 0, and NaN is the largest."""
    norm = tl.where(norm < LARGEST_OF_NORMS, tl.maximum(norm, LEAST_OF_NORMS), LARGEST_OF_NORMS)
    return encode_scale(norm, tl.uint8)


@triton.jit
def encode_mid(mid, DTYPE: tl.constexpr):
    """float32 ``mid``, in scales, as DTYPE; beyond the largest the largest, NaN is 0."""
    magnitude = tl.minimum(tl.where(mid == mid, tl.abs(mid), 0.0), LARGEST_OF_MIDS)
    if tl.uint8 == DTYPE:
        code = tl.minimum(byte_of_half(magnitude * MIDS_OF_UNIT), 0x7F)
        return (code | tl.where(mid < 0, 0x80, 0)).to(tl.uint8)
    else:
        return tl.where(mid < 0, -magnitude, magnitude).to(tl.float16)
