"""Cold prompts: keys that know more than ordinary ones of the attention that reads them.

``XQuantLayer.update`` gives a cold prompt its own keys back, which attention then reads. As :class:`PromptKeys` they
are ordinary keys in every way, but

- when an attention multiplies them with its query, that is noted (``note_queries``);
- long prompts on some CPUs are attended to by a kernel (``kernels/prompt_attention/``), and by the same keys long
  chunks of them;
- a mask as wide as the whole cache, which fits any other step, loses the columns behind the prompt, where nothing is
  (while Dynamo traces, too).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from xquant_fx.kernels.prompt_attention.cpu_call import attended

_ATTENTIONS = (torch.nn.functional.scaled_dot_product_attention,)
_PRODUCTS = (torch.matmul, torch.bmm, Tensor.matmul, Tensor.bmm, Tensor.__matmul__)
#: Of what is added to the scores, a query and keys.
_ADDING_PRODUCTS = (torch.baddbmm, Tensor.baddbmm)
_MT: Any = Tensor.mT
#: Through these, keys stay keys: grouped heads are repeated, the last dimensions exchanged.
_VIEWS = (
    Tensor.__getitem__, Tensor.expand, Tensor.reshape, Tensor.view, Tensor.transpose, Tensor.contiguous, Tensor.to,
    Tensor.unsqueeze, Tensor.repeat_interleave, Tensor.permute, _MT.__get__, torch.repeat_interleave,
    torch.transpose, torch.permute, torch.unsqueeze, torch.reshape,
)  # fmt: skip
#: Through these, scores stay scores.
_SCALINGS = (
    Tensor.__mul__, Tensor.mul, torch.mul, Tensor.__truediv__, Tensor.div, torch.div, Tensor.to, torch.tanh,
    Tensor.view, Tensor.reshape, torch.reshape,
)  # fmt: skip
_MASKINGS = (Tensor.__add__, Tensor.add, Tensor.add_, torch.add, Tensor.masked_fill, torch.where)


class Prompt(NamedTuple):
    """What keys know of their prompt."""

    note: Callable[[Tensor], None]
    """Takes the query [B, heads, q, D] that attends to them."""
    tokens: int
    """Tokens of the prompt."""
    width: int
    """Tokens of the cache."""

    def cut(self, mask: Any) -> Any:
        """``mask`` [.., tokens or width] without the columns behind the prompt; anything else as it is."""
        wide = isinstance(mask, Tensor) and mask.dim() and mask.shape[-1] == self.width != self.tokens
        return mask[..., : self.tokens] if wide else mask


class PromptKeys(torch.Tensor):
    """Keys [B, H, q, D] of a prompt, or what views made of them."""

    prompt: Prompt

    @classmethod
    def of(cls, keys: Tensor, note: Callable[[Tensor], None], width: int = 0) -> PromptKeys:
        """``keys`` that give ``note`` the query [B, heads, q, D] that reads them, in a cache of ``width`` tokens."""
        return cls._marked(keys, Prompt(note, keys.shape[2], width))

    @classmethod
    def _marked(cls, keys: Tensor, prompt: Prompt) -> PromptKeys:
        marked = keys.as_subclass(cls)
        marked.prompt = prompt
        return marked

    @classmethod
    def __torch_function__(cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _ADDING_PRODUCTS:
            return cls._added(func, args, kwargs)
        names = ("query", "key") if func in _ATTENTIONS else ("input", "other")
        query, keys = (args[i] if len(args) > i else kwargs.get(name) for i, name in enumerate(names))
        prompt = keys.prompt if isinstance(keys, PromptKeys) and not isinstance(query, PromptKeys) else None
        if prompt is not None and isinstance(query, Tensor) and func in _ATTENTIONS + _PRODUCTS:
            prompt.note(query)  # before the keys are multiplied, which are in the processor's caches now
        with torch._C.DisableTorchFunctionSubclass():
            result = None
            if prompt is not None and func in _ATTENTIONS:
                args = (*args[:3], *map(prompt.cut, args[3:]))  # from the fourth on: the mask, numbers
                kwargs = {**kwargs, "attn_mask": prompt.cut(kwargs["attn_mask"])} if "attn_mask" in kwargs else kwargs
                result = attended(*args, **kwargs)
            result = func(*args, **kwargs) if result is None else result
        if prompt is not None and isinstance(query, Tensor) and func in _PRODUCTS:
            return PromptScores.of(result, prompt)
        first = args[0] if args else None
        if func in _VIEWS and isinstance(first, PromptKeys) and isinstance(result, Tensor):
            return cls._marked(result, first.prompt)
        return result

    @staticmethod
    def _added(func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """``baddbmm`` of something as wide as the cache, ALiBi say, queries and keys."""
        given = dict(zip(("input", "batch1", "batch2"), args, strict=False)) | dict(kwargs)
        keys = given["batch2"]
        with torch._C.DisableTorchFunctionSubclass():
            if not isinstance(keys, PromptKeys):
                return func(*args, **kwargs)
            added = keys.prompt.cut(given.pop("input"))
            return PromptScores.of(func(added, **given), keys.prompt)


class PromptScores(torch.Tensor):
    """Scores [B, heads, q, q] of a prompt, until a mask is added to them."""

    prompt: Prompt

    @classmethod
    def of(cls, scores: Tensor, prompt: Prompt) -> PromptScores:
        """``scores`` that know ``prompt``."""
        marked = scores.as_subclass(cls)
        marked.prompt = prompt
        return marked

    @classmethod
    def __torch_function__(cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        prompt = next((a.prompt for a in (*args, *(kwargs or {}).values()) if isinstance(a, PromptScores)), None)
        with torch._C.DisableTorchFunctionSubclass():
            if func in _MASKINGS and prompt is not None:
                args = tuple(prompt.cut(a) for a in args)
            result = func(*args, **(kwargs or {}))
        are_scores = isinstance(result, Tensor) and prompt is not None and result.shape[-1:] == (prompt.tokens,)
        if func in _SCALINGS and prompt is not None and are_scores:
            return cls.of(result, prompt)
        return result.as_subclass(Tensor) if isinstance(result, PromptScores) else result
