"""Quantizers that the product does not have, for the trials of quality_trials.py: what would be read back.

Each takes what one side of one layer stores and gives the same tokens as the quantizer would give them back. The
ranked keys and the rotated values of the product are here, too, in the same form: what a trial changes is an argument.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable

import torch
from torch import Tensor
from trial_codes import Trellis, gaussian_codebook, nearest, ring_path

from xquant_fx.kernels.reference import encode, kept_spread, masked_mean, minmax_range, unbiased
from xquant_fx.kernels.rotation import rotate, rotate_back
from xquant_fx.kernels.schemes.per_channel_ranked import quantize_up_to
from xquant_fx.kernels.schemes.per_token_rotated import GAUSSIAN_STEP
from xquant_fx.kernels.small_floats import decode_mid, decode_scale, encode_norm, encode_scale
from xquant_fx.kernels.widths import DISTORTION, rank_widths


@dataclasses.dataclass(frozen=True)
class Seen:
    """One side of one layer, from the first token to the last that any step reads quantized."""

    x: Tensor
    """float32 [B, H, n, D], attention sinks included."""
    sinks: int
    """First tokens that take no part."""
    first: int = 0
    """Tokens that are quantized with the prompt: by them channels are ranked."""
    group: int = 128
    """Tokens that share one key scale."""
    energy: Tensor | None = None
    """float32 [B, H, D]: mean square of the prompt's queries of each KV head."""
    rope: tuple[Tensor, Tensor] | None = None
    """(cos, sin) [n, D] of the rotary embedding."""


Quantizer = Callable[[Seen], Tensor]
#: Levels of rotated values [..., D] that have a mean square of 1, in any unit.
Levels = Callable[[Tensor], Tensor]


def rounded_scale(scale: Tensor) -> Tensor:
    """``scale`` as the product stores it, in 8 bits."""
    return decode_scale(encode_scale(scale))


def half_scale(scale: Tensor) -> Tensor:
    """``scale`` in 16 bits."""
    return scale.half().float()


def uniform_levels(bits: int, step: float | None = None) -> Levels:
    """Levels at equal distances about zero: those of the product."""
    n, step = 2**bits - 1, step or GAUSSIAN_STEP[bits]
    return lambda unit: torch.floor(unit / step + (n + 1) / 2).clamp(0, n) - n / 2


def vector_levels(unit: Tensor) -> Tensor:
    """The nearest of 256 vectors for each 8 channels."""
    book = gaussian_codebook()
    return book[nearest(unit.reshape(-1, book.shape[1]), book)].view_as(unit)


def trellis_levels(trellis: Trellis) -> Levels:
    """Values of the states of a path that closes in a ring."""
    return lambda unit: trellis.values[ring_path(unit.flatten(0, -2), trellis)].view_as(unit)


def rotated_values(levels: Levels, stored: Callable[[Tensor], Tensor] = rounded_scale) -> Quantizer:
    """Rotate, choose levels, and one scale without bias per token, ``stored`` as said."""

    def read(seen: Seen) -> Tensor:
        y = rotate(seen.x)
        spread = y.square().mean(3, keepdim=True).sqrt()
        chosen = levels(y / torch.where(spread > 0, spread, 1.0))
        return rotate_back(chosen * stored(unbiased(y, chosen, 3)))

    return read


#: Importance float32 [B, H, D] of the channels to their bits, int64.
Widths = Callable[[Tensor], Tensor]


def fixed_widths(bits: float) -> Widths:
    """The product's: bits by rank."""

    def widths(importance: Tensor) -> Tensor:
        by_rank = torch.tensor(rank_widths(bits, importance.shape[2])).expand(importance.shape)
        order = torch.sort(importance, dim=2, descending=True, stable=True).indices
        return torch.zeros_like(order).scatter(2, order, by_rank)

    return widths


def uniform_widths(bits: int) -> Widths:
    """The same bits for all channels."""
    return lambda importance: torch.full(importance.shape, bits)


def water_filling(bits: float) -> Widths:
    """One bit at a time to the channel whose error it lowers most, until a head has ``bits`` on average."""

    def widths(importance: Tensor) -> Tensor:
        given = torch.zeros(importance.shape, dtype=torch.int64)
        fall = torch.tensor([a - b for a, b in itertools.pairwise(DISTORTION)] + [0.0])
        for _ in range(round(bits * importance.shape[2])):
            best = (importance * fall[given]).argmax(2, keepdim=True)
            given.scatter_add_(2, best, torch.ones_like(best))
        return given

    return widths


def over_layer(widths: Widths) -> Widths:
    """The same, over the channels of all KV heads of a layer together."""
    return lambda importance: widths(importance.flatten(1, 2)[:, None]).view(importance.shape)


@dataclasses.dataclass(frozen=True)
class Keys:
    """Keys per channel of a group of tokens, with bits by what queries make of a channel."""

    widths: Widths
    before_rope: bool = False
    token_norms: bool = True
    """Divide each token by its norm over all heads of the layer, kept in 8 bits, as the product does."""
    rotated: bool = False
    """Mix the channels by a Hadamard transform first."""
    exact_scales: bool = False
    """Scales and mid points as they are, which 16 bits come near to."""

    def __call__(self, seen: Seen) -> Tensor:
        """The tokens as they are read back."""
        x, energy = seen.x, seen.energy
        assert energy is not None and seen.rope is not None
        if self.before_rope:
            x, energy = turned(x, seen.rope, -1), over_pairs(energy)
        norms = self._norms(x)
        x = x / norms
        read = self._grouped(rotate(x) if self.rotated else x, energy, seen)
        read = (rotate_back(read) if self.rotated else read) * norms
        return turned(read, seen.rope, 1) if self.before_rope else read

    def _norms(self, x: Tensor) -> Tensor:
        if not self.token_norms:
            return torch.ones(())
        return decode_scale(encode_norm(x.square().mean((1, 3), keepdim=True).sqrt()))

    def _grouped(self, x: Tensor, energy: Tensor, seen: Seen) -> Tensor:
        grouped = x.unflatten(2, (-1, seen.group))
        token = torch.arange(x.shape[2]).unflatten(0, (-1, seen.group))[..., None]
        valid = token >= seen.sinks
        spread = grouped - masked_mean(grouped, 3, valid)
        ranked = valid & (token < seen.first)
        importance = masked_mean(spread * spread, (2, 3), ranked)[:, :, 0, 0] * energy
        center = masked_mean(grouped, (2, 3), ranked)
        n = (2 ** self.widths(importance))[:, :, None, None].float() - 1
        if self.exact_scales:
            return exact_read(grouped, valid, n).flatten(2, 3)
        codes, scale, mid = quantize_up_to(grouped, valid, center, n, torch.uint8)
        return (decode_scale(scale) * (codes - n / 2 + decode_mid(mid)) + center).flatten(2, 3)


def exact_read(x: Tensor, valid: Tensor, n: Tensor) -> Tensor:
    """Groups [B, H, groups, group, D] read back from codes up to ``n``, with scales that nothing rounds."""
    codes = encode(x, *minmax_range(x, n.clamp_min(1), 3, valid), n)
    scale, mean, level = kept_spread(x, codes - n / 2, 3, valid)
    return scale * (codes - n / 2 - level) + mean


def turned(x: Tensor, rope: tuple[Tensor, Tensor], sign: int) -> Tensor:
    """``x`` [B, H, n, D] with the rotary embedding (sign 1), or without (-1); halves of the channels are pairs."""
    cos, sin = rope
    first, second = x.chunk(2, 3)
    return x * cos + sign * torch.cat([-second, first], 3) * sin


def over_pairs(energy: Tensor) -> Tensor:
    """Mean over the two channels that a rotary embedding turns into each other: at other positions, each is both."""
    return energy.unflatten(2, (2, -1)).mean(2).repeat(1, 1, 2)
