"""``xquant::shared_code_load``: dequantized keys or values, codes own or borrowed, as plain torch.

Inductor turns this into pointwise loops that fuse with whatever reads the result.
"""

from __future__ import annotations

import torch
from torch import Tensor

from xquant_fx.kernels.layout import quantized_limit, ring_slots
from xquant_fx.kernels.packing import unpack_words


def dequantize(
    codes: Tensor, scale: Tensor, zero: Tensor, side: str, bits: int, group: int, n: int, dim: int
) -> Tensor:
    """First ``n`` tokens as fp32 [B, H, n, dim]."""
    if side == "key":
        c = unpack_words(codes[..., :n], bits, 2, dim).transpose(-1, -2)
        token_group = torch.arange(n, device=codes.device) // group
        s, z = scale.index_select(2, token_group), zero.index_select(2, token_group)
    else:
        c = unpack_words(codes, bits, 2, n)
        channel_group = torch.arange(dim, device=codes.device) // group
        s, z = (t[..., :n].transpose(-1, -2).index_select(3, channel_group) for t in (scale, zero))
    return c.to(torch.float32) * s.to(torch.float32) + z.to(torch.float32)


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


def load(
    codes: Tensor, scale: Tensor | None, zero: Tensor | None, ring: Tensor | None, sink: Tensor | None,
    start: Tensor, past: Tensor, new_tokens: int, n: int, side: str, bits: int, group: int, residual: int,
    x: Tensor | None = None,
) -> Tensor:
    """What attention sees in a step that brings ``new_tokens`` tokens after ``past``: [B, H, n, D].

    Tokens at or past ``past + new_tokens`` read as zero, as in a fresh static cache.
    """
    tokens = torch.arange(n, device=codes.device)
    written = (tokens < past + new_tokens)[:, None]
    if bits == 16:
        return torch.where(written, codes[:, :, :n], 0.0).contiguous()
    assert scale is not None and zero is not None and ring is not None
    dense = dequantize(codes, scale, zero, side, bits, group, n, ring.shape[3]).to(ring.dtype)
    full = residual_tokens(ring, tokens, past, x)
    out = torch.where((tokens < quantized_limit(past, side, residual))[:, None], dense, full)
    if sink is not None:
        out = with_sinks(out, sink, tokens, start)
    # Contiguous like the buffer it stands for: SDPA kernels are chosen by strides.
    return torch.where(written, out, 0.0).contiguous()
