"""``GrowingKV``: keys or values that grow by concatenation, as in a ``DynamicCache``, stored as codes.

``torch.cat([past, new], dim=2)`` makes a new tensor every step. Here the new one is another window on the same
:class:`KVState`, one step longer: nothing is copied. The state has room for more tokens and moves to larger tensors
when it is full (``growth.py``). To everybody else the tensors are what they were under concatenation: each keeps its
length, an older one can be continued as long as what follows it can be taken back exactly, and what cannot be right
any more raises.

Of a sliding window ``torch.cat([past, new], dim=2)[:, :, -n:]`` is kept: then the tensor is the last n tokens of the
state, whose storage starts over.

Dynamo sees an ordinary tensor of symbolic length and traces the ordinary concatenation, which the passes rewrite.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import weakref
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, UnsupportedFakeTensorException

from xquant_fx.cache import step_attention
from xquant_fx.cache.growth import Growth
from xquant_fx.cache.held_tokens import heads_apart
from xquant_fx.cache.kv_tensor import QuantizedKV, refuse_aot
from xquant_fx.cache.reads import Dequantized, end_trials, read
from xquant_fx.cache.select import select
from xquant_fx.cache.state import KVState
from xquant_fx.errors import CacheStateError, UnsupportedWriteError
from xquant_fx.kernels.layout import STEP_TOKENS
from xquant_fx.plan.spec import KVSpec

aten = torch.ops.aten
EVICTS = (
    "tokens of one quantized cache are put behind others of it, which evicts those between: groups of tokens share "
    "scales, and quantizing what is left again would add to the error at every step. Store such a cache at 16 bits "
    "(options={'preset': 'full'})"
)


class GrowingKV(Dequantized):
    """Keys or values [B, H, T, D] whose storage is the state of a :class:`Growth`: its T tokens from ``begin`` on.

    ``growth`` is None for the stand-ins that Dynamo makes while it traces: they only have a shape.
    """

    anchor: Tensor
    growth: Growth | None
    since: int
    begin: int
    is_tail: bool
    """Whether there may be tokens before ``begin``, so that the length does not say how many are stored."""
    handlers: ClassVar[dict[Any, Any]]
    """Op to what it does with such a tensor as its first argument; NotImplemented: it reads numbers."""

    @staticmethod
    def __new__(
        cls, spec: KVSpec, anchor: Tensor, tokens: Any, growth: Growth | None = None, begin: int = 0, tail: bool = False
    ) -> GrowingKV:
        shape = (*spec.shape[:2], tokens, spec.shape[3])
        # A view of what inference mode did not make must not be one of its tensors; to ask is less than to leave it.
        leave = torch.inference_mode(False) if torch.is_inference_mode_enabled() else contextlib.nullcontext()
        with leave:
            tensor = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=spec.dtype, device=anchor.device)
        torch._C._set_throw_on_mutable_data_ptr(tensor)  # C++ code that asks for memory gets an error, not address 0
        return tensor

    def __init__(
        self,
        spec: KVSpec,
        anchor: Tensor,
        tokens: Any,
        growth: Growth | None = None,
        begin: int = 0,
        tail: bool = False,
    ) -> None:
        self._spec, self.anchor, self.growth, self.begin = spec, anchor, growth, begin
        self.is_tail = tail or bool(begin or spec.window)
        self.since = 0 if growth is None else len(growth.overwritten)

    @classmethod
    def of(cls, growth: Growth, end: int | None = None, begin: int = 0) -> GrowingKV:
        """Tokens [begin, end) of ``growth``, all by default; its length is a symbol to Dynamo from the start."""
        state = growth.state
        end = growth.tokens if end is None else end
        new = cls(growth.spec, state.group.anchor, end - begin, growth, begin)
        new._dynamo_weak_dynamic_indices = {2}  # type: ignore[attr-defined]  # what maybe_mark_dynamic(new, 2) sets
        return new

    @property
    def spec(self) -> KVSpec:
        """What graphs may rely on about the storage (``Growth.spec``)."""
        return self._spec if self.growth is None else self.growth.spec

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

    @property
    def end(self) -> int:
        """How many tokens there are, those before this tensor included."""
        return self.begin + self.shape[2]

    # Dynamo guards on what comes second; the length is not part of it.
    def __tensor_flatten__(self) -> tuple[list[str], tuple[Any, ...]]:
        return ["anchor"], (self.spec, self.is_tail)

    @staticmethod
    def __tensor_unflatten__(
        inner: dict[str, Tensor], fixed: tuple[Any, ...], outer_size: Any, outer_stride: Any
    ) -> GrowingKV:
        return GrowingKV(fixed[0], inner["anchor"], outer_size[2], tail=fixed[1])

    def _stable_hash_for_caching(self) -> str:
        return hashlib.sha256(repr((self.spec, self.is_tail, self.device, "growing")).encode()).hexdigest()

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"GrowingKV({self.origin}, shape={tuple(self.shape)}, {self.spec.bits} bits, device={self.device})"

    @torch._dynamo.disable
    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        if end_trials(self):
            return copy.deepcopy(self, memo)
        assert self.growth is not None
        new = memo[id(self)] = _rebuild(copy.deepcopy(self.growth, memo), self.end, self.since, self.begin)
        return new

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _rebuild, (self.growth, self.end, self.since, self.begin)

    def _is_view(self) -> bool:
        """False, also where autograd takes ``kv[:, :, :n]`` for a view: Dynamo would look for a base with strides."""
        return False

    def refuse_write(self, func: Any) -> None:
        """Codes have no elements to write to."""
        raise UnsupportedWriteError(f"{self!r}: {func} is not a way to append tokens; nothing was written")

    def dense(self) -> Tensor:
        """Dequantized copy [B, H, T, D]; a tensor of the right shape only, while Dynamo traces."""
        refuse_aot(self)
        if self.growth is None:
            return self.anchor.new_empty(self.shape, dtype=self.dtype)
        self.growth.check(self.end, self.since)
        self.growth.check_begin(self.begin)
        return self.growth.state.load(self.end, self.begin)

    def first_tokens(self) -> tuple[KVState, int] | None:
        """The state, and how many of its tokens this is, where it is a [B, H, T, D] of all of them."""
        growth = self.growth
        if growth is None or type(self) is not GrowingKV or self.is_tail or self.end != growth.tokens:
            return None
        return (growth.state, self.end) if self.since == len(growth.overwritten) else None

    def resume(self) -> None:
        """Make the state as long as this tensor; raises CacheStateError as :meth:`Growth.resume`."""
        assert self.growth is not None
        self.growth.resume(self.end, self.since)
        self.growth.check_begin(self.begin)

    def has_room(self, new: int) -> bool:
        """Whether ``new`` tokens fit into the tensors that there are."""
        return bool(self.end + new <= self.live.spec.shape[2])

    def append(self, x: Tensor) -> GrowingKV:
        """The tensor with ``x`` [B, H, q, D] behind it."""
        assert self.growth is not None
        self.resume()
        tokens = self.end
        self.growth.reserve(tokens + x.shape[2])
        x = x.dense() if isinstance(x, Dequantized) else x
        self.growth.state.store(x, torch.arange(tokens, tokens + x.shape[2], device=x.device))
        # No room is made for what comes next: a layer that borrows these codes makes room at its own append.
        self.growth.added(x.shape[2])
        made = GrowingKV.of(self.growth, begin=self.begin)
        held = self.growth.state.group.held(self.growth.state)
        if held is not None and self.spec.wraps:
            held.reader = weakref.ref(made)
        return made

    def may_have_stored(self, new: int) -> None:
        """Up to ``new`` tokens are in the state, of a step that failed: ``resume`` takes back what is behind."""
        assert self.growth is not None
        self.growth.added(new)

    def appended(self, new: int, keep: int) -> GrowingKV:
        """The last ``keep`` tokens (0: all) after a compiled step stored ``new``; there is room for the next one."""
        assert self.growth is not None
        self.growth.added(new)
        self.growth.reserve(self.growth.tokens + STEP_TOKENS)
        end = self.growth.tokens
        return GrowingKV.of(self.growth, end, max(self.begin, end - keep) if keep else self.begin)

    @classmethod
    @torch._dynamo.disable
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        refuse_aot(*args)
        if end_trials(*args, *(kwargs or {}).values()):
            return func(*args, **(kwargs or {}))
        first = args[0][0] if func is aten.cat.default and args[0] else args[0]
        handler = type(first).handlers.get(func) if isinstance(first, GrowingKV) else None
        handler = step_attention.HANDLERS.get(func) if handler is None else handler
        result = handler(*args, **(kwargs or {})) if handler is not None else NotImplemented
        return read(func, args, kwargs or {}) if result is NotImplemented else result


def _rebuild(growth: Growth, end: int, since: int, begin: int = 0) -> GrowingKV:
    new = GrowingKV.of(growth, end, begin)
    new.since = since
    return new


def _cat(tensors: list[Tensor], dim: int = 0) -> Any:
    if len(tensors) != 2 or dim not in (2, -2):
        return NotImplemented
    past, x = tensors
    if not isinstance(past, GrowingKV) or x.shape == (0,):  # which torch leaves out
        return NotImplemented
    if reason := past.spec.why_not(x):
        # While Dynamo traces: it leaves the step to eager code, which raises the same.
        raise UnsupportedFakeTensorException(reason) if past.growth is None else CacheStateError(reason)
    if past.growth is None or x.dtype != past.dtype:
        return NotImplemented
    if isinstance(x, GrowingKV) and x.growth is past.growth:
        if past.spec.quantized:
            raise CacheStateError(f"{past.origin}: {EVICTS}")
        return NotImplemented  # 16 bits lose nothing
    return past.append(x) if x.shape[2] else past


def _longer(tensors: list[Tensor], dim: int = 0) -> Any:
    """``_cat``, and while Dynamo traces what torch would find by many questions of symbols."""
    made = _cat(tensors, dim)
    past, *others = tensors
    if made is NotImplemented and len(others) == 1 and dim in (2, -2) and isinstance(past, GrowingKV):
        (x,) = others
        if past.growth is None and type(x) is FakeTensor and x.dtype == past.dtype and x.dim() == past.dim():
            return x.new_empty((*past.shape[:2], past.shape[2] + x.shape[2], past.shape[3]))
    return made


def _slice(kv: Tensor, dim: int = 0, start: Any = None, end: Any = None, step: int = 1) -> Any:
    """Tokens that follow one another, as ``crop`` and sliding windows take them, stay codes."""
    if not isinstance(kv, GrowingKV) or kv.growth is None:
        return NotImplemented
    begin, stop, _ = slice(start, end).indices(kv.shape[dim])
    of_tokens = dim in (2, -2)
    if step != 1 or not (of_tokens or (begin, stop) == (0, kv.shape[dim])):
        return NotImplemented
    kv.growth.check(kv.end, kv.since)
    if not of_tokens:
        return _alias(kv)
    return _rebuild(kv.growth, kv.begin + max(begin, stop), kv.since, kv.begin + begin)


def _select_rows(kv: Tensor, dim: int, index: Tensor) -> Any:
    """Rows of the batch stay codes: beam search, and requests that are done and leave."""
    if not isinstance(kv, GrowingKV) or kv.growth is None or dim != 0 or index.dim() != 1:
        return NotImplemented
    kv.growth.check(kv.end, kv.since)
    growth = Growth(select(kv.live, index), kv.growth.tokens, kv.growth.any_room)
    growth.furthest = kv.growth.furthest
    return GrowingKV.of(growth, kv.end, kv.begin)


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
        return GrowingKV(kv.spec, kv.anchor, kv.shape[2], tail=kv.is_tail)
    return _rebuild(kv.growth, kv.end, kv.since, kv.begin)


GrowingKV.handlers = {
    aten.cat.default: _longer,
    aten.slice.Tensor: _slice,
    aten.index_select.default: _select_rows,
    aten.index.Tensor: _index_rows,
    aten.detach.default: _alias,
    aten.alias.default: _alias,
    aten.unsqueeze.default: heads_apart,
}
#: What Dynamo may find among a graph's inputs that has stored tensors.
STORED_KV = (QuantizedKV, GrowingKV)
