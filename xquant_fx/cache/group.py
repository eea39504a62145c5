"""What the buffers of one cache have in common: plan, padding, faults, the chunk just written, and steps.

A step writes every buffer once. When a buffer is written again, a step begins: then all must hold as many tokens, or
the step before was interrupted between two of them (an exception, Ctrl-C), and positions would no longer mean the same
in all layers.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any, Protocol

import torch
from torch import Tensor

from xquant_fx.cache.faults import FaultMonitor
from xquant_fx.cache.turns import AT_ONCE, Turn
from xquant_fx.errors import CacheStateError
from xquant_fx.kernels.layout import STEP_TOKENS
from xquant_fx.plan.plan import Plan
from xquant_fx.plan.spec import KVSpec
from xquant_fx.warn_once import warn_once

#: Layer and role of a buffer.
BufferName = tuple[int, str]
#: Uncompiled steps in a row after which one is told that nothing is compiled.
MANY_STEPS = 64
#: References after which those are dropped that nobody needs any more.
MANY_READINGS = 64


class Member(Protocol):
    """A ``KVState``."""

    spec: KVSpec

    @property
    def owned(self) -> dict[str, Tensor]:
        """Its stored tensors."""

    def store_late(self, x: Tensor, pos: Tensor) -> None:
        """Store a prompt that has waited."""


class Trial(Protocol):
    """A ``compiler.trial.Trial``."""

    @property
    def ends_at_once(self) -> bool:
        """Whether uncompiled code ends it."""

    def take_back(self) -> None:
        """Make all buffers what they were."""


class Reading(Protocol):
    """Tokens of a buffer that are read later."""

    def read(self) -> Tensor:
        """Dequantized, as they are now."""


class Chunk:
    """The last eager write: ``x`` [B, H, q, D] after ``past`` tokens, and what it overwrote, as it was before."""

    def __init__(self, x: Tensor | None, past: int, new: int, before: dict[str, Tensor] | None = None) -> None:
        self.x, self.past, self.new, self.before = x, past, new, before or {}
        self.reader: weakref.ref[Tensor] | None = None
        """Of a sliding window whose older tokens are overwritten: what reads them as they were."""

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "reader": None}  # which reads this one, and no copy

    @property
    def is_needed(self) -> bool:
        """Whether layers above may read this one: attention of its own lets go of what it has read."""
        return self.x is None or (self.reader is not None and self.reader() is not None)


class CacheGroup:
    """Shared by all states of one cache.

    ``chunks`` keeps the full-precision keys and values of the layer written last, if the chunk was
    longer than the residual windows can give back: an eager prefill attends to its own tokens
    unquantized. It holds one layer at a time, but for the step that takes buffers over, whose layers may be appended
    to before any of them is read.

    ``lockstep`` says that each step writes every buffer, as in an ``XQuantCache``: buffers of different length are an
    interrupted step. Buffers that were taken over may belong to several sequences.

    ``late`` is a prompt's keys that wait for the queries by which their channels are ranked (``KVState.note_queries``):
    attention, which comes right behind the append, shows them. Whoever asks for what is stored has it stored before
    (``settle``), and so does any other step: a copy of one layer's keys waits, no longer than to the next layer.
    """

    def __init__(
        self, plan: Plan, batch: int, device: torch.device, start: Tensor | None = None, *, lockstep: bool = False
    ) -> None:
        self.plan, self.lockstep = plan, lockstep
        with torch.inference_mode(False):
            self.start = torch.zeros(batch, dtype=torch.int64, device=device)
            self.faults = FaultMonitor(device)
            self.anchor = torch.empty(0, device=device)
            """What Dynamo is shown inside of each buffer: one tensor, at which it looks once, of a copy, too. Graphs
            hold for as many different ones as they were made for: so buffers of several caches are not taken for one.
            """
        self.rows: list[CacheGroup] = []
        """Of a cache whose rows have lengths of their own: what each row has in common with itself."""
        if start is not None:
            self.start.copy_(start)
        self.chunk_layer: int | None = None
        self.chunks: dict[BufferName, Chunk] = {}
        self.holds_all = False
        self.late: tuple[Member, Tensor, Tensor] | None = None
        """A state, and the keys [B, H, q, D] and positions [q] that it is still to store."""
        self.step_tokens = 0
        self.selection: object = None
        """What ``select.py`` makes of it, buffer by buffer."""
        self.taken_over: list[weakref.ref[Tensor]] = []
        """The buffers that were ordinary ones once, of a cache that was taken over."""
        self.readings: list[weakref.ref[Reading]] = []
        """What is to be read later of buffers as they are now (``held_tokens.py``): who changes what is stored calls
        ``enter``, ``drop`` or ``read_now`` first."""
        self.collected: dict[object, Any] = {}
        """What compiled steps take of this cache, by step."""
        self.on_trial: Trial | None = None
        """What may still make all of it ordinary tensors again."""
        self.members: list[weakref.ref[Member]] = []
        self.written: set[BufferName] = set()
        """Buffers that the step has written so far."""
        self.doubtful = False
        """Whether the step that wrote them may have ended before its end."""
        self.interrupted = False
        """Whether a compiled step did."""
        self.uncompiled = 0
        """Steps of one token that ran uncompiled, in a row,"""
        self.short_steps = 0
        """and those of up to STEP_TOKENS of this sequence."""
        self.steps = 0
        """Steps that began behind others."""
        self.stores = 0
        """Writes of uncompiled code to a buffer,"""
        self.last_stored = 0
        """and tokens of the last one."""
        self.turn = Turn()

    def __getstate__(self) -> dict[str, object]:
        self.settle()
        empty: dict[str, list[Any]] = {name: [] for name in ("members", "taken_over", "rows", "readings")}
        return {**self.__dict__, **empty, "collected": {}, "selection": None, "on_trial": None}

    def with_start(self, start: Tensor) -> CacheGroup:
        """An empty group of another batch or device, with ``start`` int64 [B]."""
        return CacheGroup(self.plan, start.shape[0], start.device, start, lockstep=self.lockstep)

    def row_groups(self) -> list[CacheGroup]:
        """A group for each row, with this one's padding and faults."""
        if not self.rows:
            batch, device = self.start.shape[0], self.start.device
            if self.faults.tensor.shape[0] != batch:
                self.faults = FaultMonitor(device, batch)
            for row in range(batch):
                group = CacheGroup(self.plan, 1, device)
                group.start, group.holds_all = self.start[row : row + 1], self.holds_all
                group.faults.tensor = self.faults.tensor[row : row + 1]
                self.rows.append(group)
        return self.rows

    def join(self, state: Member) -> None:
        """Count ``state`` among the buffers of this cache, which does not keep it alive."""
        self.members.append(weakref.ref(state))

    def stepped(self, tokens: int) -> None:
        """A compiled graph appended ``tokens``; eager code that reads next sees the state before its flush."""
        self.drop()
        for group in (self, *self.rows):
            group.step_tokens, group.uncompiled, group.short_steps = tokens, 0, 0

    def hold(self, state: Member, chunk: Chunk) -> None:
        """Keep ``chunk`` until the same side of this layer is written; what holds tokens, until another layer is.

        Of a short step, whose tokens the windows hold, how many there were is kept: layers above may read this one.
        """
        self.stores, self.last_stored = self.stores + 1, chunk.new
        if self.chunk_layer != state.spec.layer and not self.holds_all:
            self._drop_copies()
        self.chunk_layer = state.spec.layer
        self.chunks[state.spec.layer, state.spec.role] = chunk

    def held(self, state: Member) -> Chunk | None:
        """The chunk that ``state`` wrote last, if it is kept."""
        return self.chunks.get((state.spec.layer, state.spec.role))

    def hold_one_layer(self) -> None:
        """From now on, as before a takeover: let go of all chunks but those of the layer written last."""
        self.read_now()
        for group in (self, *self.rows):
            group.holds_all = False
            group._drop_copies(but=group.chunk_layer)

    def forget(self, state: Member) -> None:
        """Let go of the chunk of ``state``, and of no other's."""
        self.read_now()
        for group in (self, *self.rows):
            group.chunks.pop((state.spec.layer, state.spec.role), None)

    def put_off(self, reading: Reading) -> None:
        """It is read at the latest when buffers change."""
        if len(self.readings) >= MANY_READINGS:
            self.readings = [ref for ref in self.readings if ref() is not None]
        self.readings.append(weakref.ref(reading))

    def read_now(self) -> None:
        """What was put off, before buffers, or what is kept of the last chunk, change."""
        readings, self.readings = self.readings, []
        for ref in readings:
            if (reading := ref()) is not None:
                reading.read()

    def settle(self, state: Member | None = None) -> None:
        """Store what waits for queries: of ``state``, or None: whatever does."""
        if self.late is not None and (state is None or self.late[0] is state):
            (waiting, x, pos), self.late = self.late, None
            waiting.store_late(x, pos)

    def forget_late(self, state: Member) -> None:
        """Do not store what waits of ``state``."""
        if self.late is not None and self.late[0] is state:
            self.late = None

    def _drop_copies(self, but: int | None = None) -> None:
        """Let go of the chunks that hold tokens, ``but`` those of one layer."""
        self.step_tokens = 0
        self.chunks = {key: chunk for key, chunk in self.chunks.items() if chunk.is_needed or key[0] == but}

    def drop(self) -> None:
        """Let go of the chunk."""
        self.read_now()
        for group in (self, *self.rows):
            group.chunk_layer, group.chunks, group.step_tokens = None, {}, 0

    def enter(self, names: Iterable[BufferName], tokens: int | None = None) -> None:
        """Buffers are about to be written, by uncompiled code if ``tokens`` (how many) is given.

        Raises:
            CacheStateError: with them a step begins, and the one before was interrupted.
        """
        self.read_now()
        if self.late is not None and set(names) != {self._other_side(self.late[0])}:
            self.settle()
        if not self.written.isdisjoint(names):
            if self.doubtful or self.interrupted:
                self.check_whole()
            self.turn.begin()
            self.written = set()
            self.uncompiled += tokens == 1
            self.steps += 1
            if tokens is not None and tokens <= STEP_TOKENS:
                self.short_steps += 1
            if self.uncompiled >= MANY_STEPS:
                warn_once(
                    f"{MANY_STEPS} steps of a quantized cache ran uncompiled, which is slow: compile the model that "
                    'generate() calls, by model.compile(backend="xquant") (with PEFT: model.get_base_model()); if it '
                    "is, and torch warned of a recompile_limit, raise torch._dynamo.config.recompile_limit",
                    key="uncompiled steps",
                )
        elif not self.written:
            self.turn.begin()
        self.written.update(names)
        self.doubtful = self.lockstep

    @staticmethod
    def _other_side(state: Member) -> BufferName:
        return state.spec.layer, "value" if state.spec.role == "key" else "key"

    def announce(self) -> None:
        """Uncompiled code is about to make positions and masks of a step."""
        self.turn.announce(between_steps=len(self.written) in (0, len(self._alive())))

    def leave(self, names: frozenset[BufferName]) -> None:
        """A compiled graph has written these to its end."""
        if len(names) == len(self._alive()):
            self.doubtful = False

    def mended(self) -> None:
        """All buffers hold the same tokens again."""
        self.interrupted = False
        self.turn.forget()

    def lengths(self) -> dict[BufferName, int]:
        """Tokens that each buffer holds (waits for the device, once)."""
        members = self._alive()
        stored = torch.stack([m.owned["length"][..., 0].min() for m in members]).tolist()
        return {(m.spec.layer, m.spec.role): n for m, n in zip(members, stored, strict=True)}

    def _alive(self) -> list[Member]:
        return [state for ref in self.members if (state := ref()) is not None]

    def check_whole(self) -> None:
        """Raise CacheStateError unless all buffers hold the same tokens: a step broke off."""
        lengths = self.lengths()
        least, most = min(lengths, key=lambda name: lengths[name]), max(lengths, key=lambda name: lengths[name])
        low, high = lengths[least], lengths[most]
        if self.interrupted:
            mend = f"crop({low} - cache.get_seq_length()) keeps {low}, reset() none" if self.lockstep else "reset() it"
            raise CacheStateError(f"a compiled step was interrupted; all layers hold {low} tokens at least: {mend}")
        if low != high and self.turn.others():
            raise CacheStateError(f"layer {most[0]} holds {high} {most[1]}s, layer {least[0]} {low}: {AT_ONCE}")
        if low != high:
            raise CacheStateError(
                f"layer {most[0]} holds {high} {most[1]}s, layer {least[0]} {low}: a step was interrupted in between; "
                f"crop({low - high}) takes back what it stored, reset() empties the cache"
            )
