"""Layers that hold more than keys and values: an indexer's keys (sparse attention), states of linear attention."""

from __future__ import annotations

import pytest
import torch
from dynamo_graphs import tiny
from stepping import interpreted, logits_of, relative_error, run_steps
from transformers import CONFIG_MAPPING, StaticCache

from xquant_fx import CacheStateError, XQuantCache, XQuantConfig, warn_once
from xquant_fx.cache.growing import STORED_KV

IDS = torch.randint(3, 64, (3, 48), generator=torch.Generator().manual_seed(3))
SMALL = dict(k_group_size=8, residual_length=8, rollback_tokens=8)
FULL = XQuantConfig(k_bits=16, v_bits=16, **SMALL)
LOW = XQuantConfig(k_bits=4, v_bits=4, **SMALL)
BOTH = ("deepseek_v32", "falcon_h1")


def skip_unknown(name: str) -> None:
    if name not in CONFIG_MAPPING:
        pytest.skip(f"no {name} in this transformers")


@pytest.fixture(params=[pytest.param(BOTH[0], marks=pytest.mark.slow), BOTH[1]])  # test_conformance.py has the first
def model(request):
    skip_unknown(request.param)
    return tiny(request.param)


def new(model, config=FULL):
    return XQuantCache(model.config, 64, config)


def steps(model, cache, ids=IDS, sizes=(20, 1, 1, 1)):
    return run_steps([(model.forward, size) for size in sizes], ids, cache)


def test_the_config_of_the_cache_is_what_is_stored(model):
    """Uncompiled, and rewritten: not the backend's own, as where such layers are taken over. An indexer's keys, which
    stay, are no fault."""
    calls = []
    whole = steps(model, StaticCache(model.config, max_cache_len=64), sizes=(20, *[1] * 13))
    # Of few bits two groups are quantized behind the prompt, of 16 none.
    for config, eager, low, high in ((FULL, 1, 0, 1e-6), (LOW, 9, 1e-4, 0.3)):
        cache, compiled, expected = new(model, config), new(model, config), whole[:, : 24 + eager]
        assert low <= relative_error(steps(model, cache, sizes=(20, *[1] * (4 + eager))), expected) <= high
        step = torch.compile(model.forward, backend=interpreted(calls, strict=True), dynamic=False)
        got = run_steps([(model.forward, 20), *[(model.forward, 1)] * eager, *[(step, 1)] * 4], IDS, compiled)
        assert low <= relative_error(got, expected) <= high
        assert all(isinstance(t, STORED_KV) for layer in compiled.layers for t in (layer.keys, layer.values))
    assert len(calls) == 2, "one graph of each config"


def test_reset_reorder_select_fork_and_move(model):
    ids, rows = IDS, torch.tensor([2, 0, 0])
    cache = new(model)
    first = steps(model, cache)
    cache.reset()
    assert torch.equal(steps(model, cache), first), "something was left over"
    selected, fork = cache.fork(), cache.fork()
    cache.reorder_cache(rows)
    selected.batch_select_indices(rows)
    selected.to("cpu")
    expected = logits_of(model, ids[:, 30:31], fork)
    for each in (cache, selected):
        assert relative_error(logits_of(model, ids[rows, 30:31], each), expected[rows]) < 1e-6


def test_an_indexer_rolls_back():
    skip_unknown("deepseek_v32")
    model = tiny("deepseek_v32")
    cache = new(model)
    steps(model, cache)
    expected = logits_of(model, IDS[:, 23:27], cache)
    cache.crop(-4)
    assert relative_error(logits_of(model, IDS[:, 23:27], cache), expected) < 1e-6


def test_states_do_not_roll_back():
    skip_unknown("falcon_h1")
    model = tiny("falcon_h1")
    cache = new(model)
    steps(model, cache)
    with pytest.raises(CacheStateError, match=r"cannot be in.*XQuantHybridLayer"):
        cache.crop(-1)


def test_it_is_not_saved_without_what_it_holds_besides(model):
    cache = new(model)
    steps(model, cache)
    with pytest.raises(CacheStateError, match="only static layers of keys and values can be saved"):
        cache.state_dict()


def test_a_model_that_takes_the_buffer_for_the_text_is_told_of(caplog: pytest.LogCaptureFixture) -> None:
    """GPT-Neo cuts its masks by the length of the buffer: wrong with every cache of fixed length."""
    warn_once.forget()
    for name, told in (("gpt_neo", 1), ("gpt_neo", 1), ("llama", 1)):
        XQuantCache(CONFIG_MAPPING[name](), 64, config=FULL)
        assert sum("takes the length of a cache for that of its text" in text for text in caplog.messages) == told
