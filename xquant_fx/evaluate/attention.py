"""Attention in which each query sees its own part of the tokens quantized, as the steps of a decode do.

A step attends to what was quantized before it, so in one pass over many tokens every query has another limit. Two
score matrices, one of the keys as they were and one of the keys as they are read back, are joined by the limits
before the one softmax; the weights are split by the limits of the values.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

#: Queries at a time: bounds what the scores take.
BLOCK = 128


class Side(NamedTuple):
    """Keys or values of a window, and what the cache gives back for them."""

    full: Tensor
    """[B, H, T, D] in full precision."""
    read: Tensor
    """[B, H, n, D]: the first n <= T tokens as they are read once they are quantized."""
    limits: Tensor
    """int64 [q]: the tokens below it are quantized for this query; at most n, and negative for none."""

    def quantized(self, rows: slice) -> Tensor:
        """Whether the queries ``rows`` see the first n tokens quantized: bool [rows, n]."""
        return torch.arange(self.read.shape[2], device=self.limits.device) < self.limits[rows, None]


class Form(NamedTuple):
    """What a model's attention does to its scores."""

    scale: float
    mask: Tensor
    """bool (True may be attended to) or float (added), broadcastable to [B, Hq, q, T]."""
    softcap: float | None = None
    sink_logits: Tensor | None = None
    """[Hq], one more logit per head, without a value."""


def plain(full: Tensor, queries: int) -> Side:
    """A side of which no query sees a token quantized."""
    return Side(full, full[:, :, :0], torch.zeros(queries, dtype=torch.int64, device=full.device))


def attend(q: Tensor, keys: Side, values: Side, form: Form) -> Tensor:
    """Attention of queries ``q`` [B, Hq, q, D], Hq a multiple of H, computed in fp32: [B, Hq, q, D of the values]."""
    blocks = []
    for begin in range(0, q.shape[2], BLOCK):
        rows = slice(begin, begin + BLOCK)
        weights = _weights(q[:, :, rows].float(), keys, form, rows)
        blocks.append(_weighted(weights, values, rows))
    return torch.cat(blocks, 2).to(q.dtype)


def _weights(q: Tensor, keys: Side, form: Form, rows: slice) -> Tensor:
    """Softmax of the scores, fp32 [B, Hq, rows, T]."""
    scores, n = _scores(q, keys.full), keys.read.shape[2]
    if n:
        seen = torch.where(keys.quantized(rows), _scores(q, keys.read), scores[..., :n])
        scores = torch.cat([seen, scores[..., n:]], -1)
    scores = scores * form.scale
    if form.softcap:
        scores = form.softcap * torch.tanh(scores / form.softcap)
    scores = _masked(scores, form.mask, rows)
    if form.sink_logits is None:
        return scores.softmax(-1)
    extra = form.sink_logits.float()[:, None, None].expand(*scores.shape[:3], 1)
    return torch.cat([scores, extra], -1).softmax(-1)[..., :-1]


def _scores(q: Tensor, k: Tensor) -> Tensor:
    grouped = q.unflatten(1, (k.shape[1], -1))
    return (grouped @ k.float()[:, :, None].mT).flatten(1, 2)


def _masked(scores: Tensor, mask: Tensor, rows: slice) -> Tensor:
    mask = mask[..., rows, :] if mask.shape[-2] > 1 else mask
    return scores.masked_fill(~mask, -torch.inf) if mask.dtype is torch.bool else scores + mask


def _weighted(weights: Tensor, values: Side, rows: slice) -> Tensor:
    """Sum of the values, each as its query reads it: fp32 [B, Hq, rows, D]."""
    n = values.read.shape[2]
    grouped = weights.unflatten(1, (values.full.shape[1], -1))
    if not n:
        return (grouped @ values.full.float()[:, :, None]).flatten(1, 2)
    low = grouped[..., :n] * values.quantized(rows)
    high = torch.cat([grouped[..., :n] - low, grouped[..., n:]], -1)
    out = high @ values.full.float()[:, :, None] + low @ values.read.float()[:, :, None]
    return out.flatten(1, 2)
