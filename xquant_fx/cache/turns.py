"""Threads may take turns with a cache, and never step through it at once.

A compiled step is one turn, an eager one a turn per layer; nobody waits. Two threads that meet are both told: the one
that comes second at once, the other one as its turn ends, since what either has stored before may have come between the
other's tokens.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import TracebackType
from typing import Any

from xquant_fx.errors import CacheStateError

AT_ONCE = (
    "two threads stepped through this cache at once, so that tokens of both may be in it: give each thread a cache of "
    "its own (cache.fork()) or a lock around its steps; reset() empties it, crop() keeps what was there before"
)


class Turn:
    """Whose turn it is with one cache; a context manager around what writes to it."""

    def __init__(self) -> None:
        # A dict and no lock: whoever Ctrl-C struck between taking a turn and using it goes on with it.
        self._holder: dict[str, int] = {}
        self._clash = False
        self._steps, self._last, self._mended = 0, 0, False
        self._announced: dict[int, int] = {}

    def __reduce__(self) -> Any:
        return Turn, ()  # a copy belongs to nobody

    def __enter__(self) -> Turn:
        me = threading.get_ident()
        if self._holder.setdefault("thread", me) != me:  # which no thread can come between
            self._clash = True
            raise CacheStateError(AT_ONCE)
        if self._clash:
            self._give(me)
            raise CacheStateError(AT_ONCE)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._give(threading.get_ident())
        if self._clash and error is None:
            raise CacheStateError(AT_ONCE)

    def _give(self, me: int) -> None:
        if self._holder.get("thread") == me:
            self._holder.clear()

    def announce(self, between_steps: bool) -> None:
        """This thread is about to make positions and masks of an eager step; whether no step has begun and not ended.

        One that this thread began itself, or that was taken back since, has ended.
        """
        me = threading.get_ident()
        self._announced[me] = self._steps if between_steps or self._mended or self._last == me else -1

    def begin(self) -> None:
        """This thread begins a step.

        Raises:
            CacheStateError: another one has stepped since this one announced it: positions and masks are wrong.
        """
        me = threading.get_ident()
        announced = self._announced.pop(me, self._steps)
        if announced != self._steps and self._last != me:
            self._clash = True
            raise CacheStateError(AT_ONCE)
        self._steps += 1
        self._last, self._mended = me, False

    def others(self) -> bool:
        """Whether the last step was begun by another thread, as far as this (of a copy: nobody) knows."""
        return self._last not in (0, threading.get_ident())

    def forget(self) -> None:
        """All buffers hold the same again, as somebody asked for."""
        self._clash, self._mended = False, True


@contextmanager
def turns_of(turns: Sequence[Turn]) -> Iterator[None]:
    """The turns with all caches that one graph appends to."""
    with ExitStack() as stack:
        for turn in turns:
            stack.enter_context(turn)
        yield
