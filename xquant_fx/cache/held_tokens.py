"""What uncompiled attention reads of a buffer that has room for more tokens than it holds: no more than those.

Masks are for all that there is room for, and before attention models repeat each KV head for its query heads: of all,
that would be a copy of zeros mostly, and scores of them. So the repeating is put off, and attention leaves out the
tokens behind those that are held, if its mask hides them. Any other op reads them all, as zeros.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from xquant_fx.cache.reads import Copied, Dequantized, read
from xquant_fx.tracing import is_transformed

aten = torch.ops.aten


class HeldTokens(Copied):
    """Dequantized tokens ``held`` [B, H, n, D] as the first of ``room``, each head ``times`` times.

    As a tensor [B, H, times, room, D], or [B, H * times, room, D].
    """

    held: Tensor
    handlers: ClassVar[dict[Any, Callable[..., Any]]]

    @staticmethod
    def __new__(cls, held: Tensor, origin: str, room: int, times: int, merged: bool) -> HeldTokens:
        batch, heads, _, dim = held.shape
        shape = (batch, heads * times, room, dim) if merged else (batch, heads, times, room, dim)
        with torch.inference_mode(False):
            tensor = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=held.dtype, device=held.device)
        torch._C._set_throw_on_mutable_data_ptr(tensor)
        return tensor

    def __init__(self, held: Tensor, origin: str, room: int, times: int, merged: bool) -> None:
        self.held, self._origin, self.room, self.times, self.merged = held, origin, room, times, merged

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"HeldTokens({self.origin}, {tuple(self.shape)}, {self.held.shape[2]} tokens)"

    def repeated(self) -> Tensor:
        """The tokens that are held, each head as often as it is to be."""
        if self.times == 1:
            return self.held
        return self.held.repeat_interleave(self.times, 1)

    def dense(self) -> Tensor:
        """All of it, as an ordinary tensor."""
        whole = torch.nn.functional.pad(self.repeated(), (0, 0, 0, self.room - self.held.shape[2]))
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


def held_in(buffer: Any) -> Tensor | None:
    """The tokens [B, H, n, D] that a ``QuantizedKV`` [B, H, room, D] holds; None: all is to be read of it."""
    found = buffer.first_tokens()
    if found is None or buffer.device.type != "cpu":
        return None
    state, room = found
    if state.spec.ragged or state.behind is not None:
        return None
    held = state.length
    return state.load(held) if 0 < held < room else None


def heads_apart(buffer: Any, dim: int) -> Any:
    """``buffer[:, :, None]``, with which models begin to repeat heads."""
    if dim not in (2, -3) or (held := held_in(buffer)) is None:
        return NotImplemented
    return HeldTokens(held, buffer.origin, buffer.shape[2], 1, merged=False)


def _expand(x: Any, size: Sequence[int], implicit: bool = False) -> Any:
    if not isinstance(x, HeldTokens) or x.merged or x.times > 1 or len(size) != 5 or type(size[2]) is not int:
        return NotImplemented
    fits = all(new in (-1, old) for i, (new, old) in enumerate(zip(size, x.shape, strict=True)) if i != 2)
    return HeldTokens(x.held, x.origin, x.room, size[2], merged=False) if fits and size[2] > 0 else NotImplemented


def _view(x: Any, size: Sequence[int]) -> Any:
    if not isinstance(x, HeldTokens) or x.merged:
        return NotImplemented
    batch, heads, times, room, dim = x.shape
    known = (batch, heads * times, room, dim)
    fits = len(size) == 4 and list(size).count(-1) <= 1 and all(n in (-1, m) for n, m in zip(size, known, strict=True))
    return HeldTokens(x.held, x.origin, x.room, x.times, merged=True) if fits else NotImplemented


def attend_to_held(q: Tensor, key: Any, value: Any, mask: Tensor | None, scale: float | None) -> Any:
    """``scaled_dot_product_attention`` of ``q`` [B, heads, q, D] under a mask of numbers, without what is not held."""
    if mask is None or mask.dim() != 4 or mask.shape[3] != key.shape[2] or key.shape[2] != value.shape[2]:
        return NotImplemented
    if is_transformed(q, mask):
        return NotImplemented
    keys, values = _repeated(key), _repeated(value)
    if keys is None or values is None or keys.shape[2] != values.shape[2]:
        return NotImplemented
    held = keys.shape[2]
    hidden = (mask[:, :1] if mask.stride(1) == 0 else mask)[..., held:]
    if not bool(hidden.amax() == float("-inf")):
        return NotImplemented
    seen = mask[..., :held]
    attention = aten._scaled_dot_product_flash_attention_for_cpu.default
    return attention(q, keys, values, 0.0, False, attn_mask=seen, scale=scale)


def _repeated(side: Any) -> Tensor | None:
    if isinstance(side, HeldTokens):
        return side.repeated() if side.merged else None
    return held_in(side) if isinstance(side, Dequantized) else None


HeldTokens.handlers = {
    aten.expand.default: _expand,
    aten.view.default: _view,
    aten._unsafe_view.default: _view,
}
