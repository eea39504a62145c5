"""Sliding windows of caches that grow by concatenation: what ``generate()`` makes of Mistral or Gemma by itself."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
from fast_and_slow import fast_but
from rewrites import Rewrites, count
from states import layers_of
from stepping import interpreted
from test_sliding_windows import FULL, LOW, WINDOW, close, ids_of, model_of
from torch import Tensor
from torch._dynamo.utils import counters
from transformers import DynamicCache

from xquant_fx import CacheStateError, XQuantCache, XQuantConfig, explain, memory_report, ops
from xquant_fx.cache.growing import GrowingKV
from xquant_fx.cache.growth import Growth
from xquant_fx.cache.state import KVState
from xquant_fx.plan.plan import make_plan

sdpa = torch.nn.functional.scaled_dot_product_attention
KEPT = WINDOW - 1
LIFE = [36, 1, 1, 1, 1, 465, 1, 1]


def compiled(model: Any, **options: Any) -> Any:
    torch._dynamo.reset()
    counters.clear()
    return torch.compile(model.forward, backend=interpreted(strict=True, **options))


@torch.no_grad()
def run(step: Any, cache: Any, ids: Tensor, sizes: list[int]) -> Tensor:
    """Logits [B, T, V] of steps of these numbers of tokens."""
    parts = ids[:, : sum(sizes)].split(sizes, 1)
    return torch.cat([step(part, past_key_values=cache).logits for part in parts], 1)


@torch.no_grad()
def whole(model: Any, ids: Tensor) -> Tensor:
    return model(ids).logits


def test_as_an_xquant_cache() -> None:
    """The same codes, from a prompt shorter than the window until positions are past the room that there was."""
    model, ids = model_of("Mistral", num_hidden_layers=1), ids_of(1, sum(LIFE))
    cache = DynamicCache(config=model.config)
    got = run(compiled(model, config=LOW, self_check=False), cache, ids, LIFE)
    assert close(got, run(model, XQuantCache(model.config, 1024, LOW), ids, LIFE))
    keys = cache.layers[0].keys
    assert (keys.shape[2], keys.end, keys.spec.shape[2]) == (KEPT, sum(LIFE), 4096)
    assert keys.spec.stored_tokens < 200 and keys.spec.wraps
    assert counters["xquant"]["fuse_decode"] >= 3 and counters["stats"]["unique_graphs"] <= 7
    assert memory_report(cache).full_bytes == 2 * 2 * 8 * 4 * WINDOW


def test_taken_over_from_eager_code_and_continued_by_it() -> None:
    """A cache that eager code filled begins where its window does; uncompiled steps go on with the codes."""
    model, ids = model_of("Gemma3Text"), ids_of(1, 134)
    cache, step = DynamicCache(config=model.config), compiled(model, config=FULL)
    got = [run(model, cache, ids, [100])]
    for at, (by, sizes) in enumerate([(step, [1, 9]), (model, [1, 12, 1]), (step, [1, 9])]):
        got.append(run(by, cache, ids[:, sum(part.shape[1] for part in got) :], sizes))
        assert all(isinstance(layer.keys, GrowingKV) for layer in cache.layers), at
    assert close(torch.cat(got, 1), whole(model, ids))


@pytest.mark.slow
def test_generate_in_all_its_ways() -> None:
    plain = model_of("Gemma3Text")
    model = copy.deepcopy(plain)
    model.compile(backend=interpreted(config=FULL, self_check=False))
    ids, mask = ids_of(2, 60), torch.ones(2, 60, dtype=torch.int64)
    ids[1, :33], mask[1, :33] = 0, 0
    again = ids_of(1, 15).repeat(1, 4)  # which prompt lookup finds drafts in
    for prompt, more in (
        (ids, dict(attention_mask=mask, num_beams=2)),
        (again, dict(prompt_lookup_num_tokens=4)),
    ):
        torch._dynamo.reset()
        settings: dict[str, Any] = dict(max_new_tokens=8, do_sample=False, return_dict_in_generate=True, **more)
        got, want = (m.generate(prompt, **settings) for m in (model, plain))
        assert torch.equal(got.sequences, want.sequences)
        assert all(isinstance(layer.keys, GrowingKV) for layer in got.past_key_values.layers)


def attend(q: Tensor, k: Tensor, v: Tensor, past: Any, keep: int = KEPT) -> Any:
    k, v = torch.cat((past[0], k), dim=2), torch.cat((past[1], v), dim=2)
    return sdpa(q, k, v), (k[:, :, -keep:], v[:, :, -keep:])


@pytest.mark.parametrize("new", [1, pytest.param(3, marks=pytest.mark.slow), 12])
def test_all_that_is_kept_is_seen_without_a_mask(new: int) -> None:
    """By each query of a step: what the last one's window would leave out, too."""
    eight = XQuantConfig.preset("kivi-4").replace(k_bits=8, v_bits=8, residual_length=16, k_group_size=8)
    seen = Rewrites(config=eight.replace(sliding_windows=True))
    step, x = torch.compile(attend, backend=seen, dynamic=False), torch.randn(1, 2, 120, 16)
    nothing = torch.zeros(1, 2, 0, 16)
    with torch.no_grad():
        _, past = step(*[x[:, :, :60]] * 3, (nothing, nothing))
        _, theirs = attend(*[x[:, :, :60]] * 3, (nothing, nothing))
        for at in range(60, 60 + 4 * new, new):
            part = x[:, :, at : at + new]
            out, past = step(part, part, part, past)
            want, theirs = attend(part, part, part, theirs)
            assert all(isinstance(t, GrowingKV) and t.shape[2] == KEPT for t in past)
            torch.testing.assert_close(out, want, rtol=0, atol=0.03)
    assert count(seen.made[-1], ops.DECODE) == 1 and past[0].spec.wraps


def window() -> tuple[GrowingKV, Tensor]:
    """The last 39 of 150 tokens at 16 bits, and all."""
    like = layers_of(FULL, (1, 2, 512, 16), torch.float32)[0][0]
    state = KVState(dataclasses.replace(like.spec, window=WINDOW), like.group)
    x = torch.randn(1, 2, 200, 16, generator=torch.Generator().manual_seed(0))
    k = torch.cat([GrowingKV.of(Growth(state)), x[:, :, :150]], dim=2)
    assert isinstance(k, GrowingKV) and torch.equal(k + 0, x[:, :, :150])  # a prompt attends to itself
    return k[:, :, -KEPT:], x


def test_the_last_tokens_stay_codes() -> None:
    k, x = window()
    assert isinstance(k, GrowingKV) and (k.begin, k.end) == (111, 150)
    copied = copy.deepcopy(k)
    for _ in range(2):
        longer = torch.cat([k, x[:, :, 150:170]], dim=2)
        assert torch.equal(longer + 0, x[:, :, 111:170])
        k = longer[:, :, -KEPT - 20 : -20]  # as crop() does it
        assert isinstance(k, GrowingKV) and torch.equal(k + 0, x[:, :, 111:150])
    rows = copied[torch.tensor([0, 0])]
    assert isinstance(rows, GrowingKV) and torch.equal((rows + 0)[1:], x[:, :, 111:150])


#: While the window fills, over the end of a group, when it is full, and behind that.
AFTER_WHICH_STEPS_FAIL = {*range(35, 46), 50, 55, *range(58, 74)}


@pytest.mark.parametrize("new", fast_but([1, 5, 8], [1, 5]))
@torch._dynamo.config.patch(recompile_limit=32)
@torch.no_grad()
def test_what_a_step_stored_that_failed_is_taken_back(new: int) -> None:
    """It may have quantized a group by then; the cache goes on from the tensors that the program holds."""
    torch._dynamo.reset()
    model, ids = model_of("Gemma3Text"), ids_of(1, 80)

    def call(ids: Tensor, cache: DynamicCache, at: Tensor) -> Tensor:
        return model(ids, past_key_values=cache).logits.index_select(2, at)

    step = torch.compile(call, backend=interpreted(config=LOW, self_check=False))
    every, outs = torch.arange(8), []
    for fails in (False, True):
        cache, parts = DynamicCache(config=model.config), []
        for begin, end in [(0, 20), *((t, t + 1) for t in range(20, 64)), (64, 64 + new), (64 + new, 65 + new)]:
            parts.append(step(ids[:, begin:end], cache, every))
            if fails and end in AFTER_WHICH_STEPS_FAIL:
                with pytest.raises((IndexError, RuntimeError)):
                    step(ids[:, :new], cache, every + 1000)
                assert cache.get_seq_length(0) == cache.get_seq_length(1) == end
        outs.append(torch.cat(parts, 1))
    assert torch.equal(*outs)


def test_tokens_that_left_the_window_raise() -> None:
    k, x = window()
    longer = torch.cat([k, x[:, :, 150:]], dim=2)
    torch.cat([longer[:, :, -KEPT:], x[:, :, :1]], dim=2)
    with pytest.raises(CacheStateError, match="begins at token 111, and of a window of 40 tokens only those from 142"):
        longer + 0
    with pytest.raises(CacheStateError, match="at most 20 tokens can be rolled back"):
        torch.cat([k, x[:, :, :1]], dim=2)


@pytest.mark.parametrize(
    ("config", "why"),
    [
        (
            LOW.replace(residual_length=32),
            "window or buffer of 40 tokens is within the residual window, which holds 52",
        ),
        (LOW.replace(sliding_windows="auto"), "window or buffer of 40 tokens is shorter than 4 residual windows"),
        (LOW.replace(sliding_windows=False), "sliding_windows of the config is False"),
        (make_plan(LOW, 1), "the plan is for 1 layers, those of full attention"),
    ],
)
def test_windows_that_stay(config: Any, why: str) -> None:
    model, ids = model_of("Gemma3Text"), ids_of(1, 21)
    cache = DynamicCache(config=model.config)
    found = explain(model, ids, past_key_values=cache, options={"config": config}, strict="within" in why)
    assert [site.rewritten for site in found.sites] == [False, True] and found.sites[0].reason == why


def test_windows_that_stay_beside_codes() -> None:
    """The full-attention layer alone is quantized, from the prompt on."""
    model, ids = model_of("Gemma3Text"), ids_of(1, 100)
    step = torch.compile(
        model.forward, backend=interpreted(config=FULL.replace(sliding_windows=False), self_check=False)
    )
    torch._dynamo.reset()
    cache = DynamicCache(config=model.config)
    assert close(run(step, cache, ids, [60, *[1] * 4]), whole(model, ids[:, :64]))
    assert [isinstance(layer.keys, GrowingKV) for layer in cache.layers] == [False, True]


@pytest.mark.slow
@pytest.mark.parametrize("config", [FULL, LOW], ids=["16 bits", "2 bits"])
@torch.no_grad()
def test_lengths_that_are_one_number_under_two_names(config: XQuantConfig) -> None:
    """By Inductor: one of the names is a size of the past, which the rewritten graph has no more."""
    model, ids = model_of("Gemma2", num_hidden_layers=2), ids_of(2, WINDOW // 2)
    more = dict(max_new_tokens=3, do_sample=False)
    expected = model.generate(ids, **more)
    torch._dynamo.reset()
    model.compile(backend="xquant", options={"config": config})
    got = model.generate(ids, **more)
    assert got.shape == expected.shape and (config is LOW or torch.equal(got, expected))
