"""The ways that ``peers.py`` compares, each in a process of its own, as users have it.

Libraries that share an OpenMP runtime make each other slow: libgomp puts threads to sleep at the end of each parallel
region as soon as a process has more of them, over all teams, than processors.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from typing import Any

from peer_ways import MissingError, Time, Way


class Apart(Way):
    """A way in a process that waits while others are measured.

    Raises:
        MissingError: it cannot be made there, or failed, and why.
    """

    def __init__(self, make: Callable[..., Way], *args: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        context.Process(target=_serve, args=(theirs, make, args), daemon=True).start()
        theirs.close()
        self.instructions: str = self._answer()

    def _answer(self) -> Any:
        try:
            found = self.pipe.recv()
        except EOFError:
            found = MissingError("its process died")
        if isinstance(found, Exception):
            raise found
        return found

    def steps(self, context: int, count: int) -> list[Time]:
        """As the way measures them."""
        self.pipe.send((context, count))
        made: list[Time] = self._answer()
        return made


def _serve(pipe: Any, make: Callable[..., Way], args: tuple[Any, ...]) -> None:
    """Make a way, tell for which instructions it is built ("" if it does not say so), then measure when asked."""
    try:
        way = make(*args)
        pipe.send(getattr(way, "instructions", ""))
        while True:
            pipe.send(way.steps(*pipe.recv()))
    except EOFError:
        return
    except Exception as error:  # a library's exceptions may not travel
        pipe.send(MissingError(f"{type(error).__name__}: {error}"))
