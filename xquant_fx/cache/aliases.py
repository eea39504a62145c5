"""Ordinary buffers whose dimensions a program has in another order, shown as [B, H, N, D] for one step.

A graph that was rewritten to that order (``compiler/laid_out_graph.py``) is given such an alias. What is decided about
it is decided about the buffer that it shows, and what is done to it is done to that one.
"""

from __future__ import annotations

import torch
from torch import Tensor

ORDER = "BHND"
"""Of what is stored."""
_SHOWN = "_xquant_shown"


def in_order(x: Tensor, dims: str) -> Tensor:
    """``x`` with dimensions ``dims`` as [B, H, N, D], a view."""
    there = [dim for dim in ORDER if dim in dims]
    x = x.permute([dims.index(dim) for dim in there])
    for at, dim in enumerate(ORDER):
        x = x if dim in dims else x.unsqueeze(at)
    return x


def laid_out(x: Tensor, dims: str) -> Tensor:
    """``x`` [B, H, N, D] with dimensions ``dims``, a view."""
    there = [dim for dim in ORDER if dim in dims]
    x = x.reshape([size for dim, size in zip(ORDER, x.shape, strict=True) if dim in dims])
    return x.permute([there.index(dim) for dim in dims])


def alias_of(buffer: Tensor, dims: str) -> Tensor:
    """``buffer``, whose dimensions are ``dims``, as [B, H, N, D]: no view, which would count as one of its holders."""
    like = in_order(torch.empty_strided(buffer.shape, buffer.stride(), device="meta"), dims)
    alias = torch.empty(0, dtype=buffer.dtype, device=buffer.device)
    alias.set_(buffer.untyped_storage(), buffer.storage_offset(), like.shape, like.stride())
    setattr(alias, _SHOWN, (buffer, dims))
    return alias


def shown_by(alias: Tensor) -> tuple[Tensor, str] | None:
    """The buffer that ``alias`` shows, and its dimensions; None if it is no alias."""
    found: tuple[Tensor, str] | None = getattr(alias, _SHOWN, None)
    return found


def owner_of(tensor: Tensor) -> Tensor:
    """The buffer that ``tensor`` shows, or ``tensor`` itself."""
    found = shown_by(tensor)
    return tensor if found is None else found[0]
