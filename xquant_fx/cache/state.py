"""The quantized state: who owns which tensor.

``KVState`` is one side (keys or values) of one layer. The upper layer of a sharing pair holds a
reference to the lower one and reads its codes; there is one codes tensor per pair and nothing else
refers to it. ``CacheGroup`` (``group.py``) is what the states of one cache have in common. Where tokens may be stored,
and how far back one can go: ``positions.py``; room for more of them: ``room.py``.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from xquant_fx import ops
from xquant_fx.cache import uncompiled
from xquant_fx.cache.group import CacheGroup, Chunk
from xquant_fx.cache.pages import is_shared
from xquant_fx.cache.positions import check_back, checked_past, goes_back_exactly
from xquant_fx.cache.queries import FEWEST_QUERIES, mean_squares
from xquant_fx.errors import CacheStateError
from xquant_fx.kernels.layout import STEP_TOKENS
from xquant_fx.kernels.quantize_store.arguments import StoreArguments
from xquant_fx.kernels.shared_code_load.arguments import STORED
from xquant_fx.plan.spec import KVSpec

#: All tensors of a state, in the order of the op that writes them.
TENSOR_NAMES = tuple(name for name in StoreArguments.tensor_names() if name not in ("x", "pos"))


class KVState:
    """Stored tensors of one side of one layer; ``lower`` owns the codes where they are borrowed."""

    is_given_back = False
    """Whether the buffer is an ordinary one again, which views of the quantized one that are left do not see."""

    def __init__(self, spec: KVSpec, group: CacheGroup, lower: KVState | None = None) -> None:
        self.spec, self.group, self.lower = spec, group, lower
        self.at_most = 0
        """Of a window that slides: how many tokens are stored at most, as the host knows without waiting."""
        self.behind: tuple[int, Tensor] | None = None
        """Of a buffer that was taken over: the first position behind the tokens of an uncompiled step that wrote before
        older ones, and those, dequantized [B, H, n, D]. It may rotate: no mask is seen here that says who looks."""
        self.lent_by: KVState | None = None
        """Of such a window: whose codes it borrowed before it slid."""
        with torch.inference_mode(False):  # or only inference mode could write to them
            self._owned = {
                name: torch.zeros(shape, dtype=dtype, device=group.start.device)
                for name, (shape, dtype) in spec.tensor_shapes().items()
            }
        group.join(self)

    def __getstate__(self) -> dict[str, Any]:
        self.group.settle()
        return self.__dict__

    def __setstate__(self, fields: dict[str, Any]) -> None:
        self.__dict__.update(fields)
        self.group.join(self)

    @property
    def owned(self) -> dict[str, Tensor]:
        """Stored tensors that no other state brings, by name; a prompt that waits for its queries is stored first.

        Raises:
            CacheStateError: the buffer was given back, and whoever asks holds a view of what it was.
        """
        if self.is_given_back:
            raise CacheStateError(
                f"layer {self.spec.layer} {self.spec.role}s: this is a view of a buffer that is in full precision by "
                "now (a warning said why); take it from the buffer again"
            )
        if self.group.late is not None:
            self.group.settle(self)
        return self._owned

    @property
    def name(self) -> tuple[int, str]:
        """Layer and role."""
        return self.spec.layer, self.spec.role

    def tensor(self, name: str) -> Tensor | None:
        """The tensor called ``name`` (of ``TENSOR_NAMES``), borrowed or shared ones too."""
        if name == "start":
            return self.group.start
        if name == "fault":
            return self.group.faults.tensor
        if name == "codes" and self.lower is not None:
            return self.lower.tensor("codes")
        return self.owned.get(name)

    def tensor_before(self, written: Chunk, name: str) -> Tensor | None:
        """The same as it was before the chunk ``written``, which may have overwritten it."""
        return written.before[name] if name in written.before else self.tensor(name)

    @property
    def tensors(self) -> dict[str, Tensor | None]:
        """All of ``TENSOR_NAMES``, None where there is none."""
        return {name: self.tensor(name) for name in TENSOR_NAMES}

    def store(self, x: Tensor, pos: Tensor) -> None:
        """Append ``x`` [B, H, q, D] at consecutive positions ``pos`` [q], eagerly.

        Raises:
            CacheStateError: the positions do not follow what is stored, or ``x`` does not fit; nothing is changed.
        """
        self.group.enter((self.name,), x.shape[2])
        past, new = checked_past(self, x, pos), x.shape[2]
        self._keep_behind(past + new)
        x, pos = x.to(self.spec.dtype), pos.to(torch.int64)
        chunk = Chunk(None, past, new)
        if new > STEP_TOKENS and self.spec.overwritten:
            before = {name: self.owned[name].clone() for name in self.spec.overwritten} if past else {}
            chunk = Chunk(x, past, new, before)
        self.group.hold(self, chunk)
        if past == 0 and new >= FEWEST_QUERIES and self.wants_queries:
            # A copy, of which the kernel needs one anyway where keys are transposed: who gave them may change them.
            self.group.late = self, x.clone(memory_format=torch.contiguous_format), pos
        else:
            self._write(x, pos)

    def _keep_behind(self, end: int) -> None:
        """Before a write that ends at ``end``: keep what an ordinary buffer would still hold behind it."""
        first, older = self.behind or (0, None)
        held = max(self.length, 0 if older is None else first + older.shape[2])
        if not self.group.taken_over or self.spec.window or (older is None and end >= self.length):
            return
        self.behind = (end, self.load(held, end).clone()) if end < held else None

    def forsake(self) -> None:
        """Another tensor holds what was stored: free it, and raise wherever it is asked for."""
        self.group.read_now()
        self.is_given_back, self._owned, self.behind = True, {}, None
        self.group.collected.clear()

    def store_late(self, x: Tensor, pos: Tensor) -> None:
        """Store a prompt ``x`` that has waited for its queries."""
        with torch.no_grad():
            self._write(x, pos)

    def _write(self, x: Tensor, pos: Tensor) -> None:
        fit = self.spec.fit if self.spec.borrowed else None
        given: dict[str, Any] = {**self.tensors, **self.spec.store_constants()}
        arguments = StoreArguments(x=self.as_stored(x), pos=pos, **given, fit=fit)
        if not uncompiled.append(self.group, arguments):
            arguments.call(ops.STORE, ops.STORE_BORROWED)

    def as_stored(self, x: Tensor) -> Tensor:
        """``x`` rotated, where window and sinks hold rotated tokens."""
        return ops.ROTATE(x, False) if self.spec.folded else x

    @property
    def wants_queries(self) -> bool:
        """Whether queries decide anything here: channels are ranked, and none was seen."""
        energy = self._owned.get("energy")
        return energy is not None and not bool(energy.any())

    @property
    def row_lengths(self) -> list[int]:
        """Tokens stored of each row of the batch (waits for the device)."""
        return [self.length] * self.spec.shape[0]

    def note_queries(self, q: Tensor) -> None:
        """Note a prompt's queries [B, heads, q, D], by which channels are ranked when the first group is quantized.

        A prompt that was appended just before has waited for them, and is stored. Few of them are ignored, and so is a
        query of another shape (latent attention, say).
        """
        batch, heads, _, dim = self.spec.shape
        if q.dim() == 4 and (q.shape[0], q.shape[3]) == (batch, dim) and self.wants_queries:
            self.take_queries(mean_squares(q, heads))

    def take_queries(self, squares: Tensor | None) -> None:
        """The same of what ``mean_squares`` gave, [B, H, D]; None: of nothing."""
        if squares is not None and self.wants_queries:
            self._owned["energy"].copy_(squares)
            self.group.settle(self)

    def load(self, end: int, begin: int = 0) -> Tensor:
        """Dequantize tokens [begin, end) as attention sees them right after the last write."""
        loaded = self._load(end, begin)
        first, older = self.behind or (end, None)
        if older is None or first >= end:
            return loaded
        loaded = loaded.clone()
        shown = older[:, :, max(begin - first, 0) : end - first]
        loaded[:, :, max(first - begin, 0) :][:, :, : shown.shape[2]] = shown
        return loaded

    def _load(self, end: int, begin: int) -> Tensor:
        chunk = self.last_write()
        if chunk.x is not None and chunk.past == 0:  # a prompt: nothing quantized is seen
            return torch.nn.functional.pad(chunk.x[:, :, begin:end], (0, 0, 0, max(end - max(chunk.new, begin), 0)))
        past = torch.tensor([chunk.past], device=self.group.start.device)
        tensors = {name: self.tensor_before(chunk, name) for name in STORED}
        x = None if chunk.x is None else self.as_stored(chunk.x)
        first = torch.tensor([begin], device=past.device) if begin else None
        stored = min(end, max(chunk.past + chunk.new, begin + 1))  # what lies behind are zeros, and no work
        where = dict(past=past, new_tokens=chunk.new, n=stored - begin, x=x, first=first)
        loaded = ops.LOAD(**tensors, **where, **self.spec.load_constants())
        return torch.nn.functional.pad(loaded, (0, 0, 0, end - stored)) if stored < end else loaded

    @property
    def length(self) -> int:
        """Tokens stored (waits for the device)."""
        return self.owned["length"].tolist()[0]

    def reset(self) -> None:
        """Back to an empty cache; padding is the group's, and what is known of the model's queries stays.

        The mean squares of a model's queries hardly differ between texts (docs/quality.md), and prompts after the
        first are not seen.
        """
        self.group.read_now()
        self.group.forget_late(self)
        self.behind = None
        for name, tensor in self.owned.items():
            if name == "energy":
                continue
            if not is_shared(tensor):
                tensor.zero_()
                continue
            with torch.inference_mode(False):  # zeros written to shared pages would make all of them our own
                self.owned[name] = torch.zeros_like(tensor)
            self.group.collected.clear()
        self.group.drop()
        self.group.faults.clear()
        self.group.mended()
        self.group.short_steps = 0

    @property
    def borrowers(self) -> list[KVState]:
        """The states that read these codes."""
        members = [ref() for ref in self.group.members]
        return [member for member in members if isinstance(member, KVState) and member.lower is self]

    def own_codes(self) -> None:
        """Copy the codes that are borrowed: from now on the layer has its own."""
        if self.lower is None:
            return
        codes = self.tensor("codes")
        assert codes is not None
        self._owned = {"codes": codes.clone(), **self.owned}
        self.lower, self.spec = None, dataclasses.replace(self.spec, partner=None)
        self.group.collected.clear()

    def share_codes(self, lower: KVState) -> None:
        """Borrow codes of ``lower`` again; both are empty."""
        del self.owned["codes"]
        self.lower, self.spec = lower, dataclasses.replace(self.spec, partner=lower.spec.layer)
        self.group.collected.clear()

    def reorder(self, index: Tensor) -> None:
        """Select batch rows in place (beam search); the layer below brings its own codes."""
        self.group.read_now()
        for name, tensor in self.owned.items():
            if name != "length":
                tensor.copy_(tensor.index_select(0, index.to(tensor.device)))
        if self.behind is not None:
            first, older = self.behind
            self.behind = first, older.index_select(0, index.to(older.device))
        self.group.drop()

    def check_truncate(self, length: int) -> None:
        """Raise CacheStateError where the tokens from ``length`` on cannot be forgotten (``check_back``)."""
        check_back(self, length)

    def truncate(self, length: int) -> None:
        """Forget the tokens from ``length`` on; raises CacheStateError as ``check_truncate`` does."""
        self.check_truncate(length)
        self.group.read_now()
        self.behind = None
        self.owned["length"][:1].fill_(length)
        self.group.drop()
        self.group.mended()

    def undo(self, length: int) -> None:
        """Take back what a step that broke off stored after ``length`` tokens, if the window still can: if not, the
        next step finds that lengths differ."""
        self.group.read_now()
        self.group.forget_late(self)
        stored, furthest = self.owned["length"].tolist()
        if stored > length and (not length or goes_back_exactly(self, length, furthest)):
            self.owned["length"][:1].fill_(length)
        self.group.drop()

    @property
    def furthest(self) -> int:
        """Tokens stored at most since the sequence began: rolling back does not bring back what they overwrote."""
        return self.owned["length"].tolist()[1]

    def last_write(self) -> Chunk:
        """The last step or chunk that was stored."""
        held = self.group.held(self)
        length = self.length
        if held is not None and held.past + held.new == length:
            return held
        new = min(self.group.step_tokens, length)
        return Chunk(None, length - new, new)
