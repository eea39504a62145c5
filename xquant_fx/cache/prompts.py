"""Which calls of a compiled model run uncompiled, as a cache that they are given knows before Dynamo has traced them.

First prompts of an ``XQuantCache`` do, and on CPUs chunks of more than STEP_TOKENS tokens behind those of a quantized
cache. How many tokens a call brings is guessed from its arguments. A guess that was wrong costs one uncompiled step:
the cache has seen then how few there were, and no more is guessed (``chunk_guesses.py``).
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from xquant_fx.cache.group import CacheGroup
from xquant_fx.cache.growing import GrowingKV
from xquant_fx.cache.kv_tensor import QuantizedKV
from xquant_fx.kernels.layout import STEP_TOKENS


class TellsPrompts:
    """A cache whose first prompt runs uncompiled."""

    def begins(self) -> bool:
        """Whether the call that this cache is about to be given to brings first tokens. Asked once per call."""
        raise NotImplementedError

    @property
    def group(self) -> CacheGroup | None:
        """What its buffers share; None before the first step."""
        raise NotImplementedError


def uncompiled(cache: Any, tokens: int) -> AbstractContextManager[None] | None:
    """For the call that ``cache`` is about to be given to, with ``tokens`` new ones, it seems; None: it is compiled."""
    if isinstance(cache, TellsPrompts) and cache.begins():
        return nullcontext()
    if tokens <= STEP_TOKENS:
        return None
    group = cache.group if isinstance(cache, TellsPrompts) else _group(cache)
    if group is None or group.start.device.type != "cpu" or not group.guesses.leave_untraced(tokens):
        return None
    return group.in_chunk()


def _group(cache: Any) -> CacheGroup | None:
    """That of a cache of transformers which holds tokens, and all of them quantized and in no window."""
    if type(cache).__module__ != "transformers.cache_utils":
        return None
    keys: list[Any] = [getattr(layer, "keys", None) for layer in getattr(cache, "layers", ())]
    if not keys or not all(isinstance(each, QuantizedKV | GrowingKV) and not each.live.spec.window for each in keys):
        return None
    first = keys[0]
    return first.live.group if isinstance(first, GrowingKV) or first.live.length else None
