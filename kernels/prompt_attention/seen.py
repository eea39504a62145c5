"""Which tokens the queries of a prompt see, where that is one run of tokens for each: read off a mask once."""

from __future__ import annotations

import weakref
from typing import NamedTuple

import torch
from torch import Tensor


class Seen(NamedTuple):
    """What each query sees: tokens ``first`` to ``end`` - 1, none if ``end`` is not larger."""

    first: Tensor
    """int32 [B, q], contiguous."""
    end: Tensor
    """int32 [B, q], contiguous."""
    tokens: int
    """The largest ``end``."""


def causal(batch: int, tokens: int) -> Seen:
    """Of a prompt [batch, tokens] without a mask: each token sees those before it, and itself."""
    end = torch.arange(1, tokens + 1, dtype=torch.int32).expand(batch, tokens).contiguous()
    return Seen(torch.zeros_like(end), end, tokens)


def seen_by(mask: Tensor, query: Tensor, key: Tensor) -> Seen | None:
    """What queries [B, heads, q, D] see of keys [B, KV heads, n, D] by ``mask``; None: no one run of tokens each.

    ``mask`` is of bools, [q, n] or [B or 1, 1, q, n], as ``scaled_dot_product_attention`` takes it.
    """
    batch, tokens, kept = query.shape[0], query.shape[2], key.shape[2]
    if mask.dtype != torch.bool or mask.dim() not in (2, 4) or mask.shape[-2:] != (tokens, kept):
        return None
    if mask.dim() == 4 and (mask.shape[1] != 1 or mask.shape[0] not in (1, batch)):
        return None
    found = _remembered(mask)
    if found is None or (mask.dim() == 4 and mask.shape[0] == batch):
        return found
    first, end = (x.expand(batch, tokens).contiguous() for x in (found.first, found.end))
    return Seen(first, end, found.tokens)


#: The mask that was read last, its version, and what it says: all layers of a model are given the same one.
_last: tuple[weakref.ref[Tensor], int, Seen | None] | None = None


def _remembered(mask: Tensor) -> Seen | None:
    global _last
    if mask.is_inference():  # which counts no versions, so it may have been written to
        return _read(mask)
    last = _last
    if last is not None and last[0]() is mask and last[1] == mask._version:
        return last[2]
    found = _read(mask)
    _last = weakref.ref(mask), mask._version, found
    return found


def _read(mask: Tensor) -> Seen | None:
    rows = (mask if mask.dim() == 2 else mask[:, 0]).reshape(-1, *mask.shape[-2:]).view(torch.uint8)
    count, first = rows.sum(-1, dtype=torch.int32), rows.argmax(-1)
    last = rows.shape[-1] - 1 - rows.flip(-1).argmax(-1)
    if not bool(((count == 0) | (last - first + 1 == count)).all()):
        return None
    end = torch.where(count == 0, 0, last + 1)
    return Seen(first.int(), end.int(), int(end.max()))
