"""The quantized state: who owns which tensor.

``KVState`` is one side (keys or values) of one layer. The upper layer of a sharing pair holds a
reference to the lower one and reads its codes; there is one codes tensor per pair and nothing else
refers to it. ``CacheGroup`` is what the states of one cache have in common.
"""

from __future__ import annotations

import dataclasses
import weakref
from typing import Any

import torch
from torch import Tensor

from xquant_fx import ops
from xquant_fx.cache.faults import FaultMonitor
from xquant_fx.errors import CacheStateError
from xquant_fx.kernels.faults import FAULTS, Fault, may_wrap
from xquant_fx.kernels.layout import STEP_TOKENS
from xquant_fx.kernels.quantize_store.arguments import StoreArguments
from xquant_fx.kernels.shared_code_load.arguments import STORED
from xquant_fx.plan.plan import Plan
from xquant_fx.plan.spec import KVSpec

#: All tensors of a state, in the order of the op that writes them.
TENSOR_NAMES = tuple(name for name in StoreArguments.tensor_names() if name not in ("x", "pos"))


#: Tokens whose queries say enough of a sequence's.
FEWEST_QUERIES = 16


class CacheGroup:
    """Shared by all states of one cache: plan, padding, faults, and the chunk just written.

    ``chunk`` keeps the full-precision keys and values of the layer written last, if the chunk was
    longer than the residual windows can give back: an eager prefill attends to its own tokens
    unquantized. It holds one layer at a time, but for the step that takes buffers over, whose layers may be appended
    to before any of them is read.
    """

    def __init__(self, plan: Plan, batch: int, device: torch.device, start: Tensor | None = None) -> None:
        self.plan = plan
        self.start = torch.zeros(batch, dtype=torch.int64, device=device)
        if start is not None:
            self.start.copy_(start)
        self.faults = FaultMonitor(device)
        self.chunk_layer: int | None = None
        self.chunks: dict[tuple[int, str], Chunk] = {}
        self.holds_all = False
        self.step_tokens = 0
        self.selection: object = None
        """What ``select.py`` makes of it, buffer by buffer."""
        self.taken_over: list[weakref.ref[Tensor]] = []
        """The buffers that were ordinary ones once, of a cache that was taken over."""
        self.collected: dict[object, tuple[list[KVState], list[Tensor]]] = {}
        """Tensors that a compiled step takes of this cache, by step."""

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "collected": {}, "taken_over": [], "selection": None}

    def stepped(self, tokens: int) -> None:
        """A compiled graph appended ``tokens``; eager code that reads next sees the state before its flush."""
        self.drop()
        self.step_tokens = tokens

    def hold(self, state: KVState, chunk: Chunk) -> None:
        """Keep ``chunk`` until another layer, or the same side of this one, is written."""
        if self.chunk_layer != state.spec.layer and not self.holds_all:
            self.drop()
        self.chunk_layer = state.spec.layer
        self.chunks[state.spec.layer, state.spec.role] = chunk

    def held(self, state: KVState) -> Chunk | None:
        """The chunk that ``state`` wrote last, if it is kept."""
        return self.chunks.get((state.spec.layer, state.spec.role))

    def hold_one_layer(self) -> None:
        """From now on, as before a takeover: let go of all chunks but those of the layer written last."""
        self.holds_all = False
        self.chunks = {key: chunk for key, chunk in self.chunks.items() if key[0] == self.chunk_layer}

    def forget(self, state: KVState) -> None:
        """Let go of the chunk of ``state``, and of no other's."""
        self.chunks.pop((state.spec.layer, state.spec.role), None)

    def drop(self) -> None:
        """Let go of the chunk."""
        self.chunk_layer = None
        self.chunks = {}
        self.step_tokens = 0


class Chunk:
    """The last eager write: ``x`` [B, H, q, D] after ``past`` tokens, and the ring before it."""

    def __init__(self, x: Tensor | None, past: int, new: int, ring: Tensor | None) -> None:
        self.x, self.past, self.new, self.ring = x, past, new, ring


class KVState:
    """Stored tensors of one side of one layer; ``lower`` owns the codes where they are borrowed."""

    def __init__(self, spec: KVSpec, group: CacheGroup, lower: KVState | None = None) -> None:
        self.spec, self.group, self.lower = spec, group, lower
        self.owned = {
            name: torch.zeros(shape, dtype=dtype, device=group.start.device)
            for name, (shape, dtype) in spec.tensor_shapes().items()
        }

    def tensor(self, name: str) -> Tensor | None:
        """The tensor called ``name`` (of ``TENSOR_NAMES``), borrowed or shared ones too."""
        if name == "start":
            return self.group.start
        if name == "fault":
            return self.group.faults.tensor
        if name == "codes" and self.lower is not None:
            return self.lower.tensor("codes")
        return self.owned.get(name)

    @property
    def tensors(self) -> dict[str, Tensor | None]:
        """All of ``TENSOR_NAMES``, None where there is none."""
        return {name: self.tensor(name) for name in TENSOR_NAMES}

    def store(self, x: Tensor, pos: Tensor) -> None:
        """Append ``x`` [B, H, q, D] at consecutive positions ``pos`` [q], eagerly.

        Raises:
            CacheStateError: the positions do not follow what is stored; nothing is changed.
        """
        past, new = self._checked_past(x, pos), x.shape[2]
        x, pos = x.to(self.spec.dtype), pos.to(torch.int64)
        ring = self.owned.get("ring")
        chunk = Chunk(None, past, new, None)
        if new > STEP_TOKENS and ring is not None:
            chunk = Chunk(x, past, new, ring.clone() if past else ring)
        self.group.hold(self, chunk)
        self._write(x, pos)

    def _write(self, x: Tensor, pos: Tensor) -> None:
        fit = self.spec.fit if self.spec.borrowed else None
        given: dict[str, Any] = {**self.tensors, **self.spec.store_constants()}
        arguments = StoreArguments(x=x, pos=pos, **given, fit=fit)
        arguments.call(ops.STORE, ops.STORE_BORROWED)

    @property
    def wants_queries(self) -> bool:
        """Whether queries decide anything here: channels are ranked, and none was seen."""
        energy = self.owned.get("energy")
        return energy is not None and not bool(energy.any())

    def note_queries(self, q: Tensor) -> None:
        """Note a prompt's queries [B, heads, q, D], by which channels are ranked when the first group is quantized.

        A prompt that was stored just before is stored again. Few queries say little: less than FEWEST_QUERIES tokens
        are ignored, and so is a query of another shape (latent attention, say).
        """
        batch, heads, _, dim = self.spec.shape
        fits = q.dim() == 4 and (q.shape[0], q.shape[3]) == (batch, dim) and q.shape[1] % heads == 0
        if not fits or q.shape[2] < FEWEST_QUERIES or not self.wants_queries:
            return
        square = q.detach().to(torch.float32).square().mean(2)
        self.owned["energy"].copy_(square.unflatten(1, (heads, q.shape[1] // heads)).mean(2))
        held = self.group.held(self)
        if held is not None and held.x is not None and held.past == 0:
            self._write(held.x, torch.arange(held.new, device=held.x.device))

    def load(self, n: int) -> Tensor:
        """Dequantize the first ``n`` tokens as attention sees them right after the last write."""
        chunk = self._chunk()
        if chunk.x is not None and chunk.past == 0:  # a prompt: nothing quantized is seen
            return torch.nn.functional.pad(chunk.x[:, :, :n], (0, 0, 0, max(n - chunk.new, 0)))
        past = torch.tensor([chunk.past], device=self.group.start.device)
        tensors = {name: self.tensor(name) for name in STORED}
        if chunk.ring is not None:
            tensors["ring"] = chunk.ring
        return ops.LOAD(**tensors, past=past, new_tokens=chunk.new, n=n, **self.spec.load_constants(), x=chunk.x)

    @property
    def length(self) -> int:
        """Tokens stored (waits for the device)."""
        return self.owned["length"].tolist()[0]

    def reset(self) -> None:
        """Back to an empty cache; padding stays as it was given, and so does what is known of the model's queries.

        The mean squares of a model's queries hardly differ between texts (docs/quality.md), and prompts after the
        first are not seen.
        """
        for name, tensor in self.owned.items():
            if name != "energy":
                tensor.zero_()
        self.group.drop()
        self.group.faults.clear()

    def enlarge(self, max_len: int) -> None:
        """Move to tensors with room for ``max_len`` tokens; what is stored stays as it is."""
        batch, heads, _, dim = self.spec.shape
        self.spec = dataclasses.replace(self.spec, shape=(batch, heads, max_len, dim))
        for name, (shape, dtype) in self.spec.tensor_shapes().items():
            old = self.owned[name]
            if tuple(old.shape) != shape:
                self.owned[name] = old.new_zeros(shape, dtype=dtype)
                self.owned[name][tuple(slice(0, size) for size in old.shape)] = old
        self.group.collected.clear()

    def reorder(self, index: Tensor) -> None:
        """Select batch rows in place (beam search); the layer below brings its own codes."""
        for name, tensor in self.owned.items():
            if name != "length":
                tensor.copy_(tensor.index_select(0, index.to(tensor.device)))
        self.group.drop()

    def check_truncate(self, length: int) -> None:
        """Whether the tokens from ``length`` on can be forgotten: at most STEP_TOKENS, or all.

        Raises:
            CacheStateError: more tokens than that, whose neighbours are already quantized.
        """
        furthest = self.furthest
        if self.spec.quantized and length and furthest - length > STEP_TOKENS:
            raise CacheStateError(
                f"layer {self.spec.layer}: at most {STEP_TOKENS} tokens can be rolled back exactly "
                f"(the ones before them are quantized), asked for {furthest - length} of {furthest}"
            )

    def truncate(self, length: int) -> None:
        """Forget the tokens from ``length`` on; raises CacheStateError as ``check_truncate`` does."""
        self.check_truncate(length)
        self.owned["length"][:1].fill_(length)
        self.group.drop()

    @property
    def furthest(self) -> int:
        """Tokens stored at most since the sequence began: rolling back does not bring back what they overwrote."""
        return self.owned["length"].tolist()[1]

    def _checked_past(self, x: Tensor, pos: Tensor) -> int:
        if pos.shape[0] == 0 or pos.shape[0] != x.shape[2]:
            raise CacheStateError(
                f"layer {self.spec.layer} {self.spec.role}s: a step needs one position per token and at least one, "
                f"got {pos.shape[0]} for {x.shape[2]} tokens"
            )
        past, new, length = int(pos[0].item()), pos.shape[0], self.length
        where = f"layer {self.spec.layer} {self.spec.role}s: "
        seen = f" (position {past} to {past + new - 1}, {length} tokens stored, max_cache_len {self.spec.shape[2]})"
        self.group.faults.check(wait=True)
        if past + new > self.spec.shape[2]:
            raise CacheStateError(where + FAULTS[Fault.FULL] + seen)
        if past > length or past < 0:
            raise CacheStateError(where + FAULTS[Fault.NOT_APPENDED] + seen)
        if self.spec.quantized and past and self.furthest - past > STEP_TOKENS:
            raise CacheStateError(where + FAULTS[Fault.ROLLED_BACK_TOO_FAR] + seen)
        if past == 0 and may_wrap(length, new, self.spec.shape[2]):
            raise CacheStateError(where + FAULTS[Fault.RESTARTED] + seen)
        if not torch.equal(pos, torch.arange(past, past + new, device=pos.device)):
            raise CacheStateError(where + FAULTS[Fault.NOT_CONSECUTIVE] + seen)
        if self.lower is not None and self.lower.length < past + new:
            raise CacheStateError(where + f"layer {self.spec.partner} lends its codes and must be written first" + seen)
        return past

    def _chunk(self) -> Chunk:
        held = self.group.held(self)
        length = self.length
        if held is not None and held.past + held.new == length:
            return held
        new = min(self.group.step_tokens, length)
        return Chunk(None, length - new, new, None)
