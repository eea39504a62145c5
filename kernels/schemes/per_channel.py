"""Per channel: one scale and zero point per channel and group of tokens, in blocks of the residual length (keys).

Keys have channels of very different size. A block of R = ``residual_length`` tokens is quantized when it is full
(XQuant, as in the paper's release): with ``past`` tokens stored, those below floor(past / R) * R are quantized.

    codes  [B, H, word_count(bits, D), tokens]    packed along channels
    scale  [B, H, tokens / group, D]
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from xquant_fx.kernels.layout import code_slots, full_precision, wrap_tokens
from xquant_fx.kernels.packing import pack_words, unpack_words, word_count
from xquant_fx.kernels.quantize_store.arguments import StoreArguments
from xquant_fx.kernels.reference import fit_codes, own_codes
from xquant_fx.kernels.schemes.base import Past, Shapes, Stored, wraps_at

APPEND = "blocks"
BITS: tuple[float, ...] = (1, 2, 3, 4, 8)
SCALE_DTYPES: tuple[torch.dtype, ...] = (torch.float16, torch.bfloat16, torch.float32)
RANGE_CODES = True
TOKEN_NORMS = False


def stored_tokens(max_len: int, dim: int, bits: float, group: int, residual: int) -> int:
    """Whole blocks, and one more: where a block that is not full is quantized to."""
    return (math.ceil(max_len / residual) + 1) * residual


def window_tokens(reach: int, group: int, residual: int) -> int:
    """From the group of the first token that is read to the last full block."""
    return wrap_tokens(reach + group, residual)


def first_kept(end: Past, wrap: int) -> Past:
    """Whole groups."""
    return end - wrap


def shapes(tokens: int, dim: int, bits: float, group: int, scale_dtype: torch.dtype) -> Shapes:
    """What follows [B, H] in the shape of each tensor, and its dtype."""
    codes, scale = (word_count(bits, dim), tokens), ((tokens // group, dim), scale_dtype)
    return {"codes": (codes, torch.int32), "scale": scale, "zero": scale}


def tokens_of(codes: Sequence[int], scale: Sequence[int]) -> int:
    """Tokens that codes of this shape have room for."""
    return codes[3]


def quantized_limit(past: Past, group: int, residual: int) -> Past:
    """Full blocks."""
    return past // residual * residual


def store_due(a: StoreArguments, x: Tensor, past: Tensor, in_ring: bool) -> None:
    """Quantize every block of R tokens that the step may have completed."""
    blocks = (x.shape[2] + a.residual_length - 1) // a.residual_length
    count = blocks * a.residual_length
    first = quantized_limit(past, a.group_size, a.residual_length)
    tokens = first + torch.arange(count, device=x.device)
    groups, stored = count // a.group_size, a.quantized
    grouped = full_precision(x, stored.ring, tokens, past, in_ring).unflatten(2, (groups, a.group_size))
    valid = tokens >= a.start[:, None] + a.sink_tokens
    valid = valid.unflatten(1, (groups, a.group_size))[:, None, :, :, None]
    stats: dict[str, Any] = dict(bits=int(a.bits), eta=a.eta, dim=3, dtype=stored.scale.dtype, valid=valid)
    wrap = wraps_at(a.codes.shape[3], a.residual_length, a.max_len)
    if wrap:
        tokens = code_slots(tokens, quantized_limit(past + x.shape[2], 0, a.residual_length), wrap, a.residual_length)
    if a.fit is None:
        codes, scale, zero = own_codes(grouped, **stats)
        a.codes.index_copy_(3, tokens, pack_words(codes.flatten(2, 3), a.bits, 3).transpose(2, 3))
    else:
        words = a.codes.index_select(3, tokens)
        borrowed = unpack_words(words, a.bits, 2, x.shape[3]).transpose(2, 3)
        scale, zero = fit_codes(grouped, borrowed.unflatten(2, (groups, a.group_size)), fit=a.fit, **stats)
    rows = tokens[:: a.group_size] // a.group_size
    stored.scale.index_copy_(2, rows, scale.squeeze(3))
    a.zero_points.index_copy_(2, rows, zero.squeeze(3))


def dequantize(stored: Stored, bits: float, group: int, n: int, dim: int) -> Tensor:
    """First ``n`` tokens as fp32 [B, H, n, dim]."""
    assert stored.zero is not None
    c = unpack_words(stored.codes[..., :n], bits, 2, dim).transpose(-1, -2)
    token_group = torch.arange(n, device=stored.codes.device) // group
    s, z = (x.index_select(2, token_group) for x in (stored.scale, stored.zero))
    return c.to(torch.float32) * s.to(torch.float32) + z.to(torch.float32)
