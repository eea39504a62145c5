"""What is kept of a prompt's queries: the mean square of each channel, by which channels of keys are ranked."""

from __future__ import annotations

import torch
from torch import Tensor

#: Tokens whose queries say enough of a sequence's.
FEWEST_QUERIES = 16
#: Tokens whose queries are squared at a time.
QUERIES_AT_ONCE = 512
#: Of a buffer that is in full precision yet: what is kept of the queries that read it.
_NOTED = "_xquant_queries"


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


def note(buffer: Tensor, q: Tensor) -> None:
    """Note on keys ``buffer`` [B, H, N, D] in full precision the queries of the prompt that they hold."""
    noted = mean_squares(q, buffer.shape[1])
    if noted is not None:
        setattr(buffer, _NOTED, noted)


def noted(buffer: Tensor) -> Tensor | None:
    """What was noted on ``buffer``, if it is still for its rows."""
    found: Tensor | None = getattr(buffer, _NOTED, None)
    return found if found is not None and found.shape == (*buffer.shape[:2], buffer.shape[3]) else None
