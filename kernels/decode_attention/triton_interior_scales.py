"""Scales and mid points of keys for ``triton_interior_keys.py``: as they are stored, in the order of places.

Neighbours are loaded as one integer each, and bytes are decoded two at a time (``small_floats.py``).
"""

from __future__ import annotations

import triton
import triton.language as tl

from xquant_fx.kernels.decode_attention.triton_fragments import field_at, halves
from xquant_fx.kernels.decode_attention.triton_unpack import COUNTS, DIM, GROUP, PLANES, RANKED, STRIDE, code_slot
from xquant_fx.kernels.triton_widths import rank_of_field

# Of a plane of codes: fields of a token, bits of each, words of a token filled up to a power of two, the first word.
FIELDS = tl.constexpr(0)
WIDTH = tl.constexpr(1)
WORDS = tl.constexpr(2)
FIRST = tl.constexpr(3)


@triton.jit
def even_and_odd(x):
    """int32 [N, 2] of the 16-bit numbers of int64 ``x`` [N]: of each four 0 and 2, and 1 and 3."""
    low, high = x.to(tl.int32), (x >> 32).to(tl.int32)
    even = (low & 0xFFFF) | (high << 16)
    return tl.join(even, ((low >> 16) & 0xFFFF) | (high & -65536))


@triton.jit
def halves_of_four(x):
    """float16 [4 * N] of int64 ``x`` [N], of each four 0, 2, 1, 3."""
    return halves(even_and_odd(x))


@triton.jit
def load_run(numbers, index, RUN: tl.constexpr):
    """Of each RUN of 4, 2 or 1 scales (or mid points) from places RUN * ``index`` on: bytes as an integer [N],
    float16 numbers themselves [RUN * N], of each four 0, 2, 1, 3.

    So bytes are decoded where they are used, which leaves no instruction waiting for a load of the next tile.
    """
    if RUN == 1:
        return tl.load(numbers + index)
    elif numbers.dtype.element_ty == tl.uint8:
        kind: tl.constexpr = tl.int32 if RUN == 4 else tl.uint16
        return tl.load(numbers.to(tl.pointer_type(kind), bitcast=True) + index)
    elif RUN == 2:
        return halves(tl.load(numbers.to(tl.pointer_type(tl.int32), bitcast=True) + index)[:, None])
    else:
        return halves_of_four(tl.load(numbers.to(tl.pointer_type(tl.int64), bitcast=True) + index))


@triton.jit
def halves_of_run(x, RUN: tl.constexpr, BYTES: tl.constexpr, SIGNED: tl.constexpr):
    """float16 [RUN * N] of what ``load_run`` gave; bytes are scales, or with SIGNED mid points, in their units."""
    if not BYTES:
        return x
    elif RUN == 1:
        return (x.to(tl.int16) << 7).to(tl.float16, bitcast=True)
    else:
        x = x.to(tl.int32)
        x = tl.join(x, x >> 8) if RUN == 4 else (x | (x << 8))[:, None]
        return halves(((x & 0x007F007F) << 7) | ((x & 0x00800080) << 8) if SIGNED else (x & 0x00FF00FF) << 7)


@triton.jit
def fields_of_runs(RUN: tl.constexpr, PLANE: tl.constexpr):
    """The first field of each RUN neighbouring places of a plane, whose scales are neighbours, too."""
    place = tl.arange(0, PLANE[WORDS] * (32 // PLANE[WIDTH]) // RUN) * RUN
    field, _plane = field_at(place, PLANE[WIDTH], PLANE[WORDS])
    return tl.where(field < PLANE[FIELDS], field, 0)


@triton.jit
def plane_scales(scale, PLANE: tl.constexpr, KEYS: tl.constexpr):
    """The scale of each field of a plane, as ``load_run`` has it."""
    if PLANE[WORDS] == 0:
        return tl.zeros((1,), tl.float16)
    else:
        run: tl.constexpr = 4 if PLANE[WORDS] >= 4 else PLANE[WORDS]
        field = fields_of_runs(run, PLANE)
        if KEYS[RANKED]:
            field = rank_of_field(field, PLANE[WIDTH], KEYS[COUNTS])
        return load_run(scale, field // run, run)


@triton.jit
def interior_scales(keys, t0, CHANNELS_TILE: tl.constexpr, KEYS: tl.constexpr):
    """Scales and mid or zero points of the group of ``t0``, by rank, and scales by place of each plane, as stored."""
    _, scale, zero, _ = keys
    at = code_slot(t0, KEYS) // KEYS[GROUP] * KEYS[STRIDE]
    quad = tl.arange(0, CHANNELS_TILE // 4)
    quad = tl.where(quad * 4 < KEYS[DIM], quad, 0)
    s, mid = load_run(scale + at, quad, 4), load_run(zero + at, quad, 4)
    four = plane_scales(scale + at, KEYS[PLANES][0], KEYS)
    two = plane_scales(scale + at, KEYS[PLANES][1], KEYS)
    return s, mid, four, two, plane_scales(scale + at, KEYS[PLANES][2], KEYS)
