"""First prompts of new caches of transformers that compiled functions need not be traced for.

Of a ``DynamicCache`` all but the first one: from its graph it is known how they are stored (``later_prompts.py``). Of a
``StaticCache`` all: a step behind takes it over (``static_prompts.py``). Where nothing is quantized by it, later
prompts are compiled.
"""

from __future__ import annotations

import contextlib
import sys
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from xquant_fx.cache.growing import STORED_KV
from xquant_fx.cache.later_prompts import Known, begin, learned
from xquant_fx.cache.prompts import AsGuessed
from xquant_fx.cache.static_prompts import StaticPrompt

_MODULE, _GROWING, _STATIC = "transformers.cache_utils", "DynamicCache", "StaticCache"

#: Compiled functions, as torch keeps them: how they stored caches that grow, by the graphs of their first prompts;
_known = weakref.WeakKeyDictionary[Any, Known]()
#: and those that left a static cache in full precision.
_compiling = weakref.WeakSet[Any]()
#: Static caches whose prompts were not traced, and of which no step was seen yet.
_untouched = weakref.WeakSet[Any]()


def prompt_of_new(
    function: Any, cache: Any, inside: contextlib.ExitStack, cleanups: list[Callable[[], Any]]
) -> AsGuessed | None:
    """For a call of ``function`` that is given ``cache``: a prompt, to run untraced until ``inside`` ends.

    None: it is none, or is to be traced; then ``cleanups`` run behind it.
    """
    kind = type(cache).__name__
    if kind not in (_GROWING, _STATIC) or type(cache).__module__ != _MODULE or torch.is_grad_enabled():
        return None
    if any(getattr(layer, "is_initialized", True) for layer in cache.layers):
        if kind == _STATIC and cache in _untouched:
            cleanups.append(partial(_look, function, cache))
        return None
    if cache.offloading:
        return None
    return _of_growing(function, cache, inside, cleanups) if kind == _GROWING else _of_static(function, cache, inside)


def _of_growing(
    function: Any, cache: Any, inside: contextlib.ExitStack, cleanups: list[Callable[[], Any]]
) -> AsGuessed | None:
    known = _known.get(function)
    prompt = None if known is None else begin(cache, known)
    if prompt is None:
        cleanups.append(partial(_learn, function, cache))
        return None
    inside.callback(prompt.end)

    def as_guessed() -> bool:
        if not prompt.fitted:
            _known.pop(function, None)
        return prompt.was_alone

    return as_guessed


def _learn(function: Any, cache: Any) -> None:
    """Behind a prompt that was traced."""
    if sys.exc_info()[0] is None and (found := learned(cache)) is not None:
        _known[function] = found


def _of_static(function: Any, cache: Any, inside: contextlib.ExitStack) -> AsGuessed | None:
    if function in _compiling:
        return None
    prompt = StaticPrompt(cache)
    inside.callback(prompt.end)
    _untouched.add(cache)
    return lambda: prompt.was_alone


def _look(function: Any, cache: Any) -> None:
    """Behind the first step: was the cache taken over?"""
    if sys.exc_info()[0] is None:
        _untouched.discard(cache)
        if not any(isinstance(getattr(layer, "keys", None), STORED_KV) for layer in cache.layers):
            _compiling.add(function)
