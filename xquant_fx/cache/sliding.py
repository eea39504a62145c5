"""``SlidingKV``: the buffer of a sliding window, once it is full: its last N tokens, of which older ones are forgotten.

A static layer of Hugging Face keeps a window in a buffer [B, H, N, D]. While it fills, that is a cache like any other,
and so is its :class:`QuantizedKV`. Then each new token moves all others: ``roll``, an assignment, ``copy_``; or the
last N of ``cat([buffer[:, :, 1:], x], 2)`` are copied over it. Codes do not move. The buffer becomes a ``SlidingKV``,
the last N tokens of a state that goes on, whose storage starts over. ``zero_()`` makes it an empty ``QuantizedKV``
again.

What is made of a buffer in eager code on the way to its ``copy_`` is a :class:`Moved`, which knows the new tokens.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import torch
from torch import Tensor

from xquant_fx.cache.buffer_ops import is_zero
from xquant_fx.cache.growth import room_for, room_of_graphs
from xquant_fx.cache.kv_tensor import QuantizedKV
from xquant_fx.cache.reads import Dequantized, ReadOnlyCopy
from xquant_fx.cache.room import enlarge, respec
from xquant_fx.cache.state import KVState
from xquant_fx.kernels.layout import STEP_TOKENS
from xquant_fx.plan.spec import KVSpec

aten = torch.ops.aten
#: How many windows of tokens there is room for, where no other layer says how long a sequence gets.
WINDOWS = 4


class SlidingKV(QuantizedKV):
    """The last ``width`` tokens of a state, as a buffer [B, H, width, D]; ``span`` is that of a view among them."""

    width: int

    @staticmethod
    def __new__(
        cls,
        spec: KVSpec,
        anchor: Tensor,
        state: KVState | None = None,
        span: tuple[int, int] | None = None,
        width: int = 0,
    ) -> SlidingKV:
        return super().__new__(cls, spec, anchor, state, span or (0, width))  # type: ignore[return-value]

    def __init__(
        self,
        spec: KVSpec,
        anchor: Tensor,
        state: KVState | None = None,
        span: tuple[int, int] | None = None,
        width: int = 0,
    ) -> None:
        super().__init__(spec, anchor, state, span or (0, width))
        self.width = width

    @classmethod
    def last(cls, state: KVState, width: int) -> SlidingKV:
        """The last ``width`` tokens of ``state``, whose address compiled graphs may take for granted."""
        buffer = cls(state.spec, state.group.anchor, state, None, width)
        torch._dynamo.mark_static_address(buffer)
        return buffer

    @property
    def is_whole(self) -> bool:
        """Whether this is the buffer itself, or all of it."""
        return self.span == (0, self.width)

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], context: Any, outer_size: Any, outer_stride: Any) -> SlidingKV:
        spec, span = context
        return SlidingKV(spec, inner["anchor"], None, span, span[1])

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"Sliding{super().__repr__()[len('Quantized') :]}"

    def __reduce_ex__(self, protocol: Any) -> Any:
        return SlidingKV.last, (self.live, self.width)

    def standing_for(self, state: KVState) -> SlidingKV:
        """A buffer like this one of another ``state``."""
        assert self.state is not None
        state.at_most = self.state.at_most
        return SlidingKV.last(state, self.width)

    def part(self, begin: int, end: int) -> SlidingKV:
        """A view of the buffer."""
        return SlidingKV(self.spec, self.anchor, self.state, (begin, end), self.width)

    def dense(self) -> Tensor:
        """Dequantized copy [B, H, n, D]; a tensor of the right shape only, while Dynamo traces."""
        if self.state is None:
            return super().dense()
        begin, end = self.span
        before = self.state.length - self.width
        return self.state.load(before + end, before + begin)

    def first_tokens(self) -> None:
        """None: these are a state's last tokens."""

    def append_at(self, pos: Tensor, x: Tensor) -> None:
        """A sequence that begins anew makes it a cache that fills again; what is no new sequence raises."""
        if self.state is None:
            return super().append_at(pos, x)
        if not pos.numel() or int(pos[0]):
            self.refuse_write("an append at a position")
        empty(self)
        self.append_at(pos, x)

    def slide(self, x: Tensor) -> None:
        """Store ``x`` [B, H, q, D] behind all tokens, eagerly."""
        state, new = self.live, x.shape[2]
        past = state.length
        state.at_most = past
        self.reserve(new)
        state.store(x.dense() if isinstance(x, Dequantized) else x, torch.arange(past, past + new, device=x.device))
        self.slid(new)

    def has_room(self, new: int) -> bool:
        """Whether ``new`` tokens fit before more room is made, as far as the host knows."""
        state = self.live
        return state.at_most + new <= state.spec.shape[2]

    def reserve(self, new: int) -> None:
        """Make room for ``new`` tokens. What is stored is a window's: its tensors stay as they are."""
        if not self.has_room(new):
            enlarge(self.live, room_of_graphs(room_for(self.live.at_most + new)))

    def slid(self, new: int) -> None:
        """Count ``new`` tokens that the state has got, and make room for a step."""
        self.live.at_most += new
        self.reserve(STEP_TOKENS)


class Move(NamedTuple):
    """What a :class:`Moved` is made of."""

    state: KVState
    length: int
    """Tokens that the state had."""
    x: Tensor | None
    """New tokens behind them; None: not known yet."""


class Moved(ReadOnlyCopy):
    """Old tokens of a buffer and new ones behind them, as numbers; ``move`` is None once it is anything else."""

    move: Move | None

    @staticmethod
    def __new__(cls, base: Tensor, origin: str, move: Move | None) -> Moved:
        return super().__new__(cls, base, origin)  # type: ignore[return-value]

    def __init__(self, base: Tensor, origin: str, move: Move | None) -> None:
        super().__init__(base, origin)
        self.move = move

    @classmethod
    @torch._dynamo.disable
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        moved = args[0] if args else None
        if isinstance(moved, Moved):
            if func is aten.slice.Tensor:
                return moved.cut(*args[1:], **(kwargs or {}))
            info = func._schema.arguments[0].alias_info
            if info is not None and info.is_write:
                return moved.written(func, args[1:], kwargs or {})
        return super().__torch_dispatch__(func, types, args, kwargs)

    def cut(self, dim: int = 0, start: Any = None, end: Any = None, step: int = 1) -> Moved:
        """A part: of the last tokens it is still known what they are."""
        size = self.shape[dim]
        begin, stop, _ = slice(start, end).indices(size)
        whole = step == 1 and stop == size and (begin == 0 or dim in (2, -2))
        part = aten.slice.Tensor(self.base, dim, start, end, step)
        return Moved(part, self.origin, self.move if whole else None)

    def written(self, func: Any, args: Any, kwargs: Any) -> Moved:
        """Write to the numbers. The last token of a window that was rolled is the new one."""
        tokens = args[0][2] if func is aten.index_put_.default and len(args[0]) == 3 else None
        func(self.base, *(a.dense() if isinstance(a, Dequantized) else a for a in args), **kwargs)
        is_last = tokens is not None and args[0][:2] == [None, None] and tokens.reshape(-1).tolist() == [-1]
        if self.move is not None and self.move.x is None and is_last and not kwargs and len(args) == 2:
            self.move = self.move._replace(x=self.base[:, :, -1:].clone())
        else:
            self.move = None
        return self


def begin_to_slide(buffer: QuantizedKV) -> SlidingKV:
    """Make ``buffer``, whose tokens are about to move, a SlidingKV: the object, and all that hold it."""
    state, width = buffer.live, buffer.shape[2]
    members = [member for ref in state.group.members if isinstance(member := ref(), KVState)]
    for each in (state, *state.borrowers):
        if each.lower is not None:
            each.lent_by = each.lower
            each.own_codes()
    longest = max(member.spec.shape[2] for member in members if not member.spec.window)
    respec(state, dataclasses.replace(with_room_to_slide(state.spec, longest), window=width))
    state.at_most = state.length
    _become(buffer, SlidingKV(state.spec, buffer.anchor, state, None, width))
    assert isinstance(buffer, SlidingKV)
    return buffer


def with_room_to_slide(spec: KVSpec, longest: int = 0) -> KVSpec:
    """``spec`` of a window that fills, with room for what comes: ``longest`` tokens, if that is more than it has.

    It takes no memory, and is what graphs are compiled for: so those of one length serve others.
    """
    width = spec.shape[2]
    return spec.with_room(room_of_graphs(longest if longest > width else room_for(WINDOWS * width)))


def empty(buffer: SlidingKV) -> None:
    """Forget all tokens: ``buffer`` is a QuantizedKV again, which fills."""
    state = buffer.live
    state.reset()
    respec(state, dataclasses.replace(state.spec.with_room(buffer.width), window=0))
    lower, state.lent_by = state.lent_by, None
    if lower is not None and lower.spec.shape == state.spec.shape and not lower.length:
        state.share_codes(lower)
    _become(buffer, QuantizedKV(state.spec, buffer.anchor, state))


def _become(buffer: QuantizedKV, new: QuantizedKV) -> None:
    """Both wrap nothing, so that class and fields are all that there is."""
    buffer.__class__ = type(new)
    buffer.__dict__.update(new.__dict__)


def _zero(kv: SlidingKV) -> Any:
    if kv.state is None:
        return kv
    if not kv.is_whole:
        return NotImplemented
    empty(kv)
    return kv


def _is_full(kv: QuantizedKV) -> bool:
    if kv.spec.ragged:  # whose rows are windows of their own, if any
        return False
    return isinstance(kv, SlidingKV) or (kv.state is not None and kv.state.length == kv.spec.shape[2])


def _roll(kv: QuantizedKV, shifts: Any, dims: Any = ()) -> Any:
    if kv.state is None or not kv.is_whole or list(shifts) != [-1] or list(dims) not in ([2], [-2]) or not _is_full(kv):
        return NotImplemented
    return Moved(kv.dense().roll(-1, 2), kv.origin, Move(kv.state, kv.state.length, None))


def _cat(tensors: Any, dim: int = 0) -> Any:
    kv = tensors[0]
    if kv.state is None or len(tensors) != 2 or dim not in (2, -2) or kv.spec.ragged:
        return NotImplemented
    x, length = tensors[1], kv.state.length
    width = kv.width if isinstance(kv, SlidingKV) else kv.spec.shape[2]
    if kv.span != ((1, width) if _is_full(kv) else (0, length)) or x.dtype != kv.dtype:
        return NotImplemented
    x = x.dense() if isinstance(x, Dequantized) else x
    return Moved(torch.cat([kv.dense(), x], 2), kv.origin, Move(kv.state, length, x))


def _copy(kv: QuantizedKV, source: Tensor, non_blocking: bool = False) -> Any:
    """What a window is to hold from now on; zeros, which ``load_state_dict`` may bring, are no tokens."""
    if kv.state is None or not kv.is_whole or isinstance(source, QuantizedKV):
        return _part_of(kv, source, non_blocking)
    move = source.move if isinstance(source, Moved) else None
    if move is None:
        is_empty = not isinstance(source, Dequantized) and is_zero(source.any())
        return aten.zero_.default(kv) if is_empty else _prompt(kv, source)
    if source.shape != kv.shape or move.x is None or move.state is not kv.state or move.length != kv.state.length:
        return NotImplemented
    (kv if isinstance(kv, SlidingKV) else begin_to_slide(kv)).slide(move.x)
    return kv


def _prompt(kv: QuantizedKV, source: Tensor) -> Any:
    """The last tokens of a prompt that is longer than the window; of fewer tokens it would not be known how many."""
    numbers = source.dense() if isinstance(source, Dequantized) else source
    if kv.state is None or kv.state.length or source.shape != kv.shape or isinstance(source, QuantizedKV):
        return NotImplemented
    if not bool((numbers != 0).any(3).any(1).any(0).all()):
        return NotImplemented
    kv.append_at(torch.arange(kv.shape[2], device=kv.device), numbers.to(kv.dtype))
    return kv


_part_of = QuantizedKV.handlers[aten.copy_.default]
QuantizedKV.handlers |= {aten.roll.default: _roll, aten.cat.default: _cat, aten.copy_.default: _copy}
SlidingKV.handlers = QuantizedKV.handlers | {aten.zero_.default: _zero}
