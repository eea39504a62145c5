"""What uncompiled attention reads of a buffer that has room for more tokens than it holds: no more than those.

Masks are for all that there is room for, and before attention models repeat each KV head for its query heads: of all,
that would be a copy of zeros mostly, and scores of them. So repeating and dequantizing are put off, and attention
leaves out the tokens behind those that are held, if its mask hides them; or it reads the codes
(``step_attention.py``). Any other op reads all, as zeros.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from xquant_fx.cache.reads import Copied, Dequantized, read, wrapper

aten = torch.ops.aten


class Reading:
    """The first ``tokens`` of a ``KVState``, dequantized when they are read; at the latest when they would change."""

    def __init__(self, state: Any, tokens: int) -> None:
        self.state, self.tokens = state, tokens
        self.numbers: Tensor | None = None

    def read(self) -> Tensor:
        """The tokens [B, H, tokens, D] as they were when this was made."""
        if self.numbers is None:
            self.numbers = self.state.load(self.tokens)
        return self.numbers


class Held(NamedTuple):
    """The tokens that a layer holds of those ``room`` keys or values that attention is given, each head ``times``
    times."""

    reading: Reading
    room: int
    times: int = 1

    @property
    def state(self) -> Any:
        """Whose they are."""
        return self.reading.state

    @property
    def tokens(self) -> int:
        """How many."""
        return self.reading.tokens

    @property
    def is_read(self) -> bool:
        """Whether that is all that is left of them."""
        return self.reading.numbers is not None

    def dense(self) -> Tensor:
        """What is held [B, H * times, tokens, D], dequantized."""
        numbers = self.reading.read()
        return numbers if self.times == 1 else numbers.repeat_interleave(self.times, 1)


class HeldTokens(Copied):
    """Tokens of a buffer [B, H, room, D], each head ``times`` times, dequantized when they are read.

    As a tensor [B, H, times, room, D], or [B, H * times, room, D].
    """

    held: Held
    handlers: ClassVar[dict[Any, Callable[..., Any]]]

    @staticmethod
    def __new__(cls, held: Held, like: Tensor, origin: str, merged: bool) -> HeldTokens:
        batch, heads, _, dim = held.state.spec.shape
        sizes = (batch, heads * held.times) if merged else (batch, heads, held.times)
        tensor: HeldTokens = wrapper(cls, (*sizes, held.room, dim), like.dtype, like.device)
        return tensor

    def __init__(self, held: Held, like: Tensor, origin: str, merged: bool) -> None:
        self.held, self._origin, self.merged = held, origin, merged

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"HeldTokens({self.origin}, {tuple(self.shape)}, {self.held.tokens} tokens)"

    def dense(self) -> Tensor:
        """All of it, as an ordinary tensor."""
        whole = torch.nn.functional.pad(self.held.dense(), (0, 0, 0, self.held.room - self.held.tokens))
        return whole.reshape(self.shape)

    @classmethod
    @torch._dynamo.disable
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        handler = cls.handlers.get(func)
        if handler is not None:
            result = handler(*args, **(kwargs or {}))
            if result is not NotImplemented:
                return result
        return read(func, args, kwargs or {})


def held_of(side: Any) -> Held | None:
    """What attention is to read of ``side`` [B, heads, room, D]; None: all of it, or it is no buffer."""
    if isinstance(side, HeldTokens):
        return side.held if side.merged else None
    found = side.first_tokens() if isinstance(side, Dequantized) else None
    if found is None or side.device.type != "cpu":
        return None
    state, room = found
    if state.spec.ragged or state.behind is not None:
        return None
    held = min(state.length, room)
    return Held(Reading(state, held), room) if held else None


def heads_apart(buffer: Any, dim: int) -> Any:
    """``buffer[:, :, None]``, with which models begin to repeat heads."""
    if dim not in (2, -3) or (held := held_of(buffer)) is None:
        return NotImplemented
    held.state.group.put_off(held.reading)
    return HeldTokens(held, buffer, buffer.origin, merged=False)


def _expand(x: Any, size: Sequence[int], implicit: bool = False) -> Any:
    if not isinstance(x, HeldTokens) or x.merged or x.held.times > 1 or len(size) != 5 or type(size[2]) is not int:
        return NotImplemented
    fits = all(new in (-1, old) for i, (new, old) in enumerate(zip(size, x.shape, strict=True)) if i != 2)
    repeated = x.held._replace(times=size[2])
    return HeldTokens(repeated, x, x.origin, merged=False) if fits and size[2] > 0 else NotImplemented


def _view(x: Any, size: Sequence[int]) -> Any:
    if not isinstance(x, HeldTokens) or x.merged:
        return NotImplemented
    batch, heads, times, room, dim = x.shape
    known = (batch, heads * times, room, dim)
    fits = len(size) == 4 and list(size).count(-1) <= 1 and all(n in (-1, m) for n, m in zip(size, known, strict=True))
    return HeldTokens(x.held, x, x.origin, merged=True) if fits else NotImplemented


def attend_to_held(q: Tensor, key: Held, value: Held, mask: Tensor | None, scale: float | None) -> Any:
    """``scaled_dot_product_attention`` of ``q`` [B, heads, q, D] under a mask of numbers, without what is not held."""
    seen = mask_of_held(mask, key)
    if seen is None:
        return NotImplemented
    attention = aten._scaled_dot_product_flash_attention_for_cpu.default
    return attention(q, key.dense(), value.dense(), 0.0, False, attn_mask=seen, scale=scale)


def mask_of_held(mask: Tensor | None, held: Held) -> Tensor | None:
    """The columns of ``mask`` [1 or B, 1 or heads, 1 or q, room], which is added to scores, that are for tokens which
    are held; None: there is no such mask, or it shows others."""
    if mask is None or mask.dim() != 4 or mask.shape[3] != held.room or not mask.is_floating_point():
        return None
    hidden = (mask[:, :1] if mask.stride(1) == 0 else mask)[..., held.tokens :]
    return mask[..., : held.tokens] if not hidden.numel() or bool(hidden.amax() == float("-inf")) else None


HeldTokens.handlers = {
    aten.expand.default: _expand,
    aten.view.default: _view,
    aten._unsafe_view.default: _view,
    aten.reshape.default: _view,  # which inference mode does not take apart
}
