"""The quantizer, as the equations read (XQuant, Yang et al., EMNLP 2025, arXiv 2510.11236; Eq. 5: relaxation).

One group of numbers X at B bits, n = 2**B - 1:

    step = (max X - min X) / n                  low = min X
    codes = round((X - low) / step)             0 .. n
    scale = (1 - 2 eta) step                    zero = low + eta n step        (Eq. 5)
    X ~ codes * scale + zero

The upper layer of a sharing pair takes codes it did not make; its least-squares fit is

    scale = cov(codes, X) / var(codes)          zero = mean X - scale * mean codes

Two fits of one's own codes serve attention better than the range does (docs/quality.md): one that keeps the spread of
keys, and one without bias for values about zero, whose errors then average out over tokens. Levels t = codes - n / 2:

    scale = std X / std codes                   mid = mean X - scale * mean t      X ~ scale * t + mid
    scale = sum X**2 / sum X t                                                      X ~ scale * t

What cannot be represented is never made up: a group with an infinity or a NaN, or whose scale or
zero point does not fit the dtype they are stored in, gets scale 0 and zero point NaN, so that it
reads back as NaN. A constant group has scale 0 and reads back exactly (up to that dtype).

All functions take fp32 groups, reduce over ``dim`` and keep it with size 1. ``valid`` (bool,
broadcastable) leaves elements out of a group's statistics: padding tokens and attention sinks.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def relax(low: Tensor, step: Tensor, bits: int, eta: float) -> tuple[Tensor, Tensor]:
    """Relaxed-constraint mapping of both ends of the range (Eq. 5): (scale, zero)."""
    return step * (1 - 2 * eta), low + step * (eta * (2**bits - 1))


def minmax_range(x: Tensor, largest: float | Tensor, dim: int, valid: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """``(low, step)`` of each group; (NaN, 0) where the range is not finite, (0, 0) if it is empty.

    ``largest`` is the largest code, 1 or more.
    """
    if valid is None:
        low, high = x.amin(dim, keepdim=True), x.amax(dim, keepdim=True)
    else:
        low = torch.where(valid, x, math.inf).amin(dim, keepdim=True)
        high = torch.where(valid, x, -math.inf).amax(dim, keepdim=True)
        empty = low > high
        low, high = torch.where(empty, 0.0, low), torch.where(empty, 0.0, high)
    step = (high - low) / largest
    finite = step.abs() < math.inf
    return torch.where(finite, low, math.nan), torch.where(finite, step, 0.0)


def encode(x: Tensor, low: Tensor, step: Tensor, largest: int | Tensor) -> Tensor:
    """Codes 0 .. ``largest`` as int32; 0 throughout where ``step`` is 0."""
    codes = torch.round((x - low) / torch.where(step > 0, step, 1.0)).clamp_min(0)
    codes = codes.clamp_max(largest) if isinstance(largest, int) else torch.minimum(codes, largest)
    return torch.where((step > 0) & (codes == codes), codes, 0.0).to(torch.int32)


def masked_mean(x: Tensor, dim: int | tuple[int, ...], valid: Tensor) -> Tensor:
    """Mean of ``x`` where ``valid``; 0 where nothing is."""
    count = valid.to(x.dtype).expand(x.shape).sum(dim, keepdim=True).clamp_min(1.0)
    return torch.where(valid, x, 0.0).sum(dim, keepdim=True) / count


def kept_spread(x: Tensor, levels: Tensor, dim: int, valid: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(scale, mean of x, mean of levels) such that scale * levels spreads as ``x`` does; scale 0 for equal levels."""
    mean_x, mean_t = masked_mean(x, dim, valid), masked_mean(levels, dim, valid)
    var_x, var_t = masked_mean((x - mean_x) ** 2, dim, valid), masked_mean((levels - mean_t) ** 2, dim, valid)
    ratio = var_x / torch.where(var_t > 0, var_t, 1.0)
    return torch.where(var_t > 0, ratio.sqrt(), 0.0), mean_x, mean_t


def unbiased(x: Tensor, levels: Tensor, dim: int) -> Tensor:
    """The scale with sum x (scale * levels) = sum x**2; 0 for a group of zeros."""
    aligned = (x * levels).sum(dim, keepdim=True)
    square = (x * x).sum(dim, keepdim=True)
    return torch.where(square == 0, 0.0, square / aligned)


def least_squares(x: Tensor, codes: Tensor, dim: int, valid: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """``(scale, zero)`` that fit ``x`` best on given ``codes`` (fp32), group by group."""
    if valid is None:
        mean_x, mean_c = x.mean(dim, keepdim=True), codes.mean(dim, keepdim=True)
        dev_x, dev_c = x - mean_x, codes - mean_c
    else:
        mean_x, mean_c = masked_mean(x, dim, valid), masked_mean(codes, dim, valid)
        dev_x, dev_c = torch.where(valid, x - mean_x, 0.0), torch.where(valid, codes - mean_c, 0.0)
    var = (dev_c * dev_c).sum(dim, keepdim=True)
    cov = (dev_c * dev_x).sum(dim, keepdim=True)
    scale = torch.where(var > 0, cov / torch.where(var > 0, var, 1.0), 0.0)
    return scale, mean_x - scale * mean_c


def to_stored(scale: Tensor, zero: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Round to the stored dtype; (0, NaN) where either does not fit it."""
    scale, zero = scale.to(dtype), zero.to(dtype)
    finite = (scale.abs() < math.inf) & (zero.abs() < math.inf)
    return torch.where(finite, scale, 0.0), torch.where(finite, zero, math.nan)


def own_codes(
    x: Tensor, *, bits: int, eta: float, dim: int, dtype: torch.dtype, valid: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize groups by their own range: (codes int32, scale, zero)."""
    low, step = minmax_range(x, 2**bits - 1, dim, valid)
    return (encode(x, low, step, 2**bits - 1), *to_stored(*relax(low, step, bits, eta), dtype))


def fit_codes(
    x: Tensor,
    codes: Tensor,
    *,
    bits: int,
    eta: float,
    dim: int,
    dtype: torch.dtype,
    fit: str,
    valid: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Scale and zero of groups whose int32 ``codes`` belong to another layer."""
    if fit == "least_squares":
        return to_stored(*least_squares(x, codes.to(torch.float32), dim, valid), dtype)
    low, step = minmax_range(x, 2**bits - 1, dim, valid)
    return to_stored(*relax(low, step, bits, eta), dtype)
