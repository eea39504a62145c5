"""A batch whose rows have lengths of their own: ``RaggedState`` is a row of states of a batch of one.

The stored tensors are those of a batch, [B, ...], with a length for each row, [B, 2], and compiled steps take them as
such. A row is a :class:`KVState` of views of these, in a group of its own: eager code does all row by row.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from xquant_fx.cache.group import CacheGroup
from xquant_fx.cache.state import KVState
from xquant_fx.errors import CacheStateError
from xquant_fx.plan.spec import KVSpec


class Row(KVState):
    """A row of a batch whose rows have lengths of their own; it may begin a sequence anew while others go on."""

    def store(self, x: Tensor, pos: Tensor) -> None:
        """Append ``x`` [1, H, q, D] at ``pos`` [q]; raises CacheStateError as any state, position 0 empties the row."""
        before = self.owned["length"].clone()
        if pos.numel() and not bool(pos[0]) and self.length < self.spec.shape[2]:
            self.owned["length"].zero_()
        try:
            super().store(x, pos)
        except CacheStateError:  # raised before anything is stored
            self.owned["length"].copy_(before)
            raise
        self.group.settle()  # who takes the tensors of the batch does not ask each row what waits for queries


class RaggedState(KVState):
    """Stored tensors of one side of one layer, of whose rows each has a length of its own."""

    def __init__(self, spec: KVSpec, group: CacheGroup, lower: KVState | None = None) -> None:
        super().__init__(spec, group, lower)
        self._cut()

    def _cut(self) -> None:
        spec = dataclasses.replace(self.spec, shape=(1, *self.spec.shape[1:]), ragged=False)
        below = self.lower.rows if isinstance(self.lower, RaggedState) else None
        self.rows: list[KVState] = []
        for row, group in enumerate(self.group.row_groups()):
            state = Row(spec, group, None if below is None else below[row])
            for name, tensor in self.owned.items():
                state.owned[name] = tensor[row] if name == "length" else tensor[row : row + 1]
            self.rows.append(state)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in super().__getstate__().items() if name != "rows"}

    def __setstate__(self, fields: dict[str, Any]) -> None:
        super().__setstate__(fields)
        self._cut()

    def store(self, x: Tensor, pos: Tensor) -> None:
        """Append ``x`` [B, H, q, D] at positions ``pos`` [B, q], or [q] for all rows.

        Raises:
            CacheStateError: as a batch of one does, with the row; rows before it are stored.
        """
        if reason := self.spec.why_not(x):
            raise CacheStateError(reason)
        self.store_rows(range(len(self.rows)), x, pos.expand(len(self.rows), pos.shape[-1]))

    def store_rows(self, rows: Sequence[int], x: Tensor, pos: Tensor) -> None:
        """Append ``x`` [n, H, q, D] to n ``rows`` at ``pos`` [n, q]; a row at position 0 begins anew.

        Raises:
            CacheStateError: the positions do not follow what a row holds; rows before it are stored.
        """
        self.group.enter((self.name,))
        for number, row in enumerate(rows):
            try:
                self.rows[row].store(x[number : number + 1], pos[number])
            except CacheStateError as error:
                raise CacheStateError(f"row {row}: {error}") from error

    def fill(self, buffer: Tensor, lengths: Sequence[int]) -> None:
        """Store the first tokens of each row of ``buffer`` [B, H, N, D], so many of each; all rows are empty."""
        for row, (state, length) in enumerate(zip(self.rows, lengths, strict=True)):
            if length:
                state.store(buffer[row : row + 1, :, :length], torch.arange(length, device=buffer.device))

    def load(self, end: int, begin: int = 0) -> Tensor:
        """Dequantize tokens [begin, end) of each row; zeros where a row holds fewer."""
        return torch.cat([row.load(end, begin) for row in self.rows])

    @property
    def length(self) -> int:
        """Tokens of the longest row (waits for the device)."""
        return max(self.row_lengths)

    @property
    def furthest(self) -> int:
        """The most that any row ever held since its sequence began."""
        return int(self.owned["length"][:, 1].max())

    @property
    def row_lengths(self) -> list[int]:
        """Tokens of each row (waits for the device)."""
        found: list[int] = self.owned["length"][:, 0].tolist()
        return found

    def note_queries(self, q: Tensor) -> None:
        """Note a prompt's queries [B, heads, q, D] in each row."""
        if q.dim() == 4 and q.shape[0] == len(self.rows):
            for row, state in enumerate(self.rows):
                state.note_queries(q[row : row + 1])

    def check_truncate(self, length: int) -> None:
        """Rows are not cut at one length: only all of them can be emptied."""
        if length:
            raise CacheStateError(
                f"layer {self.spec.layer}: each row has a length of its own ({self.row_lengths}); write a row's tokens "
                "anew at the position that it goes back to"
            )

    def truncate(self, length: int) -> None:
        """Forget all tokens; raises CacheStateError where some are to stay."""
        self.check_truncate(length)
        self.reset()

    def reorder(self, index: Tensor) -> None:
        """Select batch rows in place, with their lengths."""
        super().reorder(index)
        length = self.owned["length"]
        length.copy_(length.index_select(0, index.to(length.device)))


def make_state(spec: KVSpec, group: CacheGroup, lower: KVState | None = None) -> KVState:
    """An empty state of the kind that ``spec`` says."""
    return (RaggedState if spec.ragged else KVState)(spec, group, lower)
