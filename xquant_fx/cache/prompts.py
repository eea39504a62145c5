"""Which calls of a compiled model run uncompiled, as a cache that they are given knows before Dynamo has traced them.

First prompts of an ``XQuantCache`` do, and on CPUs chunks of more than STEP_TOKENS tokens behind those of a quantized
cache. So do the two steps in which the sliding windows of a ``DynamicCache`` become full, for each of which
transformers takes a way that no other step takes, and the one in which those of a ``StaticCache`` begin to move: Dynamo
would trace it for one token. That a call brings one of these and nothing else is a guess, made from its arguments: when
it has ended, the cache knows.

Relied on: ``get_seq_length`` of sliding windows, a number; ``sliding_window`` of ``DynamicSlidingWindowLayer``, which
keeps one token less; ``max_cache_len`` of ``StaticSlidingWindowLayer``. Checked on transformers 5.17 and 5.23.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import Tensor

from xquant_fx.cache.group import CacheGroup
from xquant_fx.cache.growing import GrowingKV
from xquant_fx.cache.kv_tensor import QuantizedKV
from xquant_fx.kernels.layout import STEP_TOKENS

GROWING_WINDOW = "DynamicSlidingWindowLayer"
_WINDOWS = (GROWING_WINDOW, "StaticSlidingWindowLayer")
_CACHES = ("DynamicCache", "StaticCache")
#: Says, when a call has ended, whether it was what it was taken for.
AsGuessed = Callable[[], bool]


class TellsPrompts:
    """A cache whose first prompt runs uncompiled."""

    @property
    def layers_begun(self) -> tuple[int, int]:
        """How many layers hold tokens, or did since the cache was empty, and how many there are."""
        raise NotImplementedError

    @property
    def group(self) -> CacheGroup | None:
        """What its buffers share; None before the first step."""
        raise NotImplementedError


def uncompiled(cache: Any, tokens: int) -> AsGuessed | None:
    """For a call that is given ``cache``, and seems to bring ``tokens``; None: it is compiled, or not known."""
    if isinstance(cache, TellsPrompts):
        begun, layers = cache.layers_begun
        if begun < layers:
            group = cache.group
            steps = 0 if group is None else group.steps + 1  # the prompt itself, behind the sequence before
            return lambda: _brought_prompt(cache, begun, steps if cache.group is group else 0)
    group = _group(cache) if tokens > STEP_TOKENS else None
    if group is None:
        return _fills_windows(cache, tokens) if tokens and type(cache).__name__ in _CACHES else None
    chunks, stores = group, group.stores

    def was_chunk() -> bool:
        without_views(cache.layers)
        return chunks.stores > stores and chunks.last_stored > STEP_TOKENS

    return was_chunk


def _brought_prompt(cache: TellsPrompts, begun: int, steps: int) -> bool:
    """Whether a call brought more layers their first tokens, and no steps behind: there are no more than ``steps``."""
    group = cache.group
    return cache.layers_begun[0] > begun and (group is None or group.steps <= steps)


#: The first sliding window of a cache of transformers, a list of none or one: each step asks.
_first_windows = weakref.WeakKeyDictionary[Any, list[Any]]()


def _fills_windows(cache: Any, tokens: int) -> AsGuessed | None:
    """For a call that seems to bring ``tokens``, in which windows of ``cache`` become full; None: it is another, or
    nothing is quantized."""
    found = _first_windows.get(cache)
    if found is None:
        found = _first_windows[cache] = [layer for layer in cache.layers if type(layer).__name__ in _WINDOWS][:1]
    if not found:
        return None
    (window,) = found
    held = window.get_seq_length()
    if not (_becomes_full if type(window).__name__ == GROWING_WINDOW else _begins_to_slide)(
        cache, window, held, tokens
    ):
        return None

    def filled() -> bool:
        without_views(cache.layers)
        return bool(window.get_seq_length() == held + tokens)

    return filled


def _becomes_full(cache: Any, window: Any, held: int, tokens: int) -> bool:
    """Whether a window that grows holds all that it ever does behind so many ``tokens``, or did right before."""
    becomes = 0 < held < window.sliding_window <= held + tokens + 1
    return becomes and any(isinstance(getattr(layer, "keys", None), GrowingKV) for layer in cache.layers)


def _begins_to_slide(cache: Any, window: Any, held: int, tokens: int) -> bool:
    """Whether one in a buffer, which was taken for a window and quantized nevertheless, is about to move."""
    moves = held + tokens > window.max_cache_len and type(window.keys) is QuantizedKV
    return moves and any(getattr(layer, "max_cache_len", 0) > window.max_cache_len for layer in cache.layers)


def plain_windows(layers: Iterable[Any]) -> Iterator[tuple[Any, str, Tensor]]:
    """Layers that are windows which grow, side, and what that holds in full precision."""
    for layer in layers:
        for side in ("keys", "values") if type(layer).__name__ == GROWING_WINDOW else ():
            if type(x := getattr(layer, side)) is Tensor:
                yield layer, side, x


def without_views(layers: Iterable[Any]) -> None:
    """Have sliding windows in full precision, behind uncompiled code, be what graphs return: no views of what they were
    cut from. Dynamo would trace the next step for views, and the one behind it anew."""
    for layer, side, x in plain_windows(layers):
        if x._is_view():
            setattr(layer, side, x.new_empty(0).set_(x.untyped_storage(), x.storage_offset(), x.size(), x.stride()))


def _group(cache: Any) -> CacheGroup | None:
    """That of a cache on a CPU: an ``XQuantCache``, or one of transformers whose layers are all quantized, and in no
    window, but for windows that stay in full precision."""
    if isinstance(cache, TellsPrompts):
        group = cache.group
        return group if group is not None and group.start.device.type == "cpu" else None
    if type(cache).__module__ != "transformers.cache_utils":
        return None
    layers = getattr(cache, "layers", ())
    keys: list[Any] = [getattr(layer, "keys", None) for layer in layers]
    stored = [each for each in keys if isinstance(each, QuantizedKV | GrowingKV)]
    if not stored or any(each.live.spec.window for each in stored):
        return None
    others = [layer for layer, each in zip(layers, keys, strict=True) if not isinstance(each, QuantizedKV | GrowingKV)]
    if not all(type(layer).__name__ in _WINDOWS and type(layer.keys) is Tensor for layer in others):
        return None
    group = stored[0].live.group
    return group if group.start.device.type == "cpu" else None
