"""The rotation of values (``rotation.py``) in Triton: along the first axis of a tile [channels, N]."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def rotation_signs(channel):
    """+1 or -1 per channel: bit 16 of a product of which 32 bits are enough."""
    return 1.0 - 2.0 * ((channel.to(tl.uint32) * 2654435761) >> 16 & 1).to(tl.float32)


@triton.jit
def hadamard(x, LEVELS: tl.constexpr):
    """H ``x`` for every piece of 2**LEVELS rows, +1 and -1 in H: sums and differences of neighbours, level by level."""
    rows: tl.constexpr = x.shape[0]
    columns: tl.constexpr = x.shape[1]
    for level in tl.static_range(LEVELS):
        x = tl.permute(tl.reshape(x, (rows >> (level + 1), 2, 1 << level, columns)), (0, 2, 3, 1))
        low, high = tl.split(x)
        x = tl.reshape(tl.permute(tl.join(low + high, low - high), (0, 3, 1, 2)), (rows, columns))
    return x


@triton.jit
def rotate(x, LEVELS: tl.constexpr):
    """Rows of ``x``, channels in float32, rotated in pieces of 2**LEVELS."""
    signs = rotation_signs(tl.arange(0, x.shape[0]))
    return hadamard(x * signs[:, None], LEVELS) * (2.0 ** (-LEVELS / 2))


@triton.jit
def rotate_back(y, LEVELS: tl.constexpr):
    """Undo ``rotate``."""
    signs = rotation_signs(tl.arange(0, y.shape[0])) * (2.0 ** (-LEVELS / 2))
    return hadamard(y, LEVELS) * signs[:, None]
