"""First prompts of new caches of transformers that compiled functions need not be traced for.

Of a ``DynamicCache`` all but the first one: from its graph it is known how they are stored (``later_prompts.py``). Of a
``StaticCache`` all: a step behind the first takes it over (``new_prompts.py``), and later ones are stored as that was.
Where no step does, as nothing is quantized, or none comes, prompts are compiled in the end.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from xquant_fx.cache.growing import STORED_KV
from xquant_fx.cache.later_prompts import Known, LaterPrompt, begin, learned
from xquant_fx.cache.new_prompts import NewPrompt, StaticPrompt, is_new, may_be_new, storing
from xquant_fx.cache.prompts import AsGuessed

_MODULE, _GROWING, _STATIC = "transformers.cache_utils", "DynamicCache", "StaticCache"
#: Prompts of static caches before any step, after which there may be none: they are compiled from then on.
MANY_PROMPTS = 8

#: Static caches whose prompts were not traced, and of which no step was seen yet.
_untouched = weakref.WeakSet[Any]()


class Function:
    """What is known of a compiled function."""

    def __init__(self) -> None:
        self.known: dict[str, Known] = {}
        """How it stored caches, by kind, of which a graph said that."""
        self.traced: set[str] = set()
        """Kinds of caches whose prompts are to be traced."""
        self.prompts = 0
        """Prompts of static caches that were not, before the first step."""

    def prompt_of(self, cache: Any) -> NewPrompt | None:
        """The first prompt of a new ``cache``, to run untraced; None: it is to be traced."""
        kind, layers = type(cache).__name__, storing(cache)
        if cache.offloading or kind in self.traced or not may_be_new(layers):
            return None
        later = begin(cache, self.known[kind]) if kind in self.known else None
        if later is not None or kind == _GROWING:
            return later
        self.prompts += 1
        if self.prompts > MANY_PROMPTS:
            self.traced.add(kind)
            return None
        _untouched.add(cache)
        return StaticPrompt(layers)

    def was_prompt(self, cache: Any, prompt: NewPrompt) -> bool:
        """Whether a call that ran untraced was the ``prompt`` that it was taken for."""
        kind = type(cache).__name__
        if not prompt.tokens:  # it leaves the cache alone, and does something else
            self.traced.add(kind)
        elif isinstance(prompt, LaterPrompt) and not prompt.fitted:
            self.known.pop(kind, None)
        return prompt.was_alone

    def learn(self, cache: Any) -> None:
        """Behind a graph that stored ``cache``, maybe."""
        found = learned(cache)
        if found is not None:
            self.known[type(cache).__name__] = found

    def step_came(self, cache: Any) -> None:
        """Behind the first step of a static ``cache``: was it taken over?"""
        _untouched.discard(cache)
        self.prompts = 0
        if any(isinstance(getattr(layer, "keys", None), STORED_KV) for layer in cache.layers):
            self.learn(cache)
        else:
            self.traced.add(_STATIC)


_functions = weakref.WeakKeyDictionary[Any, Function]()


def look(function: Any, given: Sequence[Any]) -> tuple[NewPrompt, AsGuessed] | Callable[[], None] | None:
    """Look at a call of ``function``, as torch keeps it, that is given these arguments.

    Returns:
        A prompt that is to run untraced, and what says afterwards whether it was one; or what is to be called behind a
        call that is traced.
    """
    caches = [each for each in given if type(each).__name__ in (_GROWING, _STATIC) and type(each).__module__ == _MODULE]
    if len(caches) != 1 or torch.is_grad_enabled():
        return None
    cache = caches[0]
    begins = is_new(cache)
    if not begins and cache not in _untouched:  # any step but a few
        return None
    known = _functions.setdefault(function, Function())
    if not begins:
        return partial(known.step_came, cache)
    prompt = known.prompt_of(cache)
    if prompt is not None:
        return prompt, partial(known.was_prompt, cache, prompt)
    return partial(known.learn, cache)
