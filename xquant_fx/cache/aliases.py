"""Ordinary buffers whose dimensions a program has in another order, or as parts of one tensor, shown as [B, H, N, D].

A graph that was rewritten (``compiler/laid_out_graph.py``, ``compiler/stacked_graph.py``) is given such an alias for
one step. What is decided about it is decided about the buffer that it shows, and what is done to it is done to that
one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

View = tuple[Any, ...]
"""A function of torch, and its arguments behind the tensor."""

ORDER = "BHND"
"""Of what is stored."""
_SHOWN = "_xquant_shown"
_STACK = "_xquant_stack"


def merged_heads(dims: str) -> str:
    """The number of heads where they are merged into the channels, as in "BN12D"; "" where they are a dimension."""
    return "".join(filter(str.isdigit, dims))


def to_order(dims: str) -> list[View]:
    """The views that make [B, H, N, D] of a tensor with dimensions ``dims``."""
    if heads := merged_heads(dims):
        return [(torch.unflatten, -1, (int(heads), -1)), *to_order(dims.replace(heads, "H"))]
    there = [dim for dim in ORDER if dim in dims]
    added: list[View] = [(torch.unsqueeze, at) for at, dim in enumerate(ORDER) if dim not in dims]
    return [(torch.permute, [dims.index(dim) for dim in there]), *added]


def from_order(dims: str, shape: Sequence[int]) -> list[View]:
    """The views that make dimensions ``dims`` of a tensor [B, H, N, D] of this ``shape``."""
    if heads := merged_heads(dims):
        return [*from_order(dims.replace(heads, "H"), shape), (torch.flatten, -2)]
    there = [dim for dim in ORDER if dim in dims]
    # Tokens may be a number that is not known, which a graph's arguments cannot hold.
    sizes = [-1 if dim == "N" else size for dim, size in zip(ORDER, shape, strict=True) if dim in dims]
    dropped: list[View] = [(torch.reshape, sizes)] if len(there) < len(ORDER) else []
    return [*dropped, (torch.permute, [there.index(dim) for dim in dims])]


def shape_in(dims: str, shape: Sequence[Any]) -> list[Any]:
    """The sizes of a tensor [B, H, N, D] of ``shape`` under ``dims``."""
    if heads := merged_heads(dims):
        *others, count, channels = shape_in(dims.replace(heads, "H"), shape)
        return [*others, count * channels]
    sizes = dict(zip(ORDER, shape, strict=True))
    return [sizes[dim] for dim in dims]


def in_order(x: Tensor, dims: str) -> Tensor:
    """``x`` with dimensions ``dims`` as [B, H, N, D], a view."""
    for op, *args in to_order(dims):
        x = op(x, *args)
    return x


def laid_out(x: Tensor, dims: str) -> Tensor:
    """``x`` [B, H, N, D] with dimensions ``dims``, a view."""
    for op, *args in from_order(dims, x.shape):
        x = op(x, *args)
    return x


def alias_of(buffer: Tensor, dims: str) -> Tensor:
    """``buffer``, whose dimensions are ``dims``, as [B, H, N, D]: no view, which would count as one of its holders."""
    alias = _alias(buffer, in_order(_like(buffer), dims))
    setattr(alias, _SHOWN, (buffer, dims))
    return alias


def part_alias(stack: Tensor, place: Sequence[tuple[int, int | range]]) -> Tensor:
    """A part of ``stack``, likewise: what the selections (dimension, index) leave, one after another."""
    like = _like(stack)
    for at, index in place:
        like = like.select(at, index) if isinstance(index, int) else like.narrow(at, index.start, len(index))
    alias = _alias(stack, like)
    setattr(alias, _STACK, stack)
    return alias


def _like(buffer: Tensor) -> Tensor:
    return torch.empty_strided(buffer.shape, buffer.stride(), device="meta")


def _alias(buffer: Tensor, like: Tensor) -> Tensor:
    """A tensor in the memory of ``buffer``, where ``like`` would be in that of one like it."""
    alias = torch.empty(0, dtype=buffer.dtype, device=buffer.device)
    alias.set_(buffer.untyped_storage(), buffer.storage_offset() + like.storage_offset(), like.shape, like.stride())
    return alias


def shown_by(alias: Tensor) -> tuple[Tensor, str] | None:
    """The buffer that ``alias`` shows in another order, and its dimensions; None if it does not."""
    found: tuple[Tensor, str] | None = getattr(alias, _SHOWN, None)
    return found


def no_alias(tensor: Tensor) -> None:
    """Forget what ``tensor`` showed: it has become a buffer itself."""
    for name in (_SHOWN, _STACK):
        tensor.__dict__.pop(name, None)


def aliases_from(tensor: Tensor) -> list[Tensor]:
    """``tensor``, and if it is an alias, what it shows, and so on: the last one is what a program holds."""
    found = [tensor]
    while True:
        shown = shown_by(found[-1])
        stack: Tensor | None = getattr(found[-1], _STACK, None)
        if shown is None and stack is None:
            return found
        found.append(shown[0] if shown is not None else stack)  # type: ignore[arg-type]


def owner_of(tensor: Tensor) -> Tensor:
    """The buffer that ``tensor`` shows, or is a part of, or ``tensor`` itself."""
    return aliases_from(tensor)[-1]
