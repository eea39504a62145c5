"""What is kept of a prompt's queries: the mean square of each channel, by which channels of keys are ranked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

#: Tokens whose queries say enough of a sequence's.
FEWEST_QUERIES = 16
#: Tokens whose queries are squared at a time.
QUERIES_AT_ONCE = 512
#: Of what holds keys that are in full precision yet: what is kept of the queries that read them.
_NOTE = "_xquant_queries"


class Note(NamedTuple):
    """Queries of a prompt, noted on what holds its keys: their buffer, and the layer, which may get another one."""

    squares: Tensor
    """``mean_squares``."""
    slot: int
    """Where the prompt's last token is among the keys,"""
    last: Tensor
    """and its key [B, H, D]: if that is another by now, another sequence is there."""


def mean_squares(q: Tensor, heads: int) -> Tensor | None:
    """float32 [B, KV heads, D] of queries ``q`` [B, heads, q, D]; None: they are few, or not of such ``heads``.

    Few queries say little: FEWEST_QUERIES tokens are the least.
    """
    if q.dim() != 4 or q.shape[1] % heads or q.shape[2] < FEWEST_QUERIES:
        return None
    # Some tokens after the other: squares of all would be the most memory that a prompt takes for a moment.
    some = q.detach().split(QUERIES_AT_ONCE, 2)
    squares = torch.stack([part.to(torch.float32).square().sum(2) for part in some]).sum(0) / q.shape[2]
    return squares.unflatten(1, (heads, -1)).mean(2)


def note(holders: Sequence[Any], keys: Tensor, tokens: int, q: Tensor) -> None:
    """Note on what holds ``keys`` [B, H, N, D] in full precision the queries of the prompt of ``tokens`` in them."""
    squares = mean_squares(q, keys.shape[1])
    if squares is not None:
        slot = min(tokens, keys.shape[2]) - 1
        noted = Note(squares, slot, keys[:, :, slot].clone())
        for holder in holders:
            setattr(holder, _NOTE, noted)


def take_note(holder: Any, keys: Tensor) -> Tensor | None:
    """``mean_squares`` that were noted on ``holder``, if ``keys`` still hold that prompt; they are taken from it."""
    notes = Notes(holder)
    notes.forget()
    return notes.squares_of(keys)


class Notes:
    """What is noted on these ``holders``."""

    def __init__(self, *holders: Any) -> None:
        self.found: list[tuple[Any, Note]] = [(x, vars(x)[_NOTE]) for x in holders if _NOTE in vars(x)]

    def squares_of(self, keys: Tensor) -> Tensor | None:
        """``mean_squares`` of the prompt that ``keys`` [B, H, N, D] hold; None: there are none, or it is another."""
        for _, noted in self.found:
            is_such = noted.last.shape == (*keys.shape[:2], keys.shape[3]) and noted.slot < keys.shape[2]
            if is_such and torch.equal(noted.last, keys[:, :, noted.slot]):
                return noted.squares
        return None

    def forget(self) -> None:
        """Take it from there."""
        for holder, _ in self.found:
            vars(holder).pop(_NOTE, None)

    def put_back(self) -> None:
        """Note it there again."""
        for holder, noted in self.found:
            setattr(holder, _NOTE, noted)
