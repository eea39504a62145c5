"""What a decode step loses where queries and weights, times scales, are rounded to a byte before they meet codes.

Such a kernel (``ONE_DIGIT_BITS`` of ``decode_attention/cpu_source.py``) multiplies, not the codes, but what they are
apart from their middles, with

    round(q * s / u) * u     u: largest |q * s| of the row in a token group, of channels that have codes, by 127
    round(p * s / u) * u     u: largest |p * s| of the row among 128 tokens, by 127; p of sink tokens is 0
"""

from __future__ import annotations

import torch
from attention_reference import Stored, hadamard
from torch import Tensor

from xquant_fx.kernels.packing import unpack_words
from xquant_fx.kernels.rotation import rotated_size, signs
from xquant_fx.kernels.schemes.per_channel_ranked import unpack
from xquant_fx.kernels.small_floats import decode_scale
from xquant_fx.kernels.widths import rank_widths

TOGETHER = 128


def lost(x: Tensor, largest: Tensor) -> Tensor:
    """What rounding to a byte adds to ``x``; what is not finite is judged elsewhere."""
    unit = largest / 127
    return torch.where(unit > 0, torch.round(x / unit) * unit - x, 0.0).nan_to_num(0.0)


def key_levels(s: Stored, n: int) -> tuple[Tensor, Tensor]:
    """(codes apart from their middles, scales), each [B, H, n, D], of the first ``n`` keys."""
    dim = s.ring.shape[3]
    if s.scheme == "per_channel":
        levels = unpack_words(s.codes[..., :n], s.bits, 2, dim).transpose(2, 3).double() - (2**s.bits - 1) / 2
        return levels, s.scale.double().repeat_interleave(s.group, 2)[:, :, :n]
    widths = torch.tensor(rank_widths(s.bits, dim)).double()
    middles = (2**widths - 1) / 2
    levels = unpack(s.codes[..., :n], s.bits, dim).double() - middles
    scale = decode_scale(s.scale).double().repeat_interleave(s.group, 2)[:, :, :n] * (widths > 0)
    order = s.order.long()[:, :, None].expand(levels.shape)
    levels, scale = (torch.empty_like(levels).scatter_(3, order, x) for x in (levels, scale))
    return levels if s.norm is None else levels * decode_scale(s.norm[:, None, :n, None]).double(), scale


def lost_scores(q: Tensor, s: Stored, n: int, count: int) -> Tensor:
    """What that adds to q k^T [B, heads, query, count] of the first ``n`` keys."""
    levels, scales = key_levels(s, n)
    rows = q.double().reshape(*levels.shape[:2], -1, q.shape[3])
    out = torch.zeros(*rows.shape[:3], count, dtype=torch.float64)
    for row in range(rows.shape[2]):
        folded = rows[:, :, row, None] * scales
        out[:, :, row, :n] = (lost(folded, folded.abs().amax(3, keepdim=True)) * levels).sum(3)
    return out.reshape(*q.shape[:3], count)


def lost_values(p: Tensor, s: Stored, n: int) -> Tensor:
    """What that adds to the output [B, heads, query, D], given weights ``p``, of the first ``n`` values.

    Carried from token to token, as kernels do, roundings lose no more than this.
    """
    dim, heads = s.ring.shape[3], s.ring.shape[1]
    levels = unpack_words(s.codes, s.bits, 2, n).double() - (2**s.bits - 1) / 2
    scale = (s.scale if s.scheme == "per_token" else decode_scale(s.scale)).double()[..., :n]
    weights = p[..., :n].double().reshape(p.shape[0], heads, -1, 1, n) * scale[:, :, None]
    out = torch.zeros(*weights.shape[:3], dim, dtype=torch.float64)
    for piece in torch.arange(n).split(TOGETHER):
        w, code = weights[..., piece], levels[:, :, piece].unflatten(3, (-1, s.group))
        out += torch.einsum("bhrgn,bhngc->bhrgc", lost(w, w.abs().amax(4, keepdim=True)), code).flatten(3)
    if s.scheme == "per_token_rotated":
        size = rotated_size(dim)
        turned = (out.unflatten(3, (dim // size, size)) @ hadamard(size, torch.float64)).flatten(3)
        out = turned * (torch.tensor(signs(dim), dtype=torch.float64) / size**0.5)
    return out.reshape(*p.shape[:3], dim)
