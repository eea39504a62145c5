"""``xquant::quantize_store``: write a step's tokens, quantize those that leave full precision.

Plain torch on whole tensors, without reading a position on the host, so that it runs inside CUDA
graphs. A position that is not due goes to padding that no reader reaches. A step of up to
STEP_TOKENS tokens writes the ring first and quantizes out of it; a longer chunk quantizes straight
out of the chunk and leaves its last tokens in the ring. What is due, and how it is quantized, is the scheme's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from xquant_fx.kernels.faults import Fault, may_wrap
from xquant_fx.kernels.layout import STEP_TOKENS, ring_slots
from xquant_fx.kernels.quantize_store.arguments import StoreArguments
from xquant_fx.kernels.schemes import SCHEMES


def store_ring(x: Tensor, ring: Tensor, past: Tensor) -> None:
    """Leave the last tokens of ``x`` in the ring."""
    new = x.shape[2]
    kept = torch.sym_min(new, ring.shape[2])
    tokens = past + new - kept + torch.arange(kept, device=x.device)
    ring.index_copy_(2, ring_slots(tokens, ring), x.narrow(2, new - kept, kept))


def store_sinks(x: Tensor, sink: Tensor, pos: Tensor, start: Tensor) -> None:
    """Keep the first tokens of each sequence; later ones go to the row past the last."""
    count = sink.shape[2] - 1
    slot = pos - start[:, None]
    slot = torch.where((slot >= 0) & (slot < count), slot, count)
    sink.scatter_(2, slot[:, None, :, None].expand(x.shape), x)


def fault_code(pos: Tensor, length: Tensor, max_len: int, rollback: int | None) -> Tensor:
    """0, or the ``Fault`` by which tokens at ``pos`` cannot follow ``length`` stored ones: int32 [1].

    ``rollback`` tokens can be rolled back (None: any number).
    """
    past, new = pos[:1], pos.shape[0]
    code = torch.where((past > length[:1]) | (past < 0), int(Fault.NOT_APPENDED), 0)
    code = torch.where(past + new > max_len, int(Fault.FULL), code)
    if rollback is not None:
        too_far = (past > 0) & (length[1:] - past > rollback)
        code = torch.where(too_far, int(Fault.ROLLED_BACK_TOO_FAR), code)
    code = torch.where((past == 0) & may_wrap(length[:1], new, max_len), int(Fault.RESTARTED), code)
    jump = (pos != past + torch.arange(new, device=pos.device)).any()
    return torch.where(jump, int(Fault.NOT_CONSECUTIVE), code).to(torch.int32)


def advance(length: Tensor, past: Tensor, new: int) -> None:
    """Note ``past + new`` tokens stored, and the furthest any was since the sequence began.

    The ring holds the tokens before that furthest one, so rollbacks count from there.
    """
    stored = past + new
    furthest = torch.where(past == 0, stored, torch.maximum(length[1:], stored))
    length.copy_(torch.cat([stored, furthest]))


def store_full(a: StoreArguments) -> None:
    """Write ``x`` to 16-bit storage; what is past the end overwrites the last token, and is a fault.

    Of a sliding window, whose storage starts over, ``residual_length`` tokens are seen and the others can be rolled
    back.
    """
    slots, new = a.codes.shape[2], a.x.shape[2]
    rollback = slots - a.residual_length if slots < a.max_len else None
    a.fault.copy_(torch.maximum(a.fault, fault_code(a.pos, a.length, a.max_len, rollback)))
    kept = torch.sym_min(new, slots)
    pos = a.pos[new - kept :].clamp(0, a.max_len - 1)
    a.codes.index_copy_(2, pos % slots if rollback else pos, a.x.narrow(2, new - kept, kept).to(a.codes.dtype))
    advance(a.length, a.pos[:1], new)


def store(a: StoreArguments) -> None:
    """Write ``x`` [B, H, q, D] at positions ``pos`` [q] (consecutive, the first is the past length).

    A step past the end is a fault and is written over the last tokens: an index out of bounds would
    cost an accelerator its context before the fault is read.
    """
    ring = a.quantized.ring
    x = a.x.to(ring.dtype)
    a.fault.copy_(torch.maximum(a.fault, fault_code(a.pos, a.length, a.max_len, ring.shape[2] - a.residual_length)))
    past, in_ring = a.pos[:1].clamp(max=a.max_len - x.shape[2]).clamp_min(0), x.shape[2] <= STEP_TOKENS
    if in_ring:
        store_ring(x, ring, past)
    SCHEMES[a.scheme].store_due(a, x, past, in_ring)
    if not in_ring:
        store_ring(x, ring, past)
    if a.sink is not None:
        store_sinks(x, a.sink, a.pos, a.start)
    advance(a.length, past, x.shape[2])
