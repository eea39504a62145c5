"""How a program appends its part of one decode step: ``plain_torch.py``, for what is not ranked or rotated.

A program has a side (``triton_append.py``), a batch row, a head, some channels and, for keys, one group of tokens. It
writes its channels of the new tokens to the ring and to the sinks. Then it quantizes what the step makes due, and
most steps make nothing due for keys: one comparison with the position, on the device. Programs do not
wait for each other: new tokens are read from the step's own tensor, older ones from ring slots that
the step does not write (the ring has STEP_TOKENS slots more than the window, or more). The first program of a side also
checks the positions and notes the new length.

FIT is "own" where a layer has codes of its own; else it borrows codes, and FIT says how its scales are
made: "minmax" from the range, "least_squares" fitted to the codes. The pieces:

    triton_append.py     the kernel, of one side or both
    triton_window.py     tokens in full precision
    triton_keys.py       quantizing a group of tokens of keys
    triton_values.py     quantizing a token of values
    triton_quantizer.py  ranges, codes, scales and zero points
    triton_ranked.py     the same of keys whose channels are ranked
    triton_rotated.py    the same of values that are rotated
"""

from __future__ import annotations

import triton
import triton.language as tl

from xquant_fx.kernels.faults import Fault
from xquant_fx.kernels.layout import STEP_TOKENS
from xquant_fx.kernels.quantize_store.triton_keys import flush_keys
from xquant_fx.kernels.quantize_store.triton_values import flush_values
from xquant_fx.kernels.quantize_store.triton_window import source_of, turns_before, write_step

NOT_APPENDED = tl.constexpr(int(Fault.NOT_APPENDED))
FULL = tl.constexpr(int(Fault.FULL))
ROLLED_BACK_TOO_FAR = tl.constexpr(int(Fault.ROLLED_BACK_TOO_FAR))
NOT_CONSECUTIVE = tl.constexpr(int(Fault.NOT_CONSECUTIVE))
STEP = tl.constexpr(STEP_TOKENS)
RESTARTED = tl.constexpr(int(Fault.RESTARTED))


@triton.jit
def note_step(
    pos,
    length,
    fault,
    past,
    NEW_TOKENS: tl.constexpr,
    NEW_TILE: tl.constexpr,
    MAX_LEN: tl.constexpr,
    ROLLBACK: tl.constexpr,
    RAGGED: tl.constexpr,
):
    """Faults and length, as ``fault_code`` and ``advance`` have them; ``past`` is within bounds.

    A row with positions of its own begins anew at 0 unless it is full.
    """
    j = tl.arange(0, NEW_TILE)
    asked = tl.load(pos)
    stored, furthest = tl.load(length), tl.load(length + 1)
    if RAGGED:
        goes_on = (asked != 0) | (stored == MAX_LEN)
        stored, furthest = tl.where(goes_on, stored, 0), tl.where(goes_on, furthest, 0)
    code = tl.where((asked > stored) | (asked < 0), NOT_APPENDED, 0)
    code = tl.where(asked + NEW_TOKENS > MAX_LEN, FULL, code)
    code = tl.where((asked > 0) & (furthest - asked > ROLLBACK), ROLLED_BACK_TOO_FAR, code)
    code = tl.where((asked == 0) & ((stored == MAX_LEN) | (stored > STEP)), RESTARTED, code)
    in_step = j < NEW_TOKENS
    jumps = tl.sum(((tl.load(pos + j, mask=in_step, other=0) != asked + j) & in_step).to(tl.int32), 0)
    code = tl.where(jumps > 0, NOT_CONSECUTIVE, code)
    if code > 0:  # both sides have one fault, and may be in one launch
        tl.atomic_max(fault, code)
    stored = (past + NEW_TOKENS).to(tl.int64)
    tl.store(length, stored)
    tl.store(length + 1, tl.where(past == 0, stored, tl.maximum(furthest, stored)))


@triton.jit
def begin_step(
    program, row, x, ring, pos, start, length, fault,
    PROGRAMS: tl.constexpr, HEADS: tl.constexpr, NEW_TOKENS: tl.constexpr, NEW_TILE: tl.constexpr, DIM: tl.constexpr,
    RING: tl.constexpr, RESIDUAL: tl.constexpr, MAX_LEN: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """(head among all rows, first token of the batch row, its positions, source) of a program with ``row``, a batch row
    and head, of which each has PROGRAMS.

    The first program of a side notes the step; with RAGGED, the first of each batch row notes that of the row.
    """
    head = row.to(tl.int64)
    notes = program == 0
    if RAGGED:
        batch = row // HEADS
        pos, length, fault = pos + batch * NEW_TOKENS, length + batch * 2, fault + batch
        notes = program % (HEADS * PROGRAMS) == 0
    source = source_of(x, ring, pos, head, NEW_TOKENS, DIM, RING, MAX_LEN)
    _, _, past = source
    if notes:
        note_step(pos, length, fault, past, NEW_TOKENS, NEW_TILE, MAX_LEN, RING - RESIDUAL, RAGGED)
    return head, tl.load(start + row // HEADS).to(tl.int32), pos, source


@triton.jit
def append_blocks(
    program, x, pos, codes, scale, zero, ring, sink, start, length, fault,
    HEADS: tl.constexpr, NEW_TOKENS: tl.constexpr, NEW_TILE: tl.constexpr, DIM: tl.constexpr, RING: tl.constexpr,
    SINK_TOKENS: tl.constexpr, RESIDUAL: tl.constexpr, GROUP: tl.constexpr, MAX_LEN: tl.constexpr,
    WRAP: tl.constexpr, RAGGED: tl.constexpr, BITS: tl.constexpr, LOW: tl.constexpr, ETA: tl.constexpr,
    FIT: tl.constexpr, TOKENS: tl.constexpr, GROUPS: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """A program has a batch row and head, a group of tokens that the step may complete, and a chunk of channels."""
    CHUNKS: tl.constexpr = (DIM + CHUNK - 1) // CHUNK
    DUE: tl.constexpr = (NEW_TOKENS + RESIDUAL - 1) // RESIDUAL * (RESIDUAL // GROUP)
    row, part, chunk = program // CHUNKS // DUE, program // CHUNKS % DUE, program % CHUNKS
    head, first_token, pos, source = begin_step(
        program, row, x, ring, pos, start, length, fault,
        DUE * CHUNKS, HEADS, NEW_TOKENS, NEW_TILE, DIM, RING, RESIDUAL, MAX_LEN, RAGGED,
    )  # fmt: skip
    _, _, past = source
    d = chunk * CHUNK + tl.arange(0, CHUNK)
    if part == 0:
        write_step(source, pos, sink, head, first_token, d, d < DIM, NEW_TOKENS, NEW_TILE, DIM, RING, SINK_TOKENS)
    block = past // RESIDUAL * RESIDUAL + part * GROUP // RESIDUAL * RESIDUAL
    if past + NEW_TOKENS >= block + RESIDUAL:
        HIGH_WORDS: tl.constexpr = (DIM * (BITS - LOW) + 31) // 32
        codes += head * ((HIGH_WORDS + (DIM * LOW + 31) // 32) * TOKENS)
        scale += head * (GROUPS * DIM)
        zero += head * (GROUPS * DIM)
        t0 = past // RESIDUAL * RESIDUAL + part * GROUP
        before = turns_before(t0, WRAP)
        codes -= before
        flush_keys(
            source, codes, codes + HIGH_WORDS * TOKENS, scale - before // GROUP * DIM, zero - before // GROUP * DIM,
            first_token + SINK_TOKENS, t0, chunk * CHUNK,
            DIM, RING, GROUP, TILE, CHUNK, BITS, LOW, TOKENS, ETA, FIT,
        )  # fmt: skip


@triton.jit
def append_tokens(
    program, x, pos, codes, scale, zero, ring, sink, start, length, fault,
    HEADS: tl.constexpr, NEW_TOKENS: tl.constexpr, NEW_TILE: tl.constexpr, DIM: tl.constexpr, RING: tl.constexpr,
    SINK_TOKENS: tl.constexpr, RESIDUAL: tl.constexpr, GROUP: tl.constexpr, MAX_LEN: tl.constexpr,
    WRAP: tl.constexpr, RAGGED: tl.constexpr, BITS: tl.constexpr, LOW: tl.constexpr, ETA: tl.constexpr,
    FIT: tl.constexpr, WORDS: tl.constexpr, STRIDE: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """A program has a batch row and head, and a group of channels: it quantizes each token that leaves the window."""
    row, group = program // (DIM // GROUP), program % (DIM // GROUP)
    head, first_token, pos, source = begin_step(
        program, row, x, ring, pos, start, length, fault,
        DIM // GROUP, HEADS, NEW_TOKENS, NEW_TILE, DIM, RING, RESIDUAL, MAX_LEN, RAGGED,
    )  # fmt: skip
    codes += head * (WORDS * DIM)
    scale += (head * (DIM // GROUP) + group) * STRIDE
    zero += (head * (DIM // GROUP) + group) * STRIDE
    i = tl.arange(0, CHUNK)
    d, valid_channels = group * GROUP + i, i < GROUP
    write_step(source, pos, sink, head, first_token, d, valid_channels, NEW_TOKENS, NEW_TILE, DIM, RING, SINK_TOKENS)
    flush_values(
        source, codes, codes + STRIDE * (BITS - LOW) // 32 * DIM, scale, zero, d, valid_channels,
        NEW_TOKENS, NEW_TILE, DIM, RING, RESIDUAL, GROUP, WRAP, BITS, LOW, ETA, FIT,
    )  # fmt: skip
