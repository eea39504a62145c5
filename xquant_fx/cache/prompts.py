"""Which calls of a compiled model run uncompiled, as a cache that they are given knows before Dynamo has traced them.

First prompts of an ``XQuantCache`` do, and on CPUs chunks of more than STEP_TOKENS tokens behind those of a quantized
cache. That a call brings one of these and nothing else is a guess, made from its arguments: when it has ended, the
cache knows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from xquant_fx.cache.group import CacheGroup
from xquant_fx.cache.growing import GrowingKV
from xquant_fx.cache.kv_tensor import QuantizedKV
from xquant_fx.kernels.layout import STEP_TOKENS

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
        return None
    stores = group.stores
    return lambda: group.stores > stores and group.last_stored > STEP_TOKENS


def _brought_prompt(cache: TellsPrompts, begun: int, steps: int) -> bool:
    """Whether a call brought more layers their first tokens, and no steps behind: there are no more than ``steps``."""
    group = cache.group
    return cache.layers_begun[0] > begun and (group is None or group.steps <= steps)


def _group(cache: Any) -> CacheGroup | None:
    """That of a cache on a CPU: an ``XQuantCache``, or one of transformers whose layers are all quantized, and in no
    window."""
    if isinstance(cache, TellsPrompts):
        group = cache.group
        return group if group is not None and group.start.device.type == "cpu" else None
    if type(cache).__module__ != "transformers.cache_utils":
        return None
    keys: list[Any] = [getattr(layer, "keys", None) for layer in getattr(cache, "layers", ())]
    if not keys or not all(isinstance(each, QuantizedKV | GrowingKV) and not each.live.spec.window for each in keys):
        return None
    group = cast(CacheGroup, keys[0].live.group)
    return group if group.start.device.type == "cpu" else None
