"""What is kept of a prompt's queries: the mean square of each channel, by which channels of keys are ranked."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

#: Tokens whose queries say enough of a sequence's.
FEWEST_QUERIES = 16
#: Tokens whose queries are squared at a time.
QUERIES_AT_ONCE = 512
#: Of a buffer that is in full precision yet: what is kept of the queries that read it.
_NOTE = "_xquant_queries"


class Note(NamedTuple):
    """Queries of a prompt, noted on the buffer of its keys."""

    squares: Tensor
    """``mean_squares``."""
    slot: int
    """Where the prompt's last token is in the buffer,"""
    last: Tensor
    """and its keys [B, H, D]: if they are others by now, another sequence is in it."""


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


def note(buffer: Tensor, tokens: int, q: Tensor) -> None:
    """Note on keys ``buffer`` [B, H, N, D] in full precision the queries of the prompt of ``tokens`` that it holds."""
    squares = mean_squares(q, buffer.shape[1])
    if squares is not None:
        slot = min(tokens, buffer.shape[2]) - 1
        setattr(buffer, _NOTE, Note(squares, slot, buffer[:, :, slot].clone()))


def take_note(buffer: Tensor) -> Tensor | None:
    """``mean_squares`` that were noted on ``buffer``, if it still holds that prompt; they are no longer afterwards."""
    found: Note | None = vars(buffer).pop(_NOTE, None)
    if found is None or found.last.shape != (*buffer.shape[:2], buffer.shape[3]):
        return None
    return found.squares if torch.equal(found.last, buffer[:, :, found.slot]) else None
