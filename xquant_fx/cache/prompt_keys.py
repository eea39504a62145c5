"""Eager prompts: keys that show the query that attends to them to the cache that stores them.

``XQuantLayer.update`` gives a cold prompt its own keys back, which attention then reads. As :class:`PromptKeys` they
are ordinary keys in every way; when an attention multiplies them with its query, that is noted (``note_queries``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_ATTENTIONS = (torch.nn.functional.scaled_dot_product_attention,)
_PRODUCTS = (torch.matmul, torch.bmm, Tensor.matmul, Tensor.bmm, Tensor.__matmul__)
_MT: Any = Tensor.mT
#: Through these, keys stay keys: grouped heads are repeated, the last dimensions exchanged.
_VIEWS = (
    Tensor.__getitem__, Tensor.expand, Tensor.reshape, Tensor.view, Tensor.transpose, Tensor.contiguous, Tensor.to,
    Tensor.unsqueeze, Tensor.repeat_interleave, Tensor.permute, _MT.__get__, torch.repeat_interleave,
    torch.transpose, torch.permute, torch.unsqueeze, torch.reshape,
)  # fmt: skip


class PromptKeys(torch.Tensor):
    """Keys [B, H, q, D] of a prompt, or what views made of them."""

    note: Callable[[Tensor], None]

    @classmethod
    def of(cls, keys: Tensor, note: Callable[[Tensor], None]) -> PromptKeys:
        """``keys`` that give ``note`` the query [B, heads, q, D] that attends to them."""
        marked = keys.as_subclass(cls)
        marked.note = note
        return marked

    @classmethod
    def __torch_function__(cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **kwargs)
        keys = args[0] if args else None
        if func in _VIEWS and isinstance(keys, PromptKeys) and isinstance(result, Tensor):
            return cls.of(result, keys.note)
        _show_query(func, args, kwargs)
        return result


def _show_query(func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> None:
    if func not in _ATTENTIONS + _PRODUCTS:
        return
    names = ("query", "key") if func in _ATTENTIONS else ("input", "other")
    query, keys = (args[i] if len(args) > i else kwargs.get(name) for i, name in enumerate(names))
    if isinstance(keys, PromptKeys) and isinstance(query, Tensor) and not isinstance(query, PromptKeys):
        keys.note(query)
