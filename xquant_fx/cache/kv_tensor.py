"""``QuantizedKV``: a tensor of logical shape [B, H, N, D] whose storage is a :class:`KVState`.

Eager code that appends to it quantizes; eager code that reads it gets dequantized values, for the
time of that read. So a model, a cache or a fall-back that knows nothing of quantization stays
right. Dynamo sees an ordinary tensor and traces the ordinary write and read, which the passes then
rewrite; AOTAutograd never meets one. After a graph break Dynamo would also compile our own eager
code, frame by frame, so dispatch is off limits to it. What each op does: ``buffer_ops.py``.
Checked on torch 2.11, 2.13 and 2.14.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import weakref
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import UnsupportedFakeTensorException

from xquant_fx.cache import step_attention
from xquant_fx.cache.buffer_ops import HANDLERS
from xquant_fx.cache.growth import of_any_length
from xquant_fx.cache.left import leave_read
from xquant_fx.cache.ragged import Row
from xquant_fx.cache.reads import Dequantized, Token, end_trials, read, wrapper
from xquant_fx.cache.state import KVState
from xquant_fx.errors import CacheStateError, UnsupportedWriteError
from xquant_fx.plan.spec import KVSpec

aten = torch.ops.aten

#: What a program can do to a buffer instead of what was refused.
HOW = (
    "Append by buffer[:, :, positions] = x, begin anew by buffer.zero_(), go back by buffer[:, :, n:].zero_(); to come "
    "back to what is stored now, keep a copy.deepcopy() of all buffers"
)


class QuantizedKV(Dequantized):
    """A KV buffer stored as codes.

    ``state`` is None for the stand-ins that Dynamo makes while it traces: they only have a shape.
    ``span`` is the range of tokens that a view ``buffer[:, :, begin:end]`` covers. Of a stand-in whose number of
    ``tokens`` N is a symbol the spec is that of graphs for caches of any length up to its own (``cache/growth.py``).
    """

    state: KVState | None
    anchor: Tensor
    span: tuple[int, int]
    handlers: ClassVar[dict[Any, Any]] = dict(HANDLERS)
    """Op to what it does with such a buffer as its first argument; NotImplemented: it reads numbers."""
    token_dim: int | None = 2
    """Which dimension tokens are along,"""
    row_dim: int | None = 0
    """and which one rows of the batch."""

    @staticmethod
    def __new__(
        cls,
        spec: KVSpec,
        anchor: Tensor,
        state: KVState | None = None,
        span: tuple[int, int] | None = None,
        tokens: Any = None,
    ) -> QuantizedKV:
        begin, end = span or (0, spec.shape[2] if tokens is None else tokens)
        return wrapper(cls, (*spec.shape[:2], end - begin, spec.shape[3]), spec.dtype, anchor.device)

    def __init__(
        self,
        spec: KVSpec,
        anchor: Tensor,
        state: KVState | None = None,
        span: tuple[int, int] | None = None,
        tokens: Any = None,
    ) -> None:
        self._spec, self.anchor, self.state = spec, anchor, state
        self._tokens = spec.shape[2] if tokens is None else tokens
        self.span = span or (0, self._tokens)
        # Once: Dynamo's guards ask for it in each step.
        self._flatten(spec)

    @property
    def spec(self) -> KVSpec:
        """What is fixed about the storage; it changes when codes are no longer shared, or a window begins to slide."""
        return self._spec if self.state is None else self.state.spec

    @property
    def is_whole(self) -> bool:
        """Whether this is the buffer itself, or all of it."""
        return self.span == (0, self._tokens if self.state is None else self.state.spec.shape[2])

    @classmethod
    def of(cls, state: KVState) -> QuantizedKV:
        """The buffer that stands for ``state``, whose address compiled graphs may take for granted."""
        buffer = cls(state.spec, state.group.anchor, state)
        torch._dynamo.mark_static_address(buffer)
        return buffer

    # The one inner tensor that Dynamo gets to see tells it the device; the rest is in the spec.
    def __tensor_flatten__(self) -> tuple[list[str], tuple[Any, ...]]:
        spec = self.spec
        if self._flattened_spec is not spec:
            self._flatten(spec)
        return self.flattened

    def _flatten(self, spec: KVSpec) -> None:
        self._flattened_spec, self.flattened = spec, (["anchor"], self.context(spec))

    def context(self, spec: KVSpec) -> tuple[Any, ...]:
        """What Dynamo guards on besides the shape, ``spec`` first; of a buffer on a CPU not how long it is."""
        is_usual = type(self) is QuantizedKV and self.anchor.device.type == "cpu" and not spec.ragged
        is_known = all(type(size) is int for size in spec.shape)  # a self-check may make one whose sizes are symbols
        wide = of_any_length(spec) if is_usual and is_known and self.span == (0, spec.shape[2]) else spec
        return self.exact_context(spec) if wide == spec else (wide, None)  # which may be an equal one of another cache

    def exact_context(self, spec: KVSpec) -> tuple[Any, ...]:
        """The same of a part of something that is guarded on as a whole: how long it is, too."""
        return spec, self.span

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], context: Any, outer_size: Any, outer_stride: Any) -> QuantizedKV:
        spec, span = context
        return stand_in(spec, span, inner["anchor"], None if outer_size is None else outer_size[2])

    def _stable_hash_for_caching(self) -> str:
        """What torch's on-disk caches key on: what compiled code may rely on, never the contents."""
        return hashlib.sha256(repr((self.spec, self.span, self.device)).encode()).hexdigest()

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        s = self.spec
        codes = f"codes of layer {s.partner}" if s.borrowed else f"{s.bits} bits"
        return f"QuantizedKV({self.origin}, shape={tuple(self.shape)}, {codes}, device={self.device})"

    @torch._dynamo.disable
    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        if end_trials(self):
            return copy.deepcopy(self, memo)
        with torch.inference_mode(False):
            new = self.standing_for(copy.deepcopy(self.live, memo))
        memo[id(self)] = new
        return new.as_taken_over(bool(self.live.group.taken_over))

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _rebuild, (self.live, bool(self.live.group.taken_over))

    def as_taken_over(self, was: bool) -> QuantizedKV:
        """This buffer, which can be given back if what it is a copy of ``was`` an ordinary one once."""
        if was:
            self.live.group.taken_over.append(weakref.ref(self))
        return self

    def _is_view(self) -> bool:
        """False for one row of a batch, which is a buffer of its own: Dynamo would look for a base with strides."""
        return not isinstance(self.state, Row) and bool(super()._is_view())

    def standing_for(self, state: KVState) -> QuantizedKV:
        """A buffer like this one of another ``state``."""
        return QuantizedKV.of(state)

    def part(self, begin: int, end: int) -> QuantizedKV:
        """A view of tokens [begin, end) of the buffer."""
        return QuantizedKV(self.spec, self.anchor, self.state, (begin, end), self._tokens)

    def token(self, at: int) -> Dequantized:
        """The token ``at``, without a dimension of tokens."""
        part = self.part(at, at + 1)  # which stays what it is if the buffer becomes an ordinary one
        return Token(part, lambda x: part.append_at(torch.tensor([at], device=part.device), x))

    @property
    def origin(self) -> str:
        """Layer and side."""
        return f"layer {self.spec.layer} {self.spec.role}s"

    def refuse_write(self, func: Any) -> None:
        """A stand-in that is traced may be written to: the passes look at the graph."""
        if self.state is not None:
            raise UnsupportedWriteError(f"{self!r}: {func} is not a way to append tokens; nothing was written. {HOW}")

    def dense(self) -> Tensor:
        """Dequantized copy [B, H, n, D]; a tensor of the right shape only, while Dynamo traces."""
        refuse_aot(self)
        if self.state is None:
            return self.anchor.new_empty(self.shape, dtype=self.dtype)
        begin, end = self.span
        return self.state.load(end)[:, :, begin:]

    @property
    def live(self) -> KVState:
        """The state.

        Raises:
            CacheStateError: this is a view, or a stand-in that Dynamo made; neither has a state of its own.
        """
        if self.state is None:
            raise CacheStateError(f"{self!r}: a traced stand-in holds no state of its own")
        if not self.is_whole:
            raise CacheStateError(
                f"{self!r} is tokens {self.span[0]} to {self.span[1] - 1} of a quantized buffer, and a graph needs the "
                "whole: pass the buffer to compiled code and take the part in there, or pass part.dequantize()"
            )
        return self.state

    def first_tokens(self) -> tuple[KVState, int] | None:
        """The state, and how many of its tokens this is, where it is a [B, H, N, D] of its first ones."""
        is_usual = (self.token_dim, self.row_dim) == (2, 0) and not isinstance(self.state, Row)
        return (self.state, self.span[1]) if is_usual and self.state is not None and not self.span[0] else None

    def append_at(self, pos: Tensor, x: Tensor) -> None:
        """Store ``x`` [B, H, q, D] at positions ``pos`` [q], eagerly; of a stand-in only the shapes are looked at.

        Where each row has a length of its own, ``pos`` may be [B, q].
        """
        if self.state is None:
            if reason := self.spec.why_not(x) or self._why_not_here(pos, x):
                raise UnsupportedFakeTensorException(reason)  # Dynamo leaves the step to eager code, which raises, too
            return
        if reason := self._why_elsewhere(x):
            raise CacheStateError(reason)
        self.state.store(self.numbers_of(x), pos)

    def _why_not_here(self, pos: Tensor, x: Tensor) -> str:
        new, room = x.shape[2], self.shape[2]
        if new > room:
            return f"{self.origin}: a step of {new} tokens does not fit into a cache of {room}"
        if pos.shape[-1] != new:
            return f"{self.origin}: a step needs one position per token, got {pos.shape[-1]} for {new} tokens"
        return self._why_elsewhere(x)

    def _why_elsewhere(self, x: Tensor) -> str:
        if x.device == self.device:
            return ""
        return f"{self.origin}: this cache is on {self.device}, the step on {x.device}: move it (cache.to(device))"

    def numbers_of(self, x: Tensor) -> Tensor:
        """What is to be stored, as numbers.

        Raises:
            CacheStateError: it has a gradient.
        """
        if torch.is_grad_enabled() and x.requires_grad:
            raise CacheStateError(
                f"{self.origin}: a quantized KV cache has no gradient; "
                "run the model under torch.no_grad() or torch.inference_mode()"
            )
        return x.dense() if isinstance(x, Dequantized) else x

    @classmethod
    @torch._dynamo.disable
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        refuse_aot(*args)
        if end_trials(*args, *(kwargs or {}).values()):
            return func(*args, **(kwargs or {}))
        first = args[0][0] if func is aten.cat.default and args[0] else args[0]
        handler = type(first).handlers.get(func) if isinstance(first, QuantizedKV) else None
        handler = step_attention.HANDLERS.get(func) if handler is None else handler
        if handler is not None:
            result = handler(*args, **(kwargs or {}))
            if result is not NotImplemented:
                return result
        return _noted(func, read(func, args, kwargs or {}), args)


def stand_in(spec: KVSpec, span: tuple[int, int] | None, anchor: Tensor, tokens: Any) -> QuantizedKV:
    """What Dynamo traces in the place of a buffer of ``tokens``, a number, or a symbol: then for any length."""
    if spec.any_room and type(tokens) is int:
        spec = dataclasses.replace(spec.with_room(tokens), any_room=False)
    return QuantizedKV(spec, anchor, None, span, tokens if spec.any_room else None)


def _noted(func: Any, out: Any, args: Any) -> Any:
    """``out``, and if it may stand for a whole buffer among ``args``, that it was quantized once."""
    if type(out) is Tensor and out.dim() in (3, 4):
        for arg in args:
            if isinstance(arg, QuantizedKV) and arg.shape[1:] == out.shape[1:]:
                leave_read(out, func)
    return out


def _rebuild(state: KVState, was_taken_over: bool = False) -> QuantizedKV:
    return QuantizedKV.of(state).as_taken_over(was_taken_over)


def refuse_aot(*args: Any) -> None:
    """Under another compiler than ours reads would be garbage: the stand-in that it traces has no state."""
    for arg in args:
        if not isinstance(arg, Dequantized) or type(anchor := getattr(arg, "anchor", None)) is Tensor:
            continue
        # Imported here: it is needed for traced stand-ins only.
        from torch._subclasses.functional_tensor import FunctionalTensor

        if isinstance(anchor, FunctionalTensor):
            raise CacheStateError(
                f"{arg!r} was given to a compiler that does not know it: compile with "
                'backend="xquant" (or xquant_fx.xquant_backend), not with plain Inductor'
            )
