"""Answers that a model writes about a context that its cache holds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from xquant_fx.cache.huggingface import XQuantCache
from xquant_fx.evaluate.models import cache_argument, forward
from xquant_fx.evaluate.simulate import WatchedCache
from xquant_fx.evaluate.size import saved, size_of
from xquant_fx.evaluate.tasks.continuations import Share
from xquant_fx.plan.config import XQuantConfig
from xquant_fx.plan.plan import Plan

#: Caches are made for multiples of this many tokens, so that compiled steps serve many lengths.
ROOM = 256


#: Compiled graphs of a model's forward: one or two for each setting and length of a cache.
GRAPHS = 256


@contextmanager
def compiling(model: Any, on: bool = True) -> Iterator[None]:
    """Compile a model's steps with the backend "xquant" while the block runs, if ``on``."""
    if not on:
        yield
        return
    before = model._compiled_call_impl
    with torch._dynamo.config.patch(recompile_limit=GRAPHS, accumulated_recompile_limit=GRAPHS):
        model.compile(backend="xquant")
        try:
            yield
        finally:
            model._compiled_call_impl = before


class Answer(NamedTuple):
    """What was written."""

    ids: list[int]
    compression_ratio: float
    """Share of 16 bits per element that the cache saved at the end, windows and all; less than 0 where it was short."""
    quantized: float
    """Share of the tokens that were read quantized, 0 to 1."""


@torch.no_grad()
def write_answer(
    model: Any,
    ids: Sequence[int],
    context: int,
    config: XQuantConfig | Plan | None,
    new_tokens: int,
    end: Sequence[int] = (),
) -> Answer:
    """Greedy decoding after a prompt.

    The first ``context`` tokens are prefilled in full precision; the others but the last are one more chunk, which
    reads the cache, and the last one is the first step.

    Args:
        model: a Hugging Face model.
        ids: the prompt, one token at least.
        context: tokens that are prefilled.
        config: of the cache; None: full precision.
        new_tokens: the most that are written.
        end: ids that end an answer, but not as its first token; none: those of the model's generation config, anywhere.
    """
    n, whole = len(ids), torch.tensor([list(ids)], device=model.device)
    cache = _cache(model, config, n + new_tokens)
    for begin, stop in ((0, min(context, n - 1)), (context, n - 1)):
        if begin < stop:
            forward(model, whole[:, begin:stop], cache, torch.tensor([stop - begin - 1], device=model.device))
    given: dict[str, Any] = dict(do_sample=False, num_beams=1, max_new_tokens=new_tokens, disable_compile=True)
    if end:
        given.update(eos_token_id=list(end), min_new_tokens=1)
    mask = torch.ones_like(whole)
    out = model.generate(whole, attention_mask=mask, **cache_argument(model, cache), **given)[0, n:].tolist()
    if not isinstance(cache, XQuantCache) or not cache.states:
        return Answer(out, 0.0, 0.0)
    share = Share()
    share.add(cache, torch.arange(min(context, n - 1), n + len(out) - 1))
    return Answer(out, saved(cache), share.mean or 0.0)


@torch.no_grad()
def nominal_ratio(model: Any, config: XQuantConfig | Plan | None) -> float:
    """What a setting saves of 16 bits, 0 to 1, by its true bits on a model: of all that grows with the text."""
    if config is None:
        return 0.0
    cache = XQuantCache(model.config, max_cache_len=2, config=config)
    one = torch.zeros(1, 1, dtype=torch.int64, device=model.device)
    forward(model, one, cache, one[0])
    return 1 - size_of(cache).true_bits / 16


def _cache(model: Any, config: XQuantConfig | Plan | None, tokens: int) -> Any:
    if config is None:
        cache = WatchedCache(config=model.config)
        cache.queries = None
        return cache
    return XQuantCache(model.config, max_cache_len=-(-tokens // ROOM) * ROOM, config=config)
