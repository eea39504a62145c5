"""Log likelihoods through a quantized cache: one pass gives what real steps give, and rows do not see each other."""

from __future__ import annotations

import pytest
import torch
from states import range_config

from xquant_fx import XQuantCache, XQuantConfig
from xquant_fx.errors import ArgumentError
from xquant_fx.evaluate.tasks.answers import compiling, nominal_ratio, write_answer
from xquant_fx.evaluate.tasks.continuations import Share, Through, continuation_logits, quantized

SHORT = range_config(residual_length=16, k_group_size=16)
CONTEXT = torch.randint(3, 128, (60,), generator=torch.Generator().manual_seed(1)).tolist()
CHOICES = [[5, 9, 11, 40], [7], [5, 9, 90]]


def logits_of(model, through, choices=CHOICES, share=None):
    return continuation_logits(model, CONTEXT, choices, through, share or Share())


@pytest.mark.parametrize("context_steps", [0, 1, 7, 59, None])
@pytest.mark.parametrize("config", [SHORT, XQuantConfig(residual_length=32, k_group_size=16)])
def test_one_pass_equals_real_steps(tiny_llama, context_steps, config):
    model = tiny_llama(layers=2)
    ours = logits_of(model, Through(config, context_steps))
    steps = logits_of(model, Through(config, context_steps, steps=True))
    assert [len(row) for row in ours] == [len(row) for row in steps] == [4, 1, 3]
    for a, b in zip(ours, steps, strict=True):
        torch.testing.assert_close(a, b, atol=1e-2, rtol=0)  # an 8-bit scale may tip over at a tie
    for row, choice in zip(ours, CHOICES, strict=True):
        (alone,) = logits_of(model, Through(config, context_steps), [choice])
        torch.testing.assert_close(row, alone, atol=1e-3, rtol=0)


def test_full_precision_is_the_model(tiny_llama):
    model = tiny_llama(layers=2)
    for through in (Through(), Through(context_steps=None), Through(steps=True)):
        for row, choice in zip(logits_of(model, through), CHOICES, strict=True):
            full = model(torch.tensor([[*CONTEXT, *choice]])).logits[0, len(CONTEXT) - 1 : -1]
            torch.testing.assert_close(row, full, atol=1e-4, rtol=1e-4)


def test_which_tokens_are_steps_decides_what_is_measured(tiny_llama):
    """The first token: the prefill's own if the context is one prompt, else predicted from the cache."""
    model = tiny_llama(layers=2)
    full, *_ = logits_of(model, Through())
    prompt, last, all_steps = (logits_of(model, Through(SHORT, n))[0] for n in (0, 1, None))
    assert float((prompt[0] - full[0]).abs().max()) < 1e-5 < 0.01 < float((last[0] - full[0]).abs().max())
    assert float((prompt[1] - full[1]).abs().max()) > 0.01
    assert float((all_steps[0] - last[0]).abs().max()) > 0.01


def test_share_of_tokens_read_quantized(tiny_llama):
    """Blocks of 16 keys are quantized at once, values once 16 more are there."""
    share = Share()
    logits_of(tiny_llama(layers=2), Through(SHORT), [[5, 6]], share)
    by_hand = [(48 / n + (n - 16) / n) / 2 for n in (59, 60)]
    assert share.mean == pytest.approx(sum(by_hand) / 2)
    none = Share()
    logits_of(tiny_llama(layers=2), Through(XQuantConfig()), [[5, 6]], none)
    assert none.mean == 0.0
    logits_of(tiny_llama(layers=2), Through(), [[5, 6]], full := Share())
    assert full.mean is None


def test_sinks_are_not_quantized(tiny_llama):
    cache = XQuantCache(tiny_llama(layers=1).config, max_cache_len=99, config=SHORT.replace(sink_tokens=4))
    cache.update(*torch.randn(2, 1, 2, 40, 16).unbind(), 0)
    keys, values = (state.spec for state in cache.states)
    stored = torch.tensor([3, 15, 16, 40])
    assert quantized(keys, stored).tolist() == [0, 0, 12, 28]
    assert quantized(values, stored).tolist() == [0, 0, 0, 20]


def test_arguments_are_checked(tiny_llama):
    with pytest.raises(ArgumentError, match="context_steps must be None or at least 0, got -1"):
        Through(context_steps=-1)
    for context, choices in (([], [[1]]), ([1], []), ([1], [[1], []])):
        with pytest.raises(ArgumentError, match="must hold a token or more"):
            continuation_logits(tiny_llama(layers=1), context, choices, Through(), Share())


def by_hand(model, context: int, new: int, config) -> list[int]:
    """Prefill, a chunk, then steps: each one call of the model."""
    cache = XQuantCache(model.config, max_cache_len=200, config=config)
    pieces = [CONTEXT[:context], CONTEXT[context:-1], CONTEXT[-1:]]
    written: list[int] = []
    for piece in filter(None, pieces):
        logits = model(torch.tensor([piece]), past_key_values=cache).logits
    for _ in range(new):
        written.append(int(logits[0, -1].argmax()))
        logits = model(torch.tensor([written[-1:]]), past_key_values=cache).logits
    return written


@pytest.mark.parametrize("context", [30, 59])
@torch.no_grad()
def test_answers_are_greedy_decoding(tiny_llama, context):
    model = tiny_llama(layers=2)
    answer = write_answer(model, CONTEXT, context, SHORT, 12)
    assert answer.ids == by_hand(model, context, 12, SHORT)
    assert 0 < answer.compression_ratio < nominal_ratio(model, SHORT) < 1
    assert 0.5 < answer.quantized < 1
    full = write_answer(model, CONTEXT, context, None, 12)
    ids = torch.tensor([CONTEXT])
    assert full.ids == model.generate(ids, max_new_tokens=12, do_sample=False)[0, 60:].tolist()
    assert full[1:] == (0.0, 0.0)
    assert answer.ids != full.ids


def test_answers_end(tiny_llama):
    model = tiny_llama(layers=2)
    first, second, *_ = write_answer(model, CONTEXT, 30, SHORT, 12).ids
    assert write_answer(model, CONTEXT, 30, SHORT, 12, end=[second]).ids == [first, second]
    assert write_answer(model, CONTEXT, 30, SHORT, 12, end=[first]).ids[0] != first


@pytest.mark.slow
def test_compiled_answers(tiny_llama):
    model = tiny_llama(layers=2)
    with compiling(model):
        compiled = write_answer(model, CONTEXT, 30, SHORT, 6)
    assert torch._dynamo.utils.counters["xquant"]["fuse_decode"] > 0
    assert model._compiled_call_impl is None
    assert compiled == write_answer(model, CONTEXT, 30, SHORT, 6)
