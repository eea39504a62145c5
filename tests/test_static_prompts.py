"""First prompts of ``StaticCache``s are not traced: a step takes the caches over, and knows the prompts' queries."""

from __future__ import annotations

import copy
import weakref
from typing import Any

import pytest
import torch
from stepping import relative_error
from test_later_prompts import OPTIONS, Run, graphs, ids_of, one
from test_sliding_windows import LOW, WINDOW, model_of
from torch import Tensor
from transformers import StaticCache

from xquant_fx import XQuantCache, XQuantConfig
from xquant_fx.cache.kv_tensor import QuantizedKV
from xquant_fx.cache.queries import noted
from xquant_fx.compiler import new_caches, untraced

CONFIG = XQuantConfig.preset("xquant-2.2").replace(k_group_size=4, residual_length=4)


@pytest.fixture(autouse=True)
def own_backends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(untraced, "_backends", [])
    monkeypatch.setattr(untraced, "_misjudged", weakref.WeakSet())


@pytest.fixture
def run() -> Run:
    return Run()


def new(run: Run, room: int = 64) -> StaticCache:
    return StaticCache(run.model.config, max_cache_len=room)


def is_quantized(cache: Any) -> bool:
    return all(isinstance(layer.keys, QuantizedKV) for layer in cache.layers)


def test_steps_alone_are_traced(run: Run) -> None:
    """One takes the cache over, all others serve it, whatever prompts come; and a reset cache's, too."""
    expected = {0: 2, 1: 2, 2: 2}
    for times, tokens in enumerate((20, 11, 30)):
        cache = new(run)
        run(ids_of(tokens), cache)
        assert type(cache.layers[0].keys) is Tensor and graphs() == (2 if times else 0)
        run(one(), cache), run(one(), cache)
        assert is_quantized(cache) and graphs() == expected[times]
    cache.reset()
    run(ids_of(25), cache), run(one(), cache)
    assert graphs() == 2 and is_quantized(cache) and int(cache.get_seq_length()) == 26


@pytest.mark.parametrize("change", ["none", "copied"])
def test_channels_are_ranked_by_the_queries_of_the_prompt(run: Run, change: str) -> None:
    """As those of an ``XQuantCache``: which sees them as it stores the prompt."""
    ids = ids_of(40)
    mine, theirs = new(run), XQuantCache(run.model.config, 64, CONFIG)
    outs = []
    for cache in (mine, theirs):
        logits = run(ids, cache)
        if change == "copied" and cache is mine:
            mine = cache = copy.deepcopy(mine)
        outs.append(torch.cat([logits, run(one(), cache), run(one(), cache)], 1))
    assert relative_error(*outs) < 1e-5
    for index, layer in enumerate(mine.layers):
        ours, other = layer.keys.live.owned, theirs.layers[index].keys.live.owned
        assert bool(ours["energy"].any())
        assert torch.allclose(ours["energy"], other["energy"], rtol=1e-5)
        assert all(torch.equal(ours[name], other[name]) for name in ("order", "codes"))


def test_what_is_noted(run: Run) -> None:
    """The mean square of the queries of each channel, over tokens and the heads of a KV head."""
    cache, seen = new(run), []
    attention = run.model.model.layers[1].self_attn
    attention.q_proj.register_forward_hook(lambda module, args, out: seen.append(out))
    run.model.model.rotary_emb.register_forward_hook(
        lambda module, args, out: tuple(torch.full_like(x, float(i == 0)) for i, x in enumerate(out))
    )  # no rotation: queries are what they are projected to
    run(ids_of(20), cache)
    q = seen[0].unflatten(-1, (4, 8)).double()
    expected = q.square().mean(1).unflatten(1, (2, 2)).mean(2)
    assert relative_error(noted(cache.layers[1].keys), expected) < 1e-6
    run(ids_of(9), other := new(run))
    assert noted(other.layers[1].keys) is None  # too few to say anything
    assert noted(cache.layers[1].keys.repeat(2, 1, 1, 1)) is None


def test_caches_that_stay_in_full_precision_have_compiled_prompts(run: Run) -> None:
    """From the second one on: behind the first it was seen that no step takes them over."""
    run.model.double()
    for times in range(2):
        cache, before = new(run), graphs()
        run(ids_of(20 + times), cache)
        assert (graphs() > before) == bool(times)
        run(one(), cache), run(one(), cache)
        assert type(cache.layers[0].keys) is Tensor


def test_gradients_and_loops_are_traced(run: Run) -> None:
    run.call(ids_of(12), past_key_values=new(run))
    assert graphs() == 1

    def loop(ids: Tensor, past_key_values: Any) -> Tensor:
        run.model(ids, past_key_values=past_key_values)
        return run.model(one(), past_key_values=past_key_values).logits

    call = torch.compile(loop, backend=run.backend)
    with torch.no_grad():
        for is_traced in (False, True):
            before, cache = graphs(), new(run)
            call(ids_of(20), cache)
            assert int(cache.get_seq_length()) == 21 and (graphs() > before) == is_traced


def test_layers_are_their_own_again(run: Run) -> None:
    cache = new(run)
    with pytest.raises(IndexError):
        run(ids_of(5) + 1000, cache)
    assert all("update" not in vars(layer) for layer in cache.layers)
    run(ids_of(5), cache)
    assert all("update" not in vars(layer) for layer in cache.layers) and not graphs()


def test_windows() -> None:
    """That are full behind the prompt, or not: the prompt is that of an uncompiled cache, and steps go on from it."""
    model = model_of("Gemma3Text")
    run = Run(model, config=LOW)
    for tokens in (WINDOW + 9, WINDOW // 2):
        cache, plain, before = new(run, 256), new(run, 256), graphs()
        out = run(ids_of(tokens), cache)
        assert graphs() == before
        with torch.no_grad():
            assert torch.equal(out, model(ids_of(tokens), past_key_values=plain).logits)
            expected = model(one(), past_key_values=plain).logits
        assert relative_error(run(one(), cache), expected) < 0.1
        assert isinstance(cache.layers[1].keys, QuantizedKV) and int(cache.get_seq_length()) == tokens + 1


def test_a_cache_is_looked_at_once(run: Run) -> None:
    cache = new(run)
    run(ids_of(20), cache)
    assert cache in new_caches._untouched
    run(one(), cache)
    assert cache not in new_caches._untouched and run.call not in new_caches._compiling


assert OPTIONS["residual_length"] == CONFIG.residual_length  # the caches compared are of one format
