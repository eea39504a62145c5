"""Codes for several numbers at once, for vectors that are near Gaussian: a codebook, and a trellis.

*Codebook.* Eight numbers are one byte, the nearest of 256 vectors. They are made once, by k-means on a Gaussian, as
NSNQuant does (arXiv 2505.18231).

*Trellis* (bit-shift, after QTIP, arXiv 2406.11235). A vector of T numbers is a string of T * k bits. Number t is
``values[state t]``, where the state is the L bits from place t * k on; so reading needs no sequence, though states
overlap:

    next state = state >> k | new bits << (L - k)

Writing looks for the path of least squared error (Viterbi). The string is a ring: the last states end in the bits
that the first begins with, and no bits are stored beside the T * k.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

SAMPLES = 65536
ROUNDS = 25


def nearest(x: Tensor, book: Tensor) -> Tensor:
    """Index int64 [n] of the vector of ``book`` [size, d] that is nearest to each of ``x`` [n, d]."""
    return (x @ book.T - book.square().sum(1) / 2).argmax(1)


@functools.cache
def gaussian_codebook(dim: int = 8, size: int = 256) -> Tensor:
    """float32 [size, dim]: the k-means centres of a fixed Gaussian sample, the same each time."""
    x = torch.randn(SAMPLES, dim, generator=torch.Generator().manual_seed(0))
    book = x[:size].clone()
    for _ in range(ROUNDS):
        book = _means(x, nearest(x, book), book)
    return book


def _means(x: Tensor, index: Tensor, before: Tensor) -> Tensor:
    """Mean of the rows of ``x`` of each index; what it was ``before`` where there is none."""
    count = torch.bincount(index, minlength=len(before)).to(x.dtype)
    total = torch.zeros_like(before).index_add_(0, index, x)
    shape = (-1, *[1] * (before.dim() - 1))
    return torch.where((count > 0).view(shape), total / count.clamp_min(1).view(shape), before)


class Trellis(NamedTuple):
    """What the states of a bit-shift trellis stand for."""

    values: Tensor
    """float32 [2**L]."""
    bits: int
    """k: new bits per number, less than L."""

    @property
    def tails(self) -> int:
        """2**(L - k): ways in which two neighbouring states may overlap."""
        return len(self.values) >> self.bits


def viterbi(x: Tensor, trellis: Trellis, overlap: Tensor | None = None) -> Tensor:
    """States int64 [n, T] whose values are nearest to ``x`` [n, T], of all paths.

    With ``overlap``, int64 [n] below ``trellis.tails``, of all that begin after these bits and end with them.
    """
    values, bits, tails = trellis.values[:, None], trellis.bits, trellis.tails
    state = torch.arange(len(values))[:, None]
    x = x.T.contiguous()  # vectors last: neighbours in memory
    cost = (x[0] - values).square()
    if overlap is not None:
        cost = cost.masked_fill(state % tails != overlap, torch.inf)
    came = []
    for number in x[1:]:
        best, index = _best_of(cost.unflatten(0, (tails, 2**bits)))
        came.append(index)
        cost = best.repeat(2**bits, 1) + (number - values).square()
    if overlap is not None:
        cost = cost.masked_fill(state >> bits != overlap, torch.inf)
    path = [cost.argmin(0)]
    for index in reversed(came):
        tail = path[-1] % tails
        path.append((tail << bits) | index.gather(0, tail[None])[0].long())
    return torch.stack(path[::-1], 1)


def _best_of(cost: Tensor) -> tuple[Tensor, Tensor]:
    """Least of ``cost`` [tails, choices, n] over the choices, and the first that it is: uint8 [tails, n]."""
    best, index = cost[:, 0], torch.zeros(cost.shape[0], cost.shape[2], dtype=torch.uint8)
    for choice in range(1, cost.shape[1]):
        index = torch.where(cost[:, choice] < best, choice, index)
        best = torch.minimum(best, cost[:, choice])
    return best, index


def ring_path(x: Tensor, trellis: Trellis) -> Tensor:
    """States int64 [n, T] of a path that ends in the bits it begins with, near to ``x`` [n, T].

    The bits at its seam are those that the best open path has there, begun half way round.
    """
    half = x.shape[1] // 2
    around = viterbi(x.roll(-half, 1), trellis)
    return viterbi(x, trellis, around[:, x.shape[1] - half - 1] >> trellis.bits)


@functools.cache
def gaussian_trellis(bits: int, log_states: int = 8) -> Trellis:
    """A trellis for a unit Gaussian, the same each time: each state is the mean of what paths give it (Lloyd)."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(SAMPLES // 128, 128, generator=generator)
    trellis = Trellis(torch.randn(2**log_states, generator=generator), bits)
    for _ in range(ROUNDS):
        states = viterbi(x, trellis)
        trellis = trellis._replace(values=_means(x.flatten(), states.flatten(), trellis.values))
    return trellis
