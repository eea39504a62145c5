"""Caches of transformers that are in full precision yet, and which calls they spare Dynamo.

First prompts of new ones are not traced: nobody knows yet how they are going to be stored, so they stay in full
precision until a step comes (``new_prompts.py``). A step finds its cache quantized before it is traced (``trial.py``),
so that one graph is all that is made; where that cannot be, a step that Dynamo traces for it takes it over. From then
on it is known how prompts are stored (``later_prompts.py``). Where nothing is quantized, or no step comes, prompts are
traced in the end.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from xquant_fx.cache.early import is_plain, those_quantized
from xquant_fx.cache.growing import STORED_KV
from xquant_fx.cache.later_prompts import Known, LaterPrompt, begin, learned
from xquant_fx.cache.new_prompts import FirstPrompt, NewPrompt, is_new, may_be_new, storing
from xquant_fx.cache.prompts import AsGuessed, plain_windows, uncompiled
from xquant_fx.compiler.trial import Asked, Trial, begin_trial
from xquant_fx.kernels.layout import STEP_TOKENS

_MODULE, _GROWING, _STATIC = "transformers.cache_utils", "DynamicCache", "StaticCache"
#: Prompts before any step, after which there may be none: they are compiled from then on.
MANY_PROMPTS = 8
#: Tokens of a prompt of a cache that grows that stay in full precision until its first step. Longer ones, which take
#: long themselves, are traced, and no layer but one is in full precision.
MOST_TOKENS = 1024

#: Caches whose prompts were not traced, and of which no step was seen yet.
_untouched = weakref.WeakSet[Any]()
#: Those that grow whose prompts were stored as one before, and of which no step was seen yet.
_stored = weakref.WeakSet[Any]()
#: Caches in full precision that are not tried (any more).
_as_it_is = weakref.WeakSet[Any]()


class Untraced(NamedTuple):
    """A call that is to run untraced."""

    end: Callable[[], Any]
    """What is to be called behind it, whether it failed or not."""
    as_guessed: AsGuessed
    widths: frozenset[int] = frozenset()
    """How wide masks are that were made for all that the cache has room for: attention gets the new tokens alone."""


class Function:
    """What is known of a compiled function, by kinds of caches."""

    def __init__(self) -> None:
        self.known: dict[str, Known] = {}
        """How it stored caches, of which a graph said that."""
        self.traced: set[str] = set()
        """Those whose prompts are to be traced."""
        self.prompts = 0
        """Prompts that stayed in full precision, before the first step."""
        self.refused: set[str] = set()
        """Those that were quantized before their step was traced, and should not have been;"""
        self.accepted: set[str] = set()
        """and those of which the graph was one for quantized ones."""

    def prompt_of(self, cache: Any, tokens: int, asked: Callable[[], Asked]) -> NewPrompt | None:
        """The first prompt of a new ``cache``, to run untraced; None: it is to be traced."""
        kind, layers = type(cache).__name__, storing(cache)
        _as_it_is.discard(cache)
        if cache.offloading or kind in self.traced or not may_be_new(layers) or asked().request.compile_prompts:
            return None
        later = begin(cache, self.known[kind]) if kind in self.known else None
        if later is not None:
            return later
        if kind == _GROWING and (kind in self.refused or tokens > MOST_TOKENS):
            return None
        if kind == _GROWING and not those_quantized(layers.values(), asked().request.effective, tokens + 1):
            return None  # a window forgets tokens, or nothing is quantized
        self.prompts += 1
        if self.prompts > MANY_PROMPTS:
            self.traced.add(kind)
            return None
        _untouched.add(cache)
        return FirstPrompt(layers)

    def was_prompt(self, cache: Any, prompt: NewPrompt) -> bool:
        """Whether a call that ran untraced was the ``prompt`` that it was taken for."""
        kind = type(cache).__name__
        if not prompt.tokens:  # it leaves the cache alone, and does something else
            self.traced.add(kind)
        elif isinstance(prompt, LaterPrompt) and not prompt.fitted:
            self.known.pop(kind, None)
        elif isinstance(prompt, LaterPrompt) and kind == _GROWING:
            _stored.add(cache)
        return prompt.was_alone

    def learn(self, cache: Any) -> None:
        """Behind a graph that stored ``cache``, maybe."""
        found = learned(cache)
        if found is not None:
            self.known[type(cache).__name__] = found
            self.traced.discard(type(cache).__name__)

    def has_graph_for(self, cache: Any) -> bool:
        """Whether a graph quantized all layers of such a ``cache``."""
        kind = type(cache).__name__
        known = self.known.get(kind)
        return kind in self.accepted or (known is not None and known.layers.keys() == storing(cache).keys())

    def trial_of(self, cache: Any, new: tuple[int, int], asked: Callable[[], Asked]) -> Trial | None:
        """A ``cache`` in full precision that gets so many ``new`` rows and tokens, quantized on trial; None: what the
        step finds decides."""
        kind = type(cache).__name__
        if cache.offloading or kind in self.refused or cache in _as_it_is:
            return None
        may_be = may_be_new(storing(cache))
        trial = begin_trial(cache, new, asked(), self.has_graph_for(cache)) if may_be else None
        if trial is None:
            _as_it_is.add(cache)
        return trial

    def chunk_of(self, cache: Any, new: tuple[int, int], asked: Callable[[], Asked]) -> Untraced | None:
        """A chunk behind what a ``cache`` holds in full precision, which is quantized: steps of such have a graph."""
        trial = self.trial_of(cache, new, asked) if self.has_graph_for(cache) else None
        if trial is not None:
            trial.accept()
            trial.end(failed=False)
        guess = None if trial is None else uncompiled(cache, new[1])
        return None if guess is None else Untraced(lambda: None, guess)

    def step_came(self, cache: Any, trial: Trial | None, failed: bool) -> None:
        """Behind the first step of a ``cache``, or one on ``trial``: is it quantized?"""
        kind, is_quantized = type(cache).__name__, trial is not None and trial.end(failed)
        if trial is not None and not is_quantized:
            if not failed:
                self.refused.add(kind)
            if (
                not failed or trial.accepted is False
            ):  # the next step, whose graph is for ordinary buffers, is its first
                _as_it_is.add(cache)
            return
        if failed:
            return
        _untouched.discard(cache)
        self.prompts = 0
        if is_quantized:
            self.accepted.add(kind)
            _as_it_is.add(cache)  # its first layer may be a window that stays in full precision
        if any(isinstance(getattr(layer, "keys", None), STORED_KV) for layer in cache.layers):
            self.learn(cache)
        else:
            self.traced.add(kind)


def _mark_masks(given: Sequence[Any], length: int) -> None:
    """Have Dynamo leave open how long masks [..., T] of all tokens are, of which it has seen no others before."""
    for each in given:
        if isinstance(each, Tensor) and each.dim() >= 2 and each.shape[-1] == length:
            torch._dynamo.maybe_mark_dynamic(each, each.dim() - 1)


def _mark_windows(cache: Any) -> None:
    """The same of windows that grow and stay in full precision, until they are full."""
    for _, _, x in plain_windows(cache.layers):
        torch._dynamo.maybe_mark_dynamic(x, 2)


_functions = weakref.WeakKeyDictionary[Any, Function]()


def look(
    function: Any, given: Sequence[Any], new: tuple[int, int], asked: Callable[[], Asked]
) -> Untraced | Callable[[bool], None] | None:
    """Look at a call of ``function``, as torch keeps it, that is given these arguments, of ``new`` rows and tokens.

    Returns:
        A call that is to run untraced; or what is to be called behind one that is traced, with whether it failed.
    """
    caches = [each for each in given if type(each).__name__ in (_GROWING, _STATIC) and type(each).__module__ == _MODULE]
    if len(caches) != 1 or torch.is_grad_enabled():
        return None
    cache, tokens = caches[0], new[1]
    if is_new(cache):
        known = _functions.setdefault(function, Function())
        prompt = known.prompt_of(cache, tokens, asked)
        if prompt is not None:
            return Untraced(prompt.end, partial(known.was_prompt, cache, prompt), prompt.widths)
        return lambda failed: None if failed else known.learn(cache)
    is_first = cache in _untouched
    if not is_first and not is_plain(cache):  # any step but a few
        if cache in _stored:
            _stored.discard(cache)
            _mark_masks(given, cache.get_seq_length() + tokens)
        return None
    known = _functions.setdefault(function, Function())
    is_left = tokens > STEP_TOKENS and not asked().request.compile_prompts
    if is_left and (chunk := known.chunk_of(cache, new, asked)) is not None:
        return chunk
    trial = known.trial_of(cache, new, asked) if 0 < tokens <= STEP_TOKENS else None
    if trial is not None:
        _mark_masks(given, trial.early.tokens + tokens)
        _mark_windows(cache)
    return partial(known.step_came, cache, trial) if is_first or trial is not None else None
