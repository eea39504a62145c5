"""``xquant::shared_code_load``: dequantized keys or values, codes own or borrowed, as plain torch.

Inductor turns this into pointwise loops that fuse with whatever reads the result.
"""

from __future__ import annotations

import torch
from torch import Tensor

from xquant_fx.kernels.layout import ring_slots
from xquant_fx.kernels.rotation import rotate_values
from xquant_fx.kernels.schemes import SCHEMES, wrap_of
from xquant_fx.kernels.schemes.base import Stored
from xquant_fx.kernels.schemes.per_token_folded import NAME as FOLDED
from xquant_fx.kernels.shared_code_load.arguments import LoadArguments


def residual_tokens(ring: Tensor, tokens: Tensor, past: Tensor, x: Tensor | None) -> Tensor:
    """Full-precision ``tokens`` [B, H, n, D]: the step's own from ``x`` if given, others from the ring."""
    old = ring.index_select(2, ring_slots(tokens, ring))
    if x is None:
        return old
    new = x.index_select(2, (tokens - past).clamp(0, x.shape[2] - 1))
    return torch.where((tokens < past)[:, None], old, new)


def with_sinks(out: Tensor, sink: Tensor, tokens: Tensor, start: Tensor) -> Tensor:
    """Replace the first tokens of each sequence by their full-precision copies."""
    count = sink.shape[2] - 1
    slot = tokens - start[:, None]
    kept = (slot >= 0) & (slot < count)
    index = slot.clamp(0, count - 1)[:, None, :, None].expand(out.shape)
    return torch.where(kept[:, None, :, None], sink.gather(2, index), out)


def load(a: LoadArguments) -> Tensor:
    """What attention sees in a step that brings ``new_tokens`` tokens after ``past``: [B, H, n, D], from ``first`` on.

    Tokens at or past ``past + new_tokens`` read as zero, as in a fresh static cache, and so do those before a sliding
    window that later ones have overwritten. What is stored rotated is rotated back, the step's own tokens ``x``, too.
    """
    out = load_as_stored(a)
    return rotate_values(out, back=True) if a.bits < 16 and a.scheme == FOLDED else out


def load_as_stored(a: LoadArguments) -> Tensor:
    """The same, rotated where it is stored so."""
    tokens = torch.arange(a.n, device=a.codes.device)
    if a.first is not None:
        tokens = tokens + a.first
    written = (tokens < a.past + a.new_tokens)[:, None]
    if a.bits == 16:
        return torch.where(*_unquantized(a, tokens, written), 0.0).contiguous()
    assert a.scale is not None and a.ring is not None
    scheme, stored = SCHEMES[a.scheme], Stored(a.codes, a.scale, a.zero, a.order, a.center, a.norm)
    dim = a.ring.shape[3]
    tokens_stored = scheme.tokens_of(a.codes.shape, a.scale.shape)
    wrap = wrap_of(a.scheme, tokens_stored, a.max_len, dim, a.bits, a.group_size, a.residual_length)
    dense = scheme.dequantize(stored, a.bits, a.group_size, wrap or _up_to(a), dim).to(a.ring.dtype)
    if wrap or a.first is not None:
        dense = dense.index_select(2, tokens % (wrap or a.max_len))
    if wrap:
        end = scheme.quantized_limit(a.past + _stored_new(a), a.group_size, a.residual_length)
        written = written & (tokens >= scheme.first_kept(end, wrap))[:, None]
    full = residual_tokens(a.ring, tokens, a.past, a.x)
    limit = scheme.quantized_limit(a.past, a.group_size, a.residual_length)
    out = torch.where((tokens < limit)[:, None], dense, full)
    if a.sink is not None:
        out = with_sinks(out, a.sink, tokens, a.start)
    # Contiguous like the buffer it stands for: SDPA kernels are chosen by strides.
    return torch.where(written, out, 0.0).contiguous()


def _stored_new(a: LoadArguments) -> int:
    """Tokens of the step that are among the stored ones already."""
    return a.new_tokens if a.x is None else 0


def _up_to(a: LoadArguments) -> int:
    """Tokens to dequantize where codes do not start over."""
    return a.n if a.first is None else a.max_len


def _unquantized(a: LoadArguments, tokens: Tensor, written: Tensor) -> tuple[Tensor, Tensor]:
    """(which tokens are there, tokens [B, H, n, D]) of 16-bit storage."""
    slots = a.codes.shape[2]
    if slots >= a.max_len:
        whole = a.codes[:, :, : a.n] if a.first is None else a.codes.index_select(2, tokens % slots)
        return written, whole
    seen = written & (tokens >= a.past + _stored_new(a) - slots)[:, None]
    return seen, residual_tokens(a.codes, tokens, a.past, a.x)
