"""One side of one layer that grows by concatenation: its state, and what the host knows of it."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator
from contextvars import ContextVar

from xquant_fx.cache.room import enlarge
from xquant_fx.cache.state import KVState
from xquant_fx.errors import CacheStateError
from xquant_fx.kernels.layout import STEP_TOKENS
from xquant_fx.plan.spec import KVSpec

#: Tokens there is room for at least.
LEAST_ROOM = 512
#: Tokens that may come behind those of a cache that is taken over before it needs more room, which compiles once more.
AHEAD = 256
#: Parts of a power of two that a cache of any room moves by: nothing is compiled for each, and less lies idle.
PARTS = 8
#: Rooms, in tokens, that graphs of any room are compiled for: this one, eight times as much, and so on.
LEAST_OF_GRAPHS, RATIO = 4096, 8

_exact = ContextVar("exact rooms", default=False)


def room_for(tokens: int, ahead: int = STEP_TOKENS, any_room: bool = False) -> int:
    """Tokens to make room for where ``tokens`` are stored and ``ahead`` are to come: by default a step of a few.

    A power of two; beyond LEAST_ROOM, in a cache of ``any_room``, as many of its PARTS as that takes.
    """
    room = LEAST_ROOM
    while room < tokens + ahead:
        room *= 2
    part = room // PARTS if any_room and room > LEAST_ROOM else room
    return -(-(tokens + ahead) // part) * part


def first_room(tokens: int, any_room: bool) -> int:
    """Tokens that a cache which is new, with ``tokens`` in it, gets room for; less where graphs are of ``any_room``."""
    return room_for(tokens, any_room=True) if any_room else room_for(tokens, AHEAD)


def room_of_graphs(room: int) -> int:
    """The room, in tokens, that graphs for caches with this ``room`` and any other up to it are compiled for."""
    wide = LEAST_OF_GRAPHS
    while wide < room:
        wide *= RATIO
    return wide


def with_lasting_room(spec: KVSpec, room: int) -> KVSpec:
    """``spec`` with ``room``, in tokens; or with that of graphs, if a window starts over in it.

    From the start, while it fills: it takes a window's memory then, and is not compiled for anew when it is full.
    """
    for_long = spec.with_room(room_of_graphs(room))
    return for_long if for_long.wraps else spec.with_room(room)


@functools.cache  # one object for all caches of a model: guards compare it in each step
def of_any_room(spec: KVSpec) -> KVSpec:
    """``spec`` as graphs of any room rely on it, or itself where they are made for the room that there is.

    Codes that start over lie elsewhere than those that do not yet, and what is not quantized no kernel reads.
    """
    wide = dataclasses.replace(spec.with_room(room_of_graphs(spec.shape[2])), any_room=True)
    return wide if spec.quantized and not (spec.wraps or wide.wraps) else spec


@functools.cache
def of_any_length(spec: KVSpec) -> KVSpec:
    """The same of a buffer that does not grow. Codes that start over in both are in the same places of one size."""
    if not (spec.quantized and spec.wraps):
        return of_any_room(spec)
    wide = dataclasses.replace(spec.with_room(room_of_graphs(spec.shape[2])), any_room=True)
    return wide if wide.tensor_shapes() == spec.tensor_shapes() else spec


@contextlib.contextmanager
def exact_rooms() -> Iterator[None]:
    """Inside, graphs are made for the room that there is: for reports, which say how much that takes."""
    before = _exact.set(True)
    try:
        yield
    finally:
        _exact.reset(before)


class Growth:
    """One side of one layer as it grows: the state, its length as the host knows it, and what was overwritten.

    Graphs of ``any_room`` are made for a cache with more room than there is, and told at each call how much that is
    (``compiler/any_room.py``): so none is made anew when a cache has moved to more of it.
    """

    def __init__(self, state: KVState, tokens: int = 0, any_room: bool = False) -> None:
        self.state, self.tokens, self.furthest = state, tokens, tokens
        self.any_room = any_room
        self._of_graphs: tuple[KVSpec, KVSpec] | None = None
        self.overwritten: list[int] = []
        """For each time that an older tensor was continued: its length. Tokens from there on were replaced."""

    @property
    def spec(self) -> KVSpec:
        """What graphs rely on: the state's, or that with more room."""
        spec = self.state.spec
        if not self.any_room or _exact.get():
            return spec
        if self._of_graphs is None or self._of_graphs[0] is not spec:
            self._of_graphs = spec, of_any_room(spec)
        return self._of_graphs[1]

    def resume(self, tokens: int, since: int) -> None:
        """Go back to ``tokens``, as a tensor has them that was made when ``overwritten`` had ``since`` entries.

        Raises:
            CacheStateError: they were overwritten since, or what follows them cannot be taken back exactly.
        """
        self.check(tokens, since)
        if tokens < self.tokens:
            self.state.truncate(tokens)
            self.overwritten.append(tokens)
            self.tokens = tokens

    def check(self, tokens: int, since: int) -> None:
        """Raise CacheStateError if any of the first ``tokens`` were overwritten after ``since``."""
        least = min(self.overwritten[since:], default=tokens)
        if least < tokens:
            spec = self.state.spec
            raise CacheStateError(
                f"layer {spec.layer} {spec.role}s: this tensor has {tokens} tokens, of which those from {least} on "
                "were overwritten when a shorter one was continued; continue copies (copy.deepcopy of the cache)"
            )

    def added(self, new: int) -> None:
        """Count ``new`` tokens that the state has got."""
        self.tokens += new
        self.furthest = max(self.furthest, self.tokens)

    @property
    def first(self) -> int:
        """The first token that can still be read: a sliding window's older ones are overwritten."""
        spec = self.state.spec
        return max(self.furthest - spec.window + 1 - spec.rollback_tokens, 0) if spec.wraps else 0

    def check_begin(self, begin: int) -> None:
        """Raise CacheStateError if tokens from ``begin`` on are not there any more."""
        held, spec = self.state.group.held(self.state), self.state.spec
        of_chunk = held is not None and held.past + held.new == self.tokens and begin > held.past - spec.window
        if begin < self.first and not of_chunk:
            raise CacheStateError(
                f"layer {spec.layer} {spec.role}s: this tensor begins at token {begin}, and of a window of "
                f"{spec.window} tokens only those from {self.first} on are kept; continue the last ones of it"
            )

    def reserve(self, tokens: int) -> None:
        """Make room for ``tokens`` and a step after them."""
        if tokens > self.state.spec.shape[2]:
            room = room_for(tokens, any_room=self.any_room)
            enlarge(self.state, with_lasting_room(self.state.spec, room).shape[2])
