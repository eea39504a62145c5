"""The quantizer of ``kernels/reference.py`` on tiles in registers: ranges, codes, scales and zero points.

Rounding follows the reference: true divisions, halves to even, whatever is not finite becomes scale 0
and zero point NaN.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Adding and subtracting 1.5 * 2**23 rounds a float32 below 2**22 to an integer, halves to even.
ROUNDER = tl.constexpr(12582912.0)
LARGEST_FLOAT32 = tl.constexpr(3.4028234663852886e38)


@triton.jit
def range_of(x, valid, low, high, AXIS: tl.constexpr):
    """Range of ``x`` where ``valid``, joined with (low, high); +-inf with a NaN or an infinity among them."""
    not_finite = tl.max((valid & ~(tl.abs(x) < float("inf"))).to(tl.int32), AXIS) > 0
    low = tl.minimum(low, tl.min(tl.where(valid, x, float("inf")), AXIS))
    high = tl.maximum(high, tl.max(tl.where(valid, x, float("-inf")), AXIS))
    return tl.where(not_finite, float("-inf"), low), tl.where(not_finite, float("inf"), high)


@triton.jit
def step_of_range(low, high, BITS: tl.constexpr):
    """(low, step) of a range for codes of BITS bits."""
    return step_to(low, high, tl.full(low.shape, (1 << BITS) - 1, tl.float32))


@triton.jit
def step_to(low, high, largest):
    """(low, step) of a range as ``reference.minmax_range`` has them, for codes up to ``largest``."""
    empty = low > high
    low, high = tl.where(empty, 0.0, low), tl.where(empty, 0.0, high)
    step = tl.div_rn(high - low, largest)
    finite = tl.abs(step) < float("inf")
    return tl.where(finite, low, float("nan")), tl.where(finite, step, 0.0)


@triton.jit
def encode(x, low, step, BITS: tl.constexpr):
    """Codes of BITS bits as int32; 0 throughout where ``step`` is 0."""
    return encode_to(x, low, step, (1 << BITS) - 1.0)


@triton.jit
def encode_to(x, low, step, largest):
    """The same up to ``largest``."""
    exact = tl.div_rn(x - low, tl.where(step > 0, step, 1.0) + tl.zeros(x.shape, tl.float32))
    encodable = (step > 0) & (exact == exact)
    clamped = tl.minimum(tl.maximum(tl.where(encodable, exact, 0.0), 0.0), largest)
    return ((clamped + ROUNDER) - ROUNDER).to(tl.int32)


@triton.jit
def relaxed(low, step, BITS: tl.constexpr, ETA: tl.constexpr):
    """Scale and zero point of a range, relaxed by ETA at both ends."""
    return step * (1 - 2 * ETA), low + step * (ETA * ((1 << BITS) - 1))


@triton.jit
def fitted(cov, var, mean_x, mean_c):
    """Scale and zero point of a least-squares fit."""
    s = tl.where(var > 0, tl.div_rn(cov, tl.where(var > 0, var, 1.0)), 0.0)
    return s, mean_x - s * mean_c


@triton.jit
def store_scales(scale, zero, offsets, s, z, in_bounds):
    """Round to the stored dtype; (0, NaN) where either does not fit it."""
    s, z = s.to(scale.dtype.element_ty), z.to(zero.dtype.element_ty)
    # Compared in float32, which holds all of them.
    fits = (tl.abs(s.to(tl.float32)) < float("inf")) & (tl.abs(z.to(tl.float32)) < float("inf"))
    tl.store(scale + offsets, tl.where(fits, s.to(tl.float32), 0.0).to(scale.dtype.element_ty), mask=in_bounds)
    tl.store(zero + offsets, tl.where(fits, z.to(tl.float32), float("nan")).to(zero.dtype.element_ty), mask=in_bounds)


@triton.jit
def code_shift(i, BITS: tl.constexpr):
    """Bit of a word where field ``i``, of BITS bits, begins (``kernels/packing.py``)."""
    r = i % (32 // BITS)
    return 8 * (r % 4) + BITS * (r // 4)
