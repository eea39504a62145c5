"""Whether a call that seems to bring many tokens is left untraced: what a cache remembers of such calls."""

from __future__ import annotations

from xquant_fx.kernels.layout import STEP_TOKENS

#: After so many chunks in a row of one number of tokens, with no step between, the next is traced: it will be compiled
#: for this number, and takes half as long then.
SAME = 16
#: Chunks of so many tokens gain nothing by that.
LONG = 256


class ChunkGuesses:
    """Of one cache."""

    def __init__(self) -> None:
        self.tokens = 0
        """Of the last chunk that was left untraced,"""
        self.times = 0
        """how many came in a row with as many,"""
        self.seen_at = -1
        """and after how many steps: each layer may ask, if each is compiled by itself."""

    def leave_untraced(self, tokens: int, steps: int) -> bool:
        """Whether a call that seems to bring ``tokens``, more than STEP_TOKENS, runs uncompiled after ``steps``."""
        if tokens != self.tokens:
            self.tokens, self.times = tokens, 0
        if steps != self.seen_at:
            self.times, self.seen_at = self.times + 1, steps
        return self.times <= SAME or tokens >= LONG

    def stepped(self, tokens: int) -> None:
        """A step appended ``tokens``: Dynamo leaves the number of a chunk open that comes after a short one."""
        if tokens <= STEP_TOKENS:
            self.times = 0
