"""First prompts of ``StaticCache``s are not traced: a step takes the caches over, and knows the prompts' queries."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from stepping import relative_error
from test_later_prompts import OPTIONS, Run, graphs, ids_of, one
from test_sliding_windows import LOW, WINDOW, model_of
from test_untraced import own_backends  # noqa: F401 - a fixture of all tests here
from torch import Tensor
from transformers import AttentionMaskInterface, StaticCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from xquant_fx import XQuantCache, XQuantConfig
from xquant_fx.cache.kv_tensor import QuantizedKV
from xquant_fx.cache.queries import take_note
from xquant_fx.compiler import new_caches

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import tiny_models

CONFIG = XQuantConfig.preset("xquant-2.2").replace(k_group_size=4, residual_length=4)


@pytest.fixture
def run() -> Run:
    return Run()


def new(run: Run, room: int = 64) -> StaticCache:
    return StaticCache(run.model.config, max_cache_len=room)


def is_quantized(cache: Any) -> bool:
    return all(isinstance(layer.keys, QuantizedKV) for layer in cache.layers)


def test_steps_alone_are_traced(run: Run) -> None:
    """One serves all caches, whatever prompts come; and a reset cache, too."""
    for times, tokens in enumerate((20, 11, 30)):
        cache = new(run)
        run(ids_of(tokens), cache)
        assert is_quantized(cache) == bool(times) and graphs() == (1 if times else 0)
        run(one(), cache), run(one(), cache)
        assert is_quantized(cache) and graphs() == 1
    cache.reset()
    run(ids_of(25), cache), run(one(), cache)
    assert graphs() == 1 and is_quantized(cache) and int(cache.get_seq_length()) == 26


@pytest.mark.parametrize("change", ["none", "copied", "known"])
def test_channels_are_ranked_by_the_queries_of_the_prompt(run: Run, change: str) -> None:
    """As those of an ``XQuantCache``: which sees them as it stores the prompt."""
    ids = ids_of(40)
    if change == "known":  # and the prompt is stored like that
        run(ids_of(20), other := new(run)), run(one(), other)
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


def test_other_lengths_are_taken_over_once(run: Run) -> None:
    """What is known is for caches of one length, of any dtype."""
    run(ids_of(20), cache := new(run)), run(one(), cache)
    run(ids_of(20), cache := new(run, 48))
    assert type(cache.layers[0].keys) is Tensor
    run(one(), cache)
    assert is_quantized(cache)
    run(ids_of(20), cache := new(run, 48))
    assert is_quantized(cache)
    run.model.bfloat16()
    out = run(ids_of(20), cache := new(run, 48))
    assert is_quantized(cache) and cache.layers[0].keys.dtype == torch.bfloat16
    assert not any({"update", "get_mask_sizes"} & vars(layer).keys() for layer in cache.layers)
    with torch.no_grad():
        assert relative_error(out, run.model(ids_of(20), past_key_values=new(run, 48)).logits) < 0.02


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("padding", [0, 5])
def test_later_prompts_attend_as_uncompiled_ones(attention: str, padding: int) -> None:
    run = Run()
    run.model.set_attn_implementation(attention)
    run(ids_of(20), cache := new(run)), run(one(), cache)
    mask = torch.ones(2, 30, dtype=torch.long)
    mask[0, :padding] = 0
    more = dict(attention_mask=mask) if padding else {}
    out = run(ids_of(30, 2), cache := new(run), **more)
    assert is_quantized(cache)
    with torch.no_grad():
        expected = run.model(ids_of(30, 2), past_key_values=new(run), **more).logits
    assert relative_error(out[:, padding:], expected[:, padding:]) < 1e-6


def test_a_prompt_without_room_is_refused_as_by_any_static_cache(run: Run) -> None:
    run(ids_of(20), cache := new(run)), run(one(), cache)
    for times in range(2):
        cache = new(run)
        with pytest.raises((IndexError, RuntimeError)):
            run(ids_of(70), cache)
        run(ids_of(20), cache := new(run))
        assert is_quantized(cache) or not times


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
    noted = take_note(*[cache.layers[1].keys] * 2)
    assert noted is not None and relative_error(noted, expected) < 1e-6
    assert take_note(*[cache.layers[1].keys] * 2) is None  # once
    run(ids_of(9), other := new(run))
    assert take_note(*[other.layers[1].keys] * 2) is None  # too few to say anything


@torch.no_grad()
def test_notes_of_another_text_are_not_taken(run: Run) -> None:
    """The cache was emptied, and uncompiled code filled it again."""
    run(ids_of(30), cache := new(run))
    cache.reset()
    run.model(ids_of(40, seed=3), past_key_values=cache)
    run(one(), cache)
    assert is_quantized(cache) and not cache.layers[0].keys.live.owned["energy"].any()


def test_who_keeps_the_keys_that_attention_got_keeps_nothing_of_the_buffers(run: Run) -> None:
    kept = []

    def keeping(module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        if query.shape[2] > 1:
            kept.append((key, value))
        return sdpa_attention_forward(module, query, key, value, *args, **kwargs)

    ALL_ATTENTION_FUNCTIONS.register("keeping", keeping)
    AttentionMaskInterface.register("keeping", sdpa_mask)
    run.model.set_attn_implementation("keeping")
    run(ids_of(20), cache := new(run))
    assert len(kept) == 2
    run(one(), cache)
    assert is_quantized(cache)


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
            assert relative_error(out, model(ids_of(tokens), past_key_values=plain).logits) < 1e-5
            expected = model(one(), past_key_values=plain).logits
        assert relative_error(run(one(), cache), expected) < 0.1
        assert isinstance(cache.layers[1].keys, QuantizedKV) and int(cache.get_seq_length()) == tokens + 1


def test_a_cache_is_looked_at_once(run: Run) -> None:
    cache = new(run)
    run(ids_of(20), cache)
    assert cache in new_caches._untouched
    run(one(), cache)
    assert cache not in new_caches._untouched


def test_prompts_without_steps_are_compiled_in_the_end(run: Run) -> None:
    """Scores of texts, say."""
    made = []
    for tokens in range(20, 24 + new_caches.MANY_PROMPTS):
        run(ids_of(tokens), new(run))
        made.append(graphs())
    assert made[: new_caches.MANY_PROMPTS] == [0] * new_caches.MANY_PROMPTS and made[-1]


@torch.no_grad()
def test_what_leaves_the_cache_alone_is_compiled_from_the_second_call_on(run: Run) -> None:
    """And prompts of other caches are still not traced."""

    def either(x: Tensor | None, cache: Any, ids: Tensor | None = None) -> Tensor:
        return run.model(ids, past_key_values=cache).logits if x is None else x * 2

    call = torch.compile(either, backend=run.backend)
    for is_traced in (False, True):
        before = graphs()
        call(torch.ones(1, 12, 4), new(run))
        assert (graphs() > before) == is_traced
    before = graphs()
    call(None, XQuantCache(run.model.config, 64, CONFIG), ids_of(20))
    assert graphs() == before


def test_calls_in_an_exception_handler_count(run: Run) -> None:
    try:
        raise KeyError("on purpose")
    except KeyError:
        run(ids_of(20), cache := new(run)), run(one(), cache)
    run(ids_of(20), cache := new(run))
    assert is_quantized(cache)


def test_layers_that_read_anothers_keys() -> None:
    """As half of Gemma 3n's do: they store nothing."""
    small = dict(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, num_kv_shared_layers=2, layer_types=["full_attention"] * 4,
        hidden_size_per_layer_input=8, vocab_size_per_layer_input=64, laurel_rank=4, altup_num_inputs=2,
        activation_sparsity_pattern=[0.0] * 4, max_position_embeddings=256, pad_token_id=0, bos_token_id=1,
        eos_token_id=2,
    )  # fmt: skip
    run = Run(transformers.Gemma3nForCausalLM(transformers.Gemma3nTextConfig(**small)).eval(), **OPTIONS)
    for times in range(2):
        run(ids_of(20), cache := new(run))
        assert graphs() == times
        run(one(), cache), run(one(), cache)
    assert all(isinstance(layer.keys, QuantizedKV) for layer in cache.layers[:2])


def test_layers_that_keep_more_than_keys_and_values_are_traced() -> None:
    """Indexers of DeepSeek V3.2: their masks are as long as what they keep."""
    run = Run(tiny_models.build("deepseek_v32"), preset="full")
    for times in range(2):
        ids = ids_of(20 + times)
        out = run(ids, cache := new(run))
        assert graphs() > times
        with torch.no_grad():
            assert relative_error(out, run.model(ids, past_key_values=new(run)).logits) < 1e-5
        run(one(), cache)
        assert is_quantized(cache)


assert OPTIONS["residual_length"] == CONFIG.residual_length  # the caches compared are of one format
