"""Sliding windows in an XQuantCache: what the window sees, exactly at 16 bits, over a cache's whole life."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from stepping import interpreted
from torch import Tensor

from xquant_fx import CacheStateError, ConfigError, XQuantCache, XQuantConfig, explain, memory_report
from xquant_fx.cache.huggingface_layer import XQuantLayer
from xquant_fx.plan.plan import make_plan

WINDOW, LENGTH = 40, 320
BASE: dict[str, Any] = dict(
    vocab_size=128, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, max_position_embeddings=1024, initializer_range=0.15, sliding_window=WINDOW,
    pad_token_id=0, bos_token_id=None, eos_token_id=None,
)  # fmt: skip
MIXED = dict(layer_types=["sliding_attention", "full_attention"])
MODELS: dict[str, dict[str, Any]] = {
    "Gemma2": dict(query_pre_attn_scalar=8, **MIXED),
    "Gemma3Text": MIXED,
    "Mistral": {},
    "GptOss": dict(num_local_experts=2, num_experts_per_tok=1, **MIXED),
    "Phi3": {},
    "Cohere2": MIXED,
}
SMALL = dict(k_group_size=8, residual_length=16, sliding_windows=True)
FULL = XQuantConfig(k_bits=16, v_bits=16, **SMALL)
LOW = XQuantConfig(k_bits=2, v_bits=2, **SMALL)


def model_of(name: str, **more: Any) -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**{**BASE, **MODELS.get(name, {}), **more})
    model = getattr(transformers, f"{name.removesuffix('Text')}ForCausalLM")(config).eval()
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    return model


def ids_of(batch: int = 2, tokens: int = 300) -> Tensor:
    return torch.randint(3, 128, (batch, tokens), generator=torch.Generator().manual_seed(1))


def cache_of(model: Any, config: XQuantConfig = FULL, **more: Any) -> XQuantCache:
    return XQuantCache(model.config, LENGTH, config=config, **more)


@torch.no_grad()
def steps(model: Any, cache: Any, ids: Tensor, sizes: list[int], step: Any = None, **more: Any) -> Tensor:
    """Logits [B, T, V] of steps of these numbers of tokens, the first by the model itself."""
    out, past = [], 0
    for size in sizes:
        call = model if past == 0 or step is None else step
        out.append(call(ids[:, past : past + size], past_key_values=cache, **more).logits)
        past += size
    return torch.cat(out, 1)


def close(got: Tensor, want: Tensor) -> bool:
    return float((got - want).norm() / want.norm()) < 1e-4


@pytest.mark.parametrize("prompt", [20, 130])
@pytest.mark.parametrize("name", MODELS)
def test_sixteen_bits_are_exact(name: str, prompt: int) -> None:
    """Prompts shorter and longer than the window, steps and chunks, until what is stored has started over twice."""
    model, ids = model_of(name), ids_of()
    cache = cache_of(model)
    got = steps(model, cache, ids, [prompt, 1, 5, 8, 1, 30, 64, 1, 1, 60])
    with torch.no_grad():
        assert close(got, model(ids[:, : got.shape[1]]).logits)
    assert all(isinstance(layer, XQuantLayer) for layer in cache.layers)
    assert any(state.spec.wraps for state in cache.states)


@pytest.mark.parametrize("config", [LOW, XQuantConfig.preset("xquant").replace(**SMALL)], ids=["ranked", "xquant"])
def test_codes_are_those_of_a_cache_that_forgets_nothing(config: XQuantConfig) -> None:
    model, ids = model_of("Mistral"), ids_of()
    seen = []
    for keep in (False, True):
        cache = cache_of(model, config)
        for layer in cache.quantized_layers if keep else []:
            layer.keep_all(cache.plan)  # type: ignore[arg-type]
        seen.append(steps(model, cache, ids, [100, 1, 5, 8, 1, 30, 64, 1, 1, 60]))
        assert all(state.spec.wraps != keep for state in cache.states)
    torch.testing.assert_close(*seen, rtol=0, atol=0)


@pytest.mark.parametrize(("name", "bits"), [("Gemma3Text", FULL), pytest.param("GptOss", LOW, marks=pytest.mark.slow)])
def test_compiled_as_uncompiled(name: str, bits: XQuantConfig) -> None:
    """The rewritten graph, run op by op: fused below 16 bits."""
    model, ids = model_of(name), ids_of()
    step = torch.compile(model.forward, backend=interpreted(strict=True), dynamic=False)
    sizes = [100, *[1] * 45, 30, 1, 1]
    torch._dynamo.utils.counters.clear()
    seen = [steps(model, cache_of(model, bits), ids, sizes, f) for f in (None, step)]
    assert close(*seen)
    assert torch._dynamo.utils.counters["xquant"]["fuse_decode"] == (0 if bits is FULL else 4)


@pytest.mark.slow
@pytest.mark.usefixtures("all_traced")
@pytest.mark.parametrize("bits", [FULL, LOW], ids=["16 bits", "2 bits"])
def test_compiled_by_inductor(bits: XQuantConfig) -> None:
    model, ids = model_of("Gemma3Text"), ids_of()
    step = torch.compile(model.forward, backend="xquant", options={"strict": True})
    seen = [steps(model, cache_of(model, bits), ids, [100, *[1] * 45, 30, 1, 1], f) for f in (None, step)]
    assert close(*seen)


def test_generate_with_left_padding_beams_and_chunks_of_the_prompt() -> None:
    model = model_of("Gemma3Text")
    ids, mask = ids_of(2, 70), torch.ones(2, 70, dtype=torch.int64)
    ids[1, :33], mask[1, :33] = 0, 0
    for more in ({}, {"num_beams": 3}, {"prefill_chunk_size": 40}):
        settings: dict[str, Any] = dict(attention_mask=mask, max_new_tokens=90, do_sample=False, **more)
        want = model.generate(ids, **settings)
        assert torch.equal(want, model.generate(ids, past_key_values=cache_of(model, padding_mask=mask), **settings))


def test_reset_rollback_fork_and_rows() -> None:
    model, ids = model_of("Mistral"), ids_of()
    cache = cache_of(model)
    want = steps(model, cache_of(model), ids, [150, *[1] * 9, 40])
    for _ in range(2):
        steps(model, cache, ids, [150, *[1] * 9])
        cache.crop(-9)
        other = copy.deepcopy(cache)
        for mine in (cache, other):
            with torch.no_grad():
                got = model(ids[:, 150:199], past_key_values=mine).logits
            assert close(got, want[:, 150:])
        cache.batch_select_indices(torch.tensor([1]))
        with torch.no_grad():
            got = model(ids[1:, 199:210], past_key_values=cache).logits
            assert close(got, model(ids[1:, :210]).logits[:, 199:])
        cache.reset()


def test_what_left_the_window_cannot_be_taken_back() -> None:
    model = model_of("Gemma3Text")
    cache = cache_of(model)
    steps(model, cache, ids_of(), [150, 1])
    with pytest.raises(CacheStateError, match=r"at most 20 tokens.*overwritten by what followed the window"):
        cache.crop(-21)
    assert cache.get_seq_length() == 151
    cache.crop(-20)


def test_saved_and_loaded() -> None:
    model, ids = model_of("Gemma3Text"), ids_of()
    cache, loaded = cache_of(model, LOW), cache_of(model, LOW)
    steps(model, cache, ids, [150, 1])
    loaded.load_state_dict({name: tensor.clone() for name, tensor in cache.state_dict().items()})
    with torch.no_grad():
        seen = [model(ids[:, 151:190], past_key_values=c).logits for c in (cache, loaded)]
    torch.testing.assert_close(*seen, rtol=0, atol=0)


def test_chunked_attention_is_a_window_of_one_chunk() -> None:
    """Llama 4: a query sees its own chunk alone, which its mask says; what is stored reaches back as far."""
    more = dict(
        attention_chunk_size=WINDOW, num_local_experts=2, num_experts_per_tok=1, intermediate_size_mlp=48,
        no_rope_layers=[1, 0], sliding_window=None,
    )  # fmt: skip
    torch.manual_seed(0)
    model: Any = transformers.Llama4ForCausalLM(transformers.Llama4TextConfig(**{**BASE, **more})).eval()
    cache = cache_of(model)
    got = steps(model, cache, ids_of(1), [130, 1, 5, 30, 1, 64, 8])
    with torch.no_grad():
        assert close(got, model(ids_of(1)[:, : got.shape[1]]).logits)
    assert [state.spec.window for state in cache.states] == [WINDOW, WINDOW, 0, 0]


@pytest.mark.parametrize(
    ("config", "why"),
    [
        (XQuantConfig(), "window or buffer of 40 tokens is within the residual window, which holds 404"),
        (LOW.replace(sliding_windows="auto"), "window or buffer of 40 tokens is shorter than 4 residual windows"),
        (LOW.replace(sliding_windows=False), "sliding_windows of the config is False"),
        (make_plan(LOW, 1), "the plan is for 1 layers, those of full attention"),
    ],
)
def test_windows_that_stay(config: Any, why: str) -> None:
    cache = cache_of(model_of("Gemma3Text"), config)
    assert cache.windows_left == why
    assert [isinstance(layer, XQuantLayer) for layer in cache.layers] == [False, True]


def test_short_windows_are_counted_so() -> None:
    """``explain`` says why they stay, and strict does not raise."""
    model, ids = model_of("Gemma3Text"), ids_of()
    cache = cache_of(model, LOW.replace(residual_length=32))
    steps(model, cache, ids, [100])
    found = explain(model, ids[:, :1], past_key_values=cache, strict=True)
    assert [site.rewritten for site in found.sites] == [False, True]
    assert found.sites[0].reason == "window or buffer of 40 tokens is within the residual window, which holds 52"


def test_a_long_prompt_says_nothing_of_the_window() -> None:
    """Attention reads the prompt's own keys, of which the buffer of a ``StaticCache`` gets the last."""
    model = model_of("Gemma3Text")
    cache = transformers.StaticCache(model.config, LENGTH)
    found = explain(
        model, ids_of(1)[:, :100], past_key_values=cache, options={"config": LOW.replace(residual_length=64)}
    )
    assert found.sites[0].reason == "window or buffer of 40 tokens is within the residual window, which holds 84"


def test_windows_of_several_lengths_stay() -> None:
    model = model_of("Mistral")
    model.config.layer_types = ["sliding_attention"] * 2
    from xquant_fx.plan.windows import why_not_windows

    assert why_not_windows([64, 128], 0, LOW) == "windows of [64, 128] tokens, of which a model makes one mask"
    assert why_not_windows([64, 64], 0, LOW) == why_not_windows([], 2, LOW) == ""


def test_memory_falls() -> None:
    model, ids = model_of("Mistral"), ids_of(1)
    low, full = cache_of(model, LOW), transformers.StaticCache(model.config, LENGTH)
    for cache in (low, full):
        steps(model, cache, ids, [290, 1])
    report = memory_report(low)
    assert report.full_bytes == sum(t.nbytes for layer in full.layers for t in (layer.keys, layer.values))
    assert report.elements == 4 * WINDOW * 2 * 8


def test_config() -> None:
    cache = cache_of(model_of("Gemma3Text"), LOW.replace(sliding_windows="auto", residual_length=8))
    assert cache.windows_left == "" and len(cache.quantized_layers) == 2
    assert XQuantConfig.from_json(LOW.replace(sliding_windows=False).to_json()).sliding_windows is False
    with pytest.raises(ConfigError, match=r"sliding_windows must be True, False or .auto., got 1"):
        XQuantConfig(sliding_windows=1)  # type: ignore[arg-type]


def test_a_model_without_masks_of_windows_keeps_them() -> None:
    """Moshi attends to whatever its cache still holds: what the window has lost would be read as tokens."""
    config = transformers.MoshiConfig(num_hidden_layers=2, sliding_window=WINDOW)
    cache = XQuantCache(config, LENGTH, config=FULL)
    assert "makes no masks of sliding windows" in cache.windows_left and not cache.quantized_layers
    assert not XQuantCache(model_of("Mistral").config, LENGTH, config=FULL).windows_left
