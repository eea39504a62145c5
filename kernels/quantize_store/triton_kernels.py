"""Triton kernels that append the tokens of one decode step: ``kernels/store.py`` in one launch a side.

A program has a batch row, a head, some channels and, for keys, one group of tokens. It writes its
channels of the new tokens to the ring and to the sinks. Then it quantizes what the step makes due, and
most steps make nothing due for keys: one comparison with the position, on the device. Programs do not
wait for each other: new tokens are read from the step's own tensor, older ones from ring slots that
the step does not write (the ring has STEP_TOKENS slots more than the window). The first program also
checks the positions and notes the new length.

Rounding follows ``kernels/reference.py``: true divisions, halves to even, whatever is not finite
becomes scale 0 and zero point NaN.
"""

from __future__ import annotations

import triton
import triton.language as tl

from xquant_fx.kernels.faults import Fault

NOT_APPENDED = tl.constexpr(int(Fault.NOT_APPENDED))
FULL = tl.constexpr(int(Fault.FULL))
ROLLED_BACK_TOO_FAR = tl.constexpr(int(Fault.ROLLED_BACK_TOO_FAR))
NOT_CONSECUTIVE = tl.constexpr(int(Fault.NOT_CONSECUTIVE))
FULL_RESTARTED = tl.constexpr(int(Fault.FULL_RESTARTED))
# Adding and subtracting 1.5 * 2**23 rounds a float32 below 2**22 to an integer, halves to even.
ROUNDER = tl.constexpr(12582912.0)


@triton.jit
def note_step(pos_ptr, length_ptr, fault_ptr, past, NEW: tl.constexpr, NEW_TILE: tl.constexpr, MAX_LEN: tl.constexpr,
              STEP_TOKENS: tl.constexpr):  # fmt: skip
    """Faults and length, as ``store.fault_code`` and ``store.advance`` have them; ``past`` is within bounds."""
    j = tl.arange(0, NEW_TILE)
    asked = tl.load(pos_ptr)
    stored, furthest = tl.load(length_ptr), tl.load(length_ptr + 1)
    code = tl.where((asked > stored) | (asked < 0), NOT_APPENDED, 0)
    code = tl.where(asked + NEW > MAX_LEN, FULL, code)
    code = tl.where((asked > 0) & (furthest - asked > STEP_TOKENS), ROLLED_BACK_TOO_FAR, code)
    code = tl.where((asked == 0) & (stored == MAX_LEN), FULL_RESTARTED, code)
    jumps = tl.sum(((tl.load(pos_ptr + j, mask=j < NEW, other=0) != asked + j) & (j < NEW)).to(tl.int32), 0)
    code = tl.where(jumps > 0, NOT_CONSECUTIVE, code)
    tl.store(fault_ptr, tl.maximum(tl.load(fault_ptr), code))
    stored = (past + NEW).to(tl.int64)
    tl.store(length_ptr, stored)
    tl.store(length_ptr + 1, tl.where(past == 0, stored, tl.maximum(furthest, stored)))


@triton.jit
def write_step(x, pos_ptr, ring, sink, start, past, d, some, NEW: tl.constexpr, NEW_TILE: tl.constexpr,
               DIM: tl.constexpr, RING: tl.constexpr, SINKS: tl.constexpr):  # fmt: skip
    """Channels ``d`` of the new tokens into the ring and the sinks."""
    j = tl.arange(0, NEW_TILE)
    here = (j < NEW)[:, None] & some[None, :]
    tokens = tl.load(x + j[:, None] * DIM + d[None, :], mask=here, other=0.0).to(ring.dtype.element_ty)
    tl.store(ring + ((past + j) % RING)[:, None] * DIM + d[None, :], tokens, mask=here)
    if SINKS > 0:
        slot = tl.load(pos_ptr + j, mask=j < NEW, other=0) - start
        kept = here & ((slot >= 0) & (slot < SINKS))[:, None]
        tl.store(sink + slot[:, None] * DIM + d[None, :], tokens, mask=kept)


@triton.jit
def window(x, ring, tokens, past, d, some, DIM: tl.constexpr, RING: tl.constexpr):
    """Full-precision ``tokens`` [tokens, channels] as float32: the step's own from ``x``, others from the ring."""
    old = some & (tokens < past)[:, None]
    new = some & (tokens >= past)[:, None]
    before = tl.load(ring + (tokens % RING)[:, None] * DIM + d[None, :], mask=old, other=0.0)
    step = tl.load(x + (tokens - past)[:, None] * DIM + d[None, :], mask=new, other=0.0).to(ring.dtype.element_ty)
    return tl.where(old, before.to(tl.float32), step.to(tl.float32))


@triton.jit
def spread(x, valid, low, high, AXIS: tl.constexpr):
    """Range of ``x`` where ``valid``, joined with (low, high); +-inf with a NaN or an infinity among them."""
    bad = tl.max((valid & ~(tl.abs(x) < float("inf"))).to(tl.int32), AXIS) > 0
    low = tl.minimum(low, tl.min(tl.where(valid, x, float("inf")), AXIS))
    high = tl.maximum(high, tl.max(tl.where(valid, x, float("-inf")), AXIS))
    return tl.where(bad, float("-inf"), low), tl.where(bad, float("inf"), high)


@triton.jit
def steps_of(low, high, BITS: tl.constexpr):
    """(low, step) of a range as ``reference.minmax_range`` has them."""
    empty = low > high
    low, high = tl.where(empty, 0.0, low), tl.where(empty, 0.0, high)
    step = tl.div_rn(high - low, tl.full(low.shape, (1 << BITS) - 1, tl.float32))
    finite = tl.abs(step) < float("inf")
    return tl.where(finite, low, float("nan")), tl.where(finite, step, 0.0)


@triton.jit
def encode(x, low, step, BITS: tl.constexpr):
    """Codes as int32; 0 throughout where ``step`` is 0."""
    exact = tl.div_rn(x - low, tl.where(step > 0, step, 1.0) + tl.zeros(x.shape, tl.float32))
    some = (step > 0) & (exact == exact)
    near = tl.minimum(tl.maximum(tl.where(some, exact, 0.0), 0.0), (1 << BITS) - 1.0)
    return ((near + ROUNDER) - ROUNDER).to(tl.int32)


@triton.jit
def store_scales(scale, zero, at, s, z, some):
    """Round to the stored dtype; (0, NaN) where either does not fit it."""
    s, z = s.to(scale.dtype.element_ty), z.to(zero.dtype.element_ty)
    # Compared in float32, which holds all of them.
    fits = (tl.abs(s.to(tl.float32)) < float("inf")) & (tl.abs(z.to(tl.float32)) < float("inf"))
    tl.store(scale + at, tl.where(fits, s.to(tl.float32), 0.0).to(scale.dtype.element_ty), mask=some)
    tl.store(zero + at, tl.where(fits, z.to(tl.float32), float("nan")).to(zero.dtype.element_ty), mask=some)


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
def code_at(i, BITS: tl.constexpr):
    """Bit of a word where code ``i`` of it is (``kernels/packing.py``)."""
    r = i % (32 // BITS)
    return 8 * (r % 4) + BITS * (r // 4)


@triton.jit
def flush_keys(
    x, codes, scale, zero, ring, past, first_valid, t0, d0, BITS: tl.constexpr, GROUP: tl.constexpr,
    DIM: tl.constexpr, RING: tl.constexpr, TOKENS: tl.constexpr, ETA: tl.constexpr, FIT: tl.constexpr,
    CHUNK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Quantize CHUNK channels from ``d0`` on of the group of tokens at ``t0``, or fit scales to their codes."""
    d = d0 + tl.arange(0, CHUNK)
    some = d < DIM
    low = tl.full((CHUNK,), float("inf"), tl.float32)
    high = tl.full((CHUNK,), float("-inf"), tl.float32)
    sum_x, sum_c, count = tl.zeros((CHUNK,), tl.float32), tl.zeros((CHUNK,), tl.float32), tl.zeros((CHUNK,), tl.float32)
    for i in range(0, GROUP, TILE):
        j = i + tl.arange(0, TILE)
        tokens = t0 + j
        here = (j < GROUP)[:, None] & some[None, :]
        valid = here & (tokens >= first_valid)[:, None]
        v = window(x, ring, tokens, past, d, here, DIM, RING)
        if FIT == "least_squares":
            c = stored_keys(codes, tokens, d, here, BITS, TOKENS)
            sum_x += tl.sum(tl.where(valid, v, 0.0), 0)
            sum_c += tl.sum(tl.where(valid, c, 0.0), 0)
            count += tl.sum(valid.to(tl.float32), 0)
        else:
            low, high = spread(v, valid, low, high, 0)
    low, step = steps_of(low, high, BITS)
    count = tl.maximum(count, 1.0)
    mean_x, mean_c = tl.div_rn(sum_x, count), tl.div_rn(sum_c, count)
    cov, var = tl.zeros((CHUNK,), tl.float32), tl.zeros((CHUNK,), tl.float32)
    if FIT != "minmax":
        for i in range(0, GROUP, TILE):
            j = i + tl.arange(0, TILE)
            tokens = t0 + j
            here = (j < GROUP)[:, None] & some[None, :]
            v = window(x, ring, tokens, past, d, here, DIM, RING)
            if FIT == "least_squares":
                valid = here & (tokens >= first_valid)[:, None]
                c = stored_keys(codes, tokens, d, here, BITS, TOKENS)
                off_x = tl.where(valid, v - mean_x[None, :], 0.0)
                off_c = tl.where(valid, c - mean_c[None, :], 0.0)
                cov += tl.sum(off_c * off_x, 0)
                var += tl.sum(off_c * off_c, 0)
            else:
                c = tl.where(here, encode(v, low[None, :], step[None, :], BITS), 0)
                store_keys(codes, c << code_at(d, BITS)[None, :], tokens, d0, j < GROUP, BITS, DIM, TOKENS)
    s, z = fitted(cov, var, mean_x, mean_c) if FIT == "least_squares" else relaxed(low, step, BITS, ETA)
    store_scales(scale, zero, t0 // GROUP * DIM + d, s, z, some)


@triton.jit
def stored_keys(codes, tokens, d, some, BITS: tl.constexpr, TOKENS: tl.constexpr):
    """Codes [tokens, channels] of keys as float32."""
    words = tl.load(codes + (d // (32 // BITS))[None, :] * TOKENS + tokens[:, None], mask=some, other=0)
    return ((words >> code_at(d, BITS)[None, :]) & ((1 << BITS) - 1)).to(tl.float32)


@triton.jit
def store_keys(codes, shifted, tokens, d0, some, BITS: tl.constexpr, DIM: tl.constexpr, TOKENS: tl.constexpr):
    """Put codes [tokens, channels], each at its place in a word, together and store the words."""
    per: tl.constexpr = 32 // BITS
    count: tl.constexpr = shifted.shape[1] // per
    words = tl.sum(tl.reshape(shifted, (shifted.shape[0], count, per)), 2)
    w = d0 // per + tl.arange(0, count)
    here = some[:, None] & (w < (DIM + per - 1) // per)[None, :]
    tl.store(codes + w[None, :] * TOKENS + tokens[:, None], words, mask=here)


@triton.jit
def append_keys_kernel(
    x, pos_ptr, codes, scale, zero, ring, sink, start_ptr, length_ptr, fault_ptr,
    HEADS: tl.constexpr, NEW: tl.constexpr, NEW_TILE: tl.constexpr, DIM: tl.constexpr, RING: tl.constexpr,
    SINKS: tl.constexpr, RESIDUAL: tl.constexpr, GROUP: tl.constexpr, BITS: tl.constexpr, ETA: tl.constexpr,
    FIT: tl.constexpr, MAX_LEN: tl.constexpr, STEP_TOKENS: tl.constexpr, TOKENS: tl.constexpr, GROUPS: tl.constexpr,
    CHUNK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Program (batch and head, group of tokens that the step may complete, chunk of channels)."""
    bh, part, chunk = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    at = bh.to(tl.int64)
    x += at * (NEW * DIM)
    ring += at * (RING * DIM)
    start = tl.load(start_ptr + bh // HEADS).to(tl.int32)
    past = tl.maximum(tl.minimum(tl.load(pos_ptr), MAX_LEN - NEW), 0).to(tl.int32)
    d = chunk * CHUNK + tl.arange(0, CHUNK)
    if part == 0:
        kept = sink + at * ((SINKS + 1) * DIM) if SINKS > 0 else ring
        write_step(x, pos_ptr, ring, kept, start, past, d, d < DIM, NEW, NEW_TILE, DIM, RING, SINKS)
    if bh + part + chunk == 0:
        note_step(pos_ptr, length_ptr, fault_ptr, past, NEW, NEW_TILE, MAX_LEN, STEP_TOKENS)
    block = past // RESIDUAL * RESIDUAL + part * GROUP // RESIDUAL * RESIDUAL
    if past + NEW >= block + RESIDUAL:
        codes += at * ((DIM * BITS + 31) // 32 * TOKENS)
        scale += at * (GROUPS * DIM)
        zero += at * (GROUPS * DIM)
        t0 = past // RESIDUAL * RESIDUAL + part * GROUP
        flush_keys(
            x, codes, scale, zero, ring, past, start + SINKS, t0, chunk * CHUNK, BITS, GROUP, DIM, RING, TOKENS, ETA,
            FIT, CHUNK, TILE,
        )


@triton.jit
def append_values_kernel(
    x, pos_ptr, codes, scale, zero, ring, sink, start_ptr, length_ptr, fault_ptr,
    HEADS: tl.constexpr, NEW: tl.constexpr, NEW_TILE: tl.constexpr, DIM: tl.constexpr, RING: tl.constexpr,
    SINKS: tl.constexpr, RESIDUAL: tl.constexpr, GROUP: tl.constexpr, BITS: tl.constexpr, ETA: tl.constexpr,
    FIT: tl.constexpr, MAX_LEN: tl.constexpr, STEP_TOKENS: tl.constexpr, WORDS: tl.constexpr, STRIDE: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """Program (batch and head, group of channels): quantize each token that leaves the window."""
    per: tl.constexpr = 32 // BITS
    bh, group = tl.program_id(0), tl.program_id(1)
    at = bh.to(tl.int64)
    x += at * (NEW * DIM)
    ring += at * (RING * DIM)
    codes += at * (WORDS * DIM)
    scale += (at * (DIM // GROUP) + group) * STRIDE
    zero += (at * (DIM // GROUP) + group) * STRIDE
    start = tl.load(start_ptr + bh // HEADS).to(tl.int32)
    past = tl.maximum(tl.minimum(tl.load(pos_ptr), MAX_LEN - NEW), 0).to(tl.int32)
    i = tl.arange(0, CHUNK)
    d, some = group * GROUP + i, i < GROUP
    kept = sink + at * ((SINKS + 1) * DIM) if SINKS > 0 else ring
    write_step(x, pos_ptr, ring, kept, start, past, d, some, NEW, NEW_TILE, DIM, RING, SINKS)
    if bh + group == 0:
        note_step(pos_ptr, length_ptr, fault_ptr, past, NEW, NEW_TILE, MAX_LEN, STEP_TOKENS)

    j = tl.arange(0, NEW_TILE)
    tokens = past - RESIDUAL + j
    due = (j < NEW) & (tokens >= 0)
    tokens = tl.where(due, tokens, 0)
    here = due[:, None] & some[None, :]
    v = window(x, ring, tokens, past, d, here, DIM, RING)
    if FIT == "least_squares":
        words = tl.load(codes + (tokens // per)[:, None] * DIM + d[None, :], mask=here, other=0)
        c = ((words >> code_at(tokens, BITS)[:, None]) & ((1 << BITS) - 1)).to(tl.float32)
        n = tl.full((NEW_TILE,), GROUP, tl.float32)
        mean_x, mean_c = tl.div_rn(tl.sum(v, 1), n), tl.div_rn(tl.sum(tl.where(here, c, 0.0), 1), n)
        off_x = tl.where(here, v - mean_x[:, None], 0.0)
        off_c = tl.where(here, c - mean_c[:, None], 0.0)
        s, z = fitted(tl.sum(off_c * off_x, 1), tl.sum(off_c * off_c, 1), mean_x, mean_c)
    else:
        low = tl.full((NEW_TILE,), float("inf"), tl.float32)
        low, high = spread(v, here, low, tl.full((NEW_TILE,), float("-inf"), tl.float32), 1)
        low, step = steps_of(low, high, BITS)
        s, z = relaxed(low, step, BITS, ETA)
    store_scales(scale, zero, tokens, s, z, due)
    if FIT == "own":
        c = tl.where(here, encode(v, low[:, None], step[:, None], BITS), 0)
        shift = code_at(tokens, BITS)
        # The tokens of a step are in few words, each of which is read, changed and written once.
        for w in tl.static_range((NEW - 1) // per + 2):
            row = tl.maximum(past - RESIDUAL, 0) // per + w
            mine = due & (tokens // per == row)
            touched = some & ((row + tl.arange(0, 1)) * per < past - RESIDUAL + NEW)
            old = tl.load(codes + row * DIM + d, mask=touched, other=0)
            gone = tl.sum(tl.where(mine, ((1 << BITS) - 1) << shift, 0), 0)
            bits = tl.sum(tl.where(mine[:, None], c << shift[:, None], 0), 0)
            tl.store(codes + row * DIM + d, (old & ~gone) | bits, mask=touched)
