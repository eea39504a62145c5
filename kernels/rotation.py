"""The rotation of values: a Hadamard transform over head_dim, with fixed signs.

    y = H (signs * v) / sqrt(n)        v = signs * (H y) / sqrt(n)

It makes the channels of a token alike and near Gaussian, whatever they were, so that one scale per token serves all
of them. H has the size n of the largest power of two that divides head_dim and is applied to head_dim / n pieces.
Only tokens that leave the residual window are rotated, and the output once per step: (sum p_t y_t) rotated back is
sum p_t v_t. With the scheme ``per_token_folded`` all tokens are, and the output as a whole; then the linear layers that
make the tokens and take the output can do it (:func:`fold_into_rows`, :func:`fold_into_columns`).
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor


def rotated_size(dim: int) -> int:
    """Channels that one transform mixes: the largest power of two that divides ``dim``."""
    return dim & -dim


def negative(channel: int) -> bool:
    """Whether the sign of ``channel`` is -1: a bit of a multiplicative hash (Knuth), the same in every kernel."""
    return bool(channel * 2654435761 >> 16 & 1)


@functools.cache
def signs(dim: int) -> tuple[float, ...]:
    """+1 or -1 per channel."""
    return tuple(-1.0 if negative(channel) else 1.0 for channel in range(dim))


def _matrix(dim: int, like: Tensor) -> Tensor:
    """[n, n], as ``like``: H / sqrt(n), n of ``rotated_size``; negative where i & j has an odd bit count."""
    n = rotated_size(dim)
    i = torch.arange(n, device=like.device)
    common = i[:, None] & i
    for shift in (16, 8, 4, 2, 1):
        common = common ^ (common >> shift)
    return (1 - 2 * (common & 1)).to(like.dtype) / math.sqrt(n)


def _transform(x: Tensor) -> Tensor:
    n = rotated_size(x.shape[-1])
    pieces = x.unflatten(-1, (x.shape[-1] // n, n))
    return (pieces @ _matrix(x.shape[-1], x)).flatten(-2)


def _signs(x: Tensor) -> Tensor:
    channel = torch.arange(x.shape[-1], device=x.device)
    return 1.0 - 2.0 * (channel * 2654435761 >> 16 & 1)


def rotate(v: Tensor) -> Tensor:
    """float32 [..., dim] rotated."""
    return _transform(v * _signs(v))


def rotate_back(y: Tensor) -> Tensor:
    """Undo :func:`rotate`."""
    return _transform(y) * _signs(y)


def rotate_values(x: Tensor, back: bool) -> Tensor:
    """``x`` [..., dim] rotated, or rotated back, in float32; the result has the dtype of ``x``."""
    wide = x.to(torch.float32)
    return (rotate_back(wide) if back else rotate(wide)).to(x.dtype)


def fold_into_rows(weight: Tensor, dim: int) -> Tensor:
    """Weight [heads * dim, in], or bias [heads * dim], of a linear layer that gives rotated heads instead."""
    heads = weight.unflatten(0, (-1, dim))
    return rotate_values(heads.movedim(1, -1), False).movedim(-1, 1).reshape(weight.shape).contiguous()


def fold_into_columns(weight: Tensor, dim: int) -> Tensor:
    """Weight [out, heads * dim] of a linear layer that takes rotated heads instead."""
    return rotate_values(weight.unflatten(1, (-1, dim)), False).reshape(weight.shape).contiguous()
