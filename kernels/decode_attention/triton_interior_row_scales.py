"""Scales and mid or zero points of keys for ``triton_interior_row_keys.py``: as stored, then as pairs of float16.

Neighbours are loaded as one integer and stay two to a register, also where they are bytes (``small_floats.py``).
"""

from __future__ import annotations

import triton
import triton.language as tl

from xquant_fx.kernels.decode_attention.triton_fragments import pairs_of_halves
from xquant_fx.kernels.decode_attention.triton_interior_scales import WIDTH, WORDS, even_and_odd, fields_of_runs
from xquant_fx.kernels.decode_attention.triton_unpack import (
    CHANNELS,
    COUNTS,
    DIM,
    GROUP,
    PLANES,
    RANKED,
    STRIDE,
    code_slot,
)
from xquant_fx.kernels.triton_small_floats import half_of_byte
from xquant_fx.kernels.triton_widths import rank_of_field


@triton.jit
def most_of(x):
    """The largest magnitude of ``x``, which one instruction finds among a warp's integers; NaN is the largest."""
    return tl.max(x.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF, 0).to(tl.float32, bitcast=True)


@triton.jit
def most_of_pairs(x):
    """float32: the largest magnitude of float16 numbers, two in each int32; NaN is the largest."""
    most = tl.max(tl.maximum(x & 0x7FFF, (x >> 16) & 0x7FFF), 0)
    return most.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def most_of_scales(x, BYTES: tl.constexpr):
    """float32: the largest of the scales, as stored, in words ``x``; in their unit."""
    if BYTES:
        most = tl.maximum(tl.maximum(x & 255, (x >> 8) & 255), tl.maximum((x >> 16) & 255, (x >> 24) & 255))
        return half_of_byte(tl.max(most, 0).to(tl.uint8))
    else:
        return most_of_pairs(x)


@triton.jit
def load_numbers(numbers, index, RUN: tl.constexpr):
    """Of each RUN of 4, 2 or 1 scales (or mid or zero points) from RUN * ``index`` on, as stored: one integer."""
    if numbers.dtype.element_ty == tl.uint8:
        of_bytes: tl.constexpr = tl.int32 if RUN == 4 else tl.uint16 if RUN == 2 else tl.uint8
        return tl.load(numbers.to(tl.pointer_type(of_bytes), bitcast=True) + index)
    else:
        of_halves: tl.constexpr = tl.int64 if RUN == 4 else tl.int32 if RUN == 2 else tl.int16
        return tl.load(numbers.to(tl.pointer_type(of_halves), bitcast=True) + index)


@triton.jit
def plane_numbers(numbers, PLANE: tl.constexpr, KEYS: tl.constexpr):
    """``load_numbers`` of a plane in the order of places: runs are neighbours there, too."""
    if PLANE[WORDS] == 0:
        return tl.zeros((1,), tl.int32)
    else:
        run: tl.constexpr = 4 if PLANE[WORDS] >= 4 else PLANE[WORDS]
        field = fields_of_runs(run, PLANE)
        if KEYS[RANKED]:
            field = rank_of_field(field, PLANE[WIDTH], KEYS[COUNTS])
        return load_numbers(numbers, field // run, run)


@triton.jit
def numbers_of_none(numbers, KEYS: tl.constexpr):
    """``load_numbers`` of the ranks of no bits."""
    NONE: tl.constexpr = KEYS[DIM] - KEYS[COUNTS][0] if KEYS[RANKED] else 0
    if NONE == 0:
        return tl.zeros((1,), tl.int32)
    else:
        quad = KEYS[COUNTS][0] // 4 + tl.arange(0, 4 if NONE <= 16 else 8 if NONE <= 32 else 16)
        return load_numbers(numbers, tl.where(quad * 4 < KEYS[DIM], quad, 0), 4)


@triton.jit
def halves_of_bytes(x, SIGNED: tl.constexpr):
    """int32: bytes 0 and 2 of int32 ``x``, scales or with SIGNED mid points, as float16 numbers in their units."""
    if SIGNED:
        return ((x << 7) & 0x3F803F80) | ((x << 8) & -0x7FFF8000)
    else:
        return (x << 7) & 0x7F807F80


@triton.jit
def pairs_of_run(x, RUN: tl.constexpr, BYTES: tl.constexpr, SIGNED: tl.constexpr):
    """What ``load_numbers`` gave as float16 numbers, two neighbours in each int32, of each four 0 and 2, 1 and 3."""
    if RUN == 1:
        if BYTES:
            x = x.to(tl.int16)
            x = ((x & 127) << 7) | ((x >> 7) << 15) if SIGNED else x << 7
        x = pairs_of_halves(x.to(tl.float16, bitcast=True)[None, :])
        return tl.reshape(x, (x.shape[1],))
    elif RUN == 2:
        if BYTES:
            x = x.to(tl.int32)
            x = halves_of_bytes(x | (x << 8), SIGNED)
        return x
    elif BYTES:
        return tl.reshape(tl.join(halves_of_bytes(x, SIGNED), halves_of_bytes(x >> 8, SIGNED)), (2 * x.shape[0],))
    else:
        return tl.reshape(even_and_odd(x), (2 * x.shape[0],))


@triton.jit
def plane_pairs(x, BYTES: tl.constexpr, SIGNED: tl.constexpr, PLANE: tl.constexpr):
    """What ``plane_numbers`` gave as float16 numbers, two places in each int32: [places / 2]."""
    return pairs_of_run(x, 4 if PLANE[WORDS] >= 4 else PLANE[WORDS], BYTES, SIGNED)


@triton.jit
def group_scales(keys, t0, KEYS: tl.constexpr):
    """(scales, mid or zero points), as stored, of each plane and of ranks without bits, and all scales, a word each,
    for the group of ``t0``."""
    _codes, scale, zero, _norms = keys
    at = code_slot(t0, KEYS) // KEYS[GROUP] * KEYS[STRIDE]
    s, z = scale + at, zero + at
    four = plane_numbers(s, KEYS[PLANES][0], KEYS), plane_numbers(z, KEYS[PLANES][0], KEYS)
    two = plane_numbers(s, KEYS[PLANES][1], KEYS), plane_numbers(z, KEYS[PLANES][1], KEYS)
    one = plane_numbers(s, KEYS[PLANES][2], KEYS), plane_numbers(z, KEYS[PLANES][2], KEYS)
    none = numbers_of_none(s, KEYS), numbers_of_none(z, KEYS)
    # A load of their own, for the largest: what nothing else wants Triton brings to the operand once.
    if scale.dtype.element_ty == tl.uint8:
        word = tl.arange(0, KEYS[CHANNELS] // 4)
        word = tl.where(word * 4 < KEYS[DIM], word, 0)
    else:
        word = tl.arange(0, KEYS[CHANNELS] // 2)
        word = tl.where(word * 2 < KEYS[DIM], word, 0)
    return four, two, one, none, tl.load(s.to(tl.pointer_type(tl.int32), bitcast=True) + word)
