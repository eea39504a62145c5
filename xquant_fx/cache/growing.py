"""``GrowingKV``: keys or values that grow by concatenation, as in a ``DynamicCache``, stored as codes.

``torch.cat([past, new], dim=2)`` makes a new tensor every step. Here the new one is another window on the same
:class:`KVState`, one step longer: nothing is copied. The state has room for a power of two of tokens and moves to
twice the room when it is full. To everybody else the tensors are what they were under concatenation: each keeps its
length, an older one can be continued as long as what follows it can be taken back exactly, and what cannot be right
any more raises.

Dynamo sees an ordinary tensor of symbolic length and traces the ordinary concatenation, which the passes rewrite.
"""

from __future__ import annotations

import copy
import hashlib
from typing import Any

import torch
from torch import Tensor

from xquant_fx.cache.kv_tensor import QuantizedKV, _refuse_aot
from xquant_fx.cache.reads import Dequantized, read
from xquant_fx.cache.select import select
from xquant_fx.cache.state import KVState
from xquant_fx.errors import CacheStateError, UnsupportedWriteError
from xquant_fx.kernels.layout import STEP_TOKENS
from xquant_fx.plan.spec import KVSpec

aten = torch.ops.aten

#: Tokens there is room for at least.
LEAST_ROOM = 512


def room_for(tokens: int) -> int:
    """Tokens to make room for where ``tokens`` are stored and one more step of a few is to come."""
    room = LEAST_ROOM
    while room < tokens + STEP_TOKENS:
        room *= 2
    return room


class Growth:
    """One side of one layer as it grows: the state, its length as the host knows it, and what was overwritten."""

    def __init__(self, state: KVState, tokens: int = 0) -> None:
        self.state, self.tokens = state, tokens
        self.overwritten: list[int] = []
        """For each time that an older tensor was continued: its length. Tokens from there on were replaced."""

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

    def reserve(self, tokens: int) -> None:
        """Make room for ``tokens`` and a step after them."""
        if tokens > self.state.spec.shape[2]:
            self.state.enlarge(room_for(tokens))

    def grown(self, new: int) -> GrowingKV:
        """The tensor after a compiled step appended ``new`` tokens to the state; there is room for the next step."""
        self.tokens += new
        self.reserve(self.tokens + STEP_TOKENS)
        return GrowingKV.of(self)


class GrowingKV(Dequantized):
    """Keys or values [B, H, T, D] whose storage is the state of a :class:`Growth`.

    ``growth`` is None for the stand-ins that Dynamo makes while it traces: they only have a shape.
    """

    anchor: Tensor
    growth: Growth | None
    since: int

    @staticmethod
    def __new__(cls, spec: KVSpec, anchor: Tensor, tokens: Any, growth: Growth | None = None) -> GrowingKV:
        shape = (*spec.shape[:2], tokens, spec.shape[3])
        return torch.Tensor._make_wrapper_subclass(cls, shape, dtype=spec.dtype, device=anchor.device)

    def __init__(self, spec: KVSpec, anchor: Tensor, tokens: Any, growth: Growth | None = None) -> None:
        self._spec, self.anchor, self.growth = spec, anchor, growth
        self.since = 0 if growth is None else len(growth.overwritten)

    @classmethod
    def of(cls, growth: Growth, tokens: int | None = None) -> GrowingKV:
        """The first ``tokens`` of ``growth``, all by default; its length is a symbol to Dynamo from the start."""
        state = growth.state
        new = cls(state.spec, state.owned["length"], growth.tokens if tokens is None else tokens, growth)
        new._dynamo_weak_dynamic_indices = {2}  # type: ignore[attr-defined]  # what maybe_mark_dynamic(new, 2) sets
        return new

    @property
    def spec(self) -> KVSpec:
        """What is fixed about the storage; it changes when that moves to more room."""
        return self._spec if self.growth is None else self.growth.state.spec

    @property
    def live(self) -> KVState:
        """The state.

        Raises:
            CacheStateError: a stand-in that Dynamo made has none.
        """
        if self.growth is None:
            raise CacheStateError(f"{self!r}: a traced stand-in holds no state of its own")
        return self.growth.state

    @property
    def state(self) -> KVState | None:
        """The state; None for a stand-in."""
        return None if self.growth is None else self.growth.state

    @property
    def origin(self) -> str:
        """Layer and side."""
        return f"layer {self.spec.layer} {self.spec.role}s"

    # Dynamo guards on what comes second; the length is not part of it.
    def __tensor_flatten__(self) -> tuple[list[str], KVSpec]:
        return ["anchor"], self.spec

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], spec: KVSpec, outer_size: Any, outer_stride: Any) -> GrowingKV:
        return GrowingKV(spec, inner["anchor"], outer_size[2])

    def _stable_hash_for_caching(self) -> str:
        return hashlib.sha256(repr((self.spec, self.device, "growing")).encode()).hexdigest()

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"GrowingKV({self.origin}, shape={tuple(self.shape)}, {self.spec.bits} bits, device={self.device})"

    def __deepcopy__(self, memo: dict[int, Any]) -> GrowingKV:
        assert self.growth is not None
        new = GrowingKV.of(copy.deepcopy(self.growth, memo), self.shape[2])
        new.since = self.since
        memo[id(self)] = new
        return new

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _rebuild, (self.growth, self.shape[2], self.since)

    def _is_view(self) -> bool:
        """False, also where autograd takes ``kv[:, :, :n]`` for a view: Dynamo would look for a base with strides."""
        return False

    def refuse_write(self, func: Any) -> None:
        """Codes have no elements to write to."""
        raise UnsupportedWriteError(f"{self!r}: {func} is not a way to append tokens; nothing was written")

    def dense(self) -> Tensor:
        """Dequantized copy [B, H, T, D]; a tensor of the right shape only, while Dynamo traces."""
        _refuse_aot(self)
        if self.growth is None:
            return self.anchor.new_empty(self.shape, dtype=self.dtype)
        self.growth.check(self.shape[2], self.since)
        return self.growth.state.load(self.shape[2])

    def resume(self) -> None:
        """Make the state as long as this tensor; raises CacheStateError as :meth:`Growth.resume`."""
        assert self.growth is not None
        self.growth.resume(self.shape[2], self.since)

    def has_room(self, new: int) -> bool:
        """Whether ``new`` tokens fit into the tensors that there are."""
        return bool(self.shape[2] + new <= self.spec.shape[2])

    def append(self, x: Tensor) -> GrowingKV:
        """The tensor with ``x`` [B, H, q, D] behind it."""
        assert self.growth is not None
        self.resume()
        tokens = self.shape[2]
        self.growth.reserve(tokens + x.shape[2])
        x = x.dense() if isinstance(x, Dequantized) else x
        self.growth.state.store(x, torch.arange(tokens, tokens + x.shape[2], device=x.device))
        # No room is made for what comes next: a layer that borrows these codes makes room at its own append.
        self.growth.tokens += x.shape[2]
        return GrowingKV.of(self.growth)

    @classmethod
    @torch._dynamo.disable
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        handler = _HANDLERS.get(func)
        result = handler(*args, **(kwargs or {})) if handler is not None else NotImplemented
        return read(func, args, kwargs or {}) if result is NotImplemented else result


def _rebuild(growth: Growth, tokens: int, since: int) -> GrowingKV:
    new = GrowingKV.of(growth, tokens)
    new.since = since
    return new


def _cat(tensors: list[Tensor], dim: int = 0) -> Any:
    if len(tensors) != 2 or dim not in (2, -2):
        return NotImplemented
    past, x = tensors
    if not isinstance(past, GrowingKV) or past.growth is None:
        return NotImplemented
    if x.dim() != 4 or any(x.shape[d] != past.shape[d] for d in (0, 1, 3)) or x.dtype != past.dtype:
        return NotImplemented
    return past.append(x) if x.shape[2] else past


def _slice(kv: Tensor, dim: int = 0, start: Any = None, end: Any = None, step: int = 1) -> Any:
    """The first tokens, as ``crop`` takes them, stay codes."""
    if not isinstance(kv, GrowingKV) or kv.growth is None:
        return NotImplemented
    begin, stop, _ = slice(start, end).indices(kv.shape[dim])
    if (begin, step) != (0, 1) or (dim not in (2, -2) and stop != kv.shape[dim]):
        return NotImplemented
    kv.growth.check(kv.shape[2], kv.since)
    return _rebuild(kv.growth, stop if dim in (2, -2) else kv.shape[2], kv.since)


def _select_rows(kv: Tensor, dim: int, index: Tensor) -> Any:
    """Rows of the batch stay codes: beam search, and requests that are done and leave."""
    if not isinstance(kv, GrowingKV) or kv.growth is None or dim != 0 or index.dim() != 1:
        return NotImplemented
    kv.growth.check(kv.shape[2], kv.since)
    return GrowingKV.of(Growth(select(kv.live, index), kv.growth.tokens), kv.shape[2])


def _index_rows(kv: Tensor, indices: list[Tensor | None]) -> Any:
    """``kv[rows, ...]``, rows as numbers or as a mask."""
    if len(indices) != 1 or indices[0] is None or indices[0].dim() != 1:
        return NotImplemented
    rows = indices[0]
    return _select_rows(kv, 0, rows.nonzero().reshape(-1) if rows.dtype == torch.bool else rows)


def _alias(kv: Tensor) -> Any:
    if not isinstance(kv, GrowingKV):
        return NotImplemented
    if kv.growth is None:
        return GrowingKV(kv.spec, kv.anchor, kv.shape[2])
    return _rebuild(kv.growth, kv.shape[2], kv.since)


_HANDLERS: dict[Any, Any] = {
    aten.cat.default: _cat,
    aten.slice.Tensor: _slice,
    aten.index_select.default: _select_rows,
    aten.index.Tensor: _index_rows,
    aten.detach.default: _alias,
    aten.alias.default: _alias,
}
#: What Dynamo may find among a graph's inputs that has stored tensors.
STORED_KV = (QuantizedKV, GrowingKV)
