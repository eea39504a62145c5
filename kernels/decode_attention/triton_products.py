"""Products on the matrix unit: operands in a dtype that their numbers fit into, sums in float32."""

from __future__ import annotations

import triton
import triton.language as tl

from xquant_fx.kernels.decode_attention.triton_unpack import DIM, MODEL

# float16 operands are scaled so that their largest number is this.
LARGEST = tl.constexpr(2.0**14)
# What turns codes that were taken for float16 numbers (``unpack``) into themselves.
SUBNORMAL = tl.constexpr(2.0**24)


@triton.jit
def scaled_to_largest(x, largest):
    """``x`` with ``largest`` brought to LARGEST, and the factor that undoes it."""
    largest = tl.where(largest > 0, largest, 1.0)
    return x * (LARGEST / largest), largest * (1.0 / LARGEST)


@triton.jit
def rounded(x, DTYPE: tl.constexpr):
    """``x`` in the dtype that DTYPE names."""
    if DTYPE == "fp16":
        return x.to(tl.float16)
    elif DTYPE == "bf16":
        return x.to(tl.bfloat16)
    else:
        return x.to(tl.float32)


@triton.jit
def product(a, b, DTYPE: tl.constexpr):
    """a @ b in float32, from operands of DTYPE: "fp16", "bf16" or "fp32"."""
    return tl.dot(rounded(a, DTYPE), rounded(b, DTYPE), input_precision="ieee")


@triton.jit
def add_product(sums, a, b, DTYPE: tl.constexpr):
    """``sums`` and a @ b, as ``product`` has it."""
    return tl.dot(rounded(a, DTYPE), rounded(b, DTYPE), sums, input_precision="ieee")


@triton.jit
def full_values(values, slots, valid_tokens, p, CHANNELS_TILE: tl.constexpr, VALUES: tl.constexpr):
    """sum_t p_t v_t [channels, ROWS] of full-precision values in rows ``slots``."""
    d = tl.arange(0, CHANNELS_TILE)
    in_bounds = valid_tokens[None, :] & (d < VALUES[DIM])[:, None]
    v = tl.load(values + slots[None, :] * VALUES[DIM] + d[:, None], mask=in_bounds, other=0.0)
    return product(v, p * LARGEST, VALUES[MODEL]) * (1.0 / LARGEST)
