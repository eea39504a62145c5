"""``xquant::quantize_store``: write a step's tokens, quantize those that leave full precision.

Plain torch on whole tensors, without reading a position on the host, so that it runs inside CUDA
graphs. A position that is not due goes to padding that no reader reaches. A step of up to
STEP_TOKENS tokens writes the ring first and quantizes out of it; a longer chunk quantizes straight
out of the chunk and leaves its last tokens in the ring.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from xquant_fx.kernels.layout import STEP_TOKENS, ring_slots
from xquant_fx.kernels.packing import pack_words, shifts, unpack_words
from xquant_fx.kernels.reference import fit_codes, own_codes


class Side(NamedTuple):
    """The stored tensors of one side of one layer and its static settings (see ``KVSpec``)."""

    codes: Tensor
    scale: Tensor
    zero: Tensor
    ring: Tensor
    start: Tensor
    sinks: int
    side: str
    bits: int
    group: int
    residual: int
    eta: float
    fit: str | None
    """None: the codes are this layer's own; else how scales are fitted to borrowed ones."""


def window(x: Tensor, ring: Tensor, tokens: Tensor, past: Tensor, in_ring: bool) -> Tensor:
    """Full-precision ``tokens`` as fp32, from the ring and, unless ``in_ring``, from the chunk ``x``."""
    slots = ring_slots(tokens, ring)
    if in_ring:
        return ring.index_select(2, slots).to(torch.float32)
    inside = ring.shape[2] + (tokens - past).clamp(0, x.shape[2] - 1)
    index = torch.where(tokens < past, slots, inside)
    return torch.cat([ring, x], 2).index_select(2, index).to(torch.float32)


def store_ring(x: Tensor, ring: Tensor, past: Tensor) -> None:
    """Leave the last tokens of ``x`` in the ring."""
    new = x.shape[2]
    kept = torch.sym_min(new, ring.shape[2])
    tokens = past + new - kept + torch.arange(kept, device=x.device)
    ring.index_copy_(2, ring_slots(tokens, ring), x.narrow(2, new - kept, kept))


def store_keys(s: Side, x: Tensor, past: Tensor, in_ring: bool) -> None:
    """Quantize every block of R tokens that the step may have completed."""
    blocks = (x.shape[2] + s.residual - 1) // s.residual
    count = blocks * s.residual
    first = past // s.residual * s.residual
    tokens = first + torch.arange(count, device=x.device)
    groups = count // s.group
    grouped = window(x, s.ring, tokens, past, in_ring).unflatten(2, (groups, s.group))
    valid = tokens >= s.start[:, None] + s.sinks
    valid = valid.unflatten(1, (groups, s.group))[:, None, :, :, None]
    stats = dict(bits=s.bits, eta=s.eta, dim=3, dtype=s.scale.dtype, valid=valid)
    if s.fit is None:
        codes, scale, zero = own_codes(grouped, **stats)
        s.codes.index_copy_(3, tokens, pack_words(codes.flatten(2, 3), s.bits, 3).transpose(2, 3))
    else:
        words = s.codes.index_select(3, tokens)
        borrowed = unpack_words(words, s.bits, 2, x.shape[3]).transpose(2, 3)
        scale, zero = fit_codes(grouped, borrowed.unflatten(2, (groups, s.group)), fit=s.fit, **stats)
    rows = first // s.group + torch.arange(groups, device=x.device)
    s.scale.index_copy_(2, rows, scale.squeeze(3))
    s.zero.index_copy_(2, rows, zero.squeeze(3))


def store_values(s: Side, x: Tensor, past: Tensor, in_ring: bool) -> None:
    """Quantize the tokens that the step pushes out of the window of the last R."""
    if in_ring:
        for j in range(x.shape[2]):
            store_one_value(s, past + j - s.residual)
        return
    per = 32 // s.bits
    new, first = x.shape[2], (past - s.residual).clamp_min(0)
    words = (new + 2 * per - 2) // per
    tokens = first // per * per + torch.arange(words * per, device=x.device)
    leaves = (tokens >= first) & (tokens < past - s.residual + new)
    due = leaves.unflatten(0, (words, per))
    trash = s.codes.shape[2] - 1
    rows = torch.where(due.any(1), first // per + torch.arange(words, device=x.device), trash)
    old = s.codes.index_select(2, rows)
    values = window(x, s.ring, tokens, past, False)
    codes, scale, zero = quantize_values(s, values, unpack_words(old, s.bits, 2, words * per))
    if codes is not None:
        ones = torch.where(leaves, 2**s.bits - 1, 0)[:, None]
        kept = old & ~pack_words(ones, s.bits, 0)
        s.codes.index_copy_(2, rows, kept | pack_words(torch.where(leaves[:, None], codes, 0), s.bits, 2))
    put_value_scales(s, torch.where(leaves, tokens, trash * per), scale, zero)


def store_one_value(s: Side, token: Tensor) -> None:
    """Quantize one token (int64 [1]) out of the ring; a negative one goes to padding."""
    per = 32 // s.bits
    due = token >= 0
    row = torch.where(due, token // per, s.codes.shape[2] - 1)
    shift = shifts(s.bits, token.device).index_select(0, token % per)
    old = s.codes.index_select(2, row)
    value = window(s.ring, s.ring, token, token, True)
    codes, scale, zero = quantize_values(s, value, torch.bitwise_right_shift(old, shift) & (2**s.bits - 1))
    if codes is not None:
        mask = torch.bitwise_left_shift(torch.full_like(shift, 2**s.bits - 1), shift)
        s.codes.index_copy_(2, row, (old & ~mask) | torch.bitwise_left_shift(codes, shift))
    put_value_scales(s, torch.where(due, token, (s.codes.shape[2] - 1) * per), scale, zero)


def quantize_values(s: Side, values: Tensor, stored: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
    """(codes or None if borrowed, scale, zero) of fp32 ``values`` [B, H, tokens, D]."""
    split = (values.shape[3] // s.group, s.group)
    stats = dict(bits=s.bits, eta=s.eta, dim=4, dtype=s.scale.dtype)
    if s.fit is None:
        codes, scale, zero = own_codes(values.unflatten(3, split), **stats)
        return codes.flatten(3, 4), scale, zero
    return (None, *fit_codes(values.unflatten(3, split), stored.unflatten(3, split), fit=s.fit, **stats))


def put_value_scales(s: Side, tokens: Tensor, scale: Tensor, zero: Tensor) -> None:
    """Store [B, H, tokens, groups, 1] scales and zeros in their [B, H, groups, N] homes."""
    s.scale.index_copy_(3, tokens, scale.squeeze(4).transpose(2, 3))
    s.zero.index_copy_(3, tokens, zero.squeeze(4).transpose(2, 3))


def store_sinks(x: Tensor, sink: Tensor, pos: Tensor, start: Tensor) -> None:
    """Keep the first tokens of each sequence; later ones go to the row past the last."""
    count = sink.shape[2] - 1
    slot = pos - start[:, None]
    slot = torch.where((slot >= 0) & (slot < count), slot, count)
    sink.scatter_(2, slot[:, None, :, None].expand(x.shape), x)


def fault_code(pos: Tensor, length: Tensor, max_len: int, rollback: bool = True) -> Tensor:
    """0, or why tokens at ``pos`` cannot follow ``length`` stored ones (``faults.FAULTS``): int32 [1].

    ``rollback`` says that only STEP_TOKENS tokens can be rolled back.
    """
    past, new = pos[:1], pos.shape[0]
    code = torch.where((past > length[:1]) | (past < 0), 1, 0)
    code = torch.where(past + new > max_len, 2, code)
    if rollback:
        code = torch.where((past > 0) & (length[1:] - past > STEP_TOKENS), 3, code)
    if isinstance(new, int) and new <= STEP_TOKENS:  # a prompt may start over
        code = torch.where((past == 0) & (length[:1] == max_len), 5, code)
    jump = (pos != past + torch.arange(new, device=pos.device)).any()
    return torch.where(jump, 4, code).to(torch.int32)


def advance(length: Tensor, past: Tensor, new: int) -> None:
    """Note ``past + new`` tokens stored, and the furthest any was since the sequence began.

    The ring holds the tokens before that furthest one, so rollbacks count from there.
    """
    stored = past + new
    furthest = torch.where(past == 0, stored, torch.maximum(length[1:], stored))
    length.copy_(torch.cat([stored, furthest]))


def store_full(x: Tensor, pos: Tensor, codes: Tensor, length: Tensor, fault: Tensor, max_len: int) -> None:
    """Write ``x`` to 16-bit storage; what is past the end overwrites the last token, and is a fault."""
    fault.copy_(torch.maximum(fault, fault_code(pos, length, max_len, rollback=False)))
    codes.index_copy_(2, pos.clamp(0, max_len - 1), x.to(codes.dtype))
    advance(length, pos[:1], x.shape[2])


def store(s: Side, x: Tensor, pos: Tensor, length: Tensor, fault: Tensor, sink: Tensor | None, max_len: int) -> None:
    """Write ``x`` [B, H, q, D] at positions ``pos`` [q] (consecutive, the first is the past length).

    A step past the end is a fault and is written over the last tokens: an index out of bounds would
    cost an accelerator its context before the fault is read.
    """
    x = x.to(s.ring.dtype)
    fault.copy_(torch.maximum(fault, fault_code(pos, length, max_len)))
    past, in_ring = pos[:1].clamp(max=max_len - x.shape[2]).clamp_min(0), x.shape[2] <= STEP_TOKENS
    if in_ring:
        store_ring(x, s.ring, past)
    (store_keys if s.side == "key" else store_values)(s, x, past, in_ring)
    if not in_ring:
        store_ring(x, s.ring, past)
    if sink is not None:
        store_sinks(x, sink, pos, s.start)
    advance(length, past, x.shape[2])
