"""Whether a call that seems to bring many tokens is worth tracing: what a cache remembers of such calls."""

from __future__ import annotations

from xquant_fx.kernels.layout import STEP_TOKENS

#: After so many chunks in a row of one number of tokens, with no step between, the next is traced: it will be compiled
#: for this number, and takes half as long then.
SAME = 16
#: Chunks of so many tokens gain nothing by that.
LONG = 256


class ChunkGuesses:
    """How many tokens a call brings is guessed from its arguments (``prompts.py``)."""

    def __init__(self) -> None:
        self.misjudged = False
        """Whether a call brought a few tokens after all: such calls are compiled for, so no more is guessed."""
        self.tokens = 0
        """Of the last call that was left untraced,"""
        self.times = 0
        """and how many came in a row with as many."""

    def leave_untraced(self, tokens: int) -> bool:
        """Whether a call that seems to bring ``tokens`` is to run uncompiled, as it would anyway or better."""
        if self.misjudged or tokens <= STEP_TOKENS:
            return False
        if tokens != self.tokens:
            self.tokens, self.times = tokens, 0
        self.times += 1
        return self.times <= SAME or tokens >= LONG

    def stepped(self, tokens: int) -> None:
        """A compiled graph appended ``tokens``: Dynamo leaves the number of a chunk open that comes after a step."""
        if tokens <= STEP_TOKENS:
            self.times = 0
