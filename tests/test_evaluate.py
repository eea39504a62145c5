"""The one-pass simulation gives what real decode steps give; measures by hand; results that are gone on with."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from pathlib import Path

import pytest
import torch
from dynamo_graphs import tiny
from reference_cache import ReferenceCache
from states import range_config
from stepping import logits_of

from xquant_fx import PRESETS, ConfigError, XQuantCache, XQuantConfig, make_plan, quality_report
from xquant_fx.cache import uncompiled
from xquant_fx.errors import ArgumentError
from xquant_fx.evaluate import attention, models, quality, results, simulate
from xquant_fx.evaluate.measures import Measured, measure, paired, summarize
from xquant_fx.evaluate.quality import Reading
from xquant_fx.evaluate.settings import Setting
from xquant_fx.evaluate.simulate import Prefilled, reference_logits, simulated_logits
from xquant_fx.evaluate.size import size_of, true_bits
from xquant_fx.evaluate.steps import step_logits
from xquant_fx.evaluate.windows import cut_windows
from xquant_fx.reports.quality import kl_divergence

#: A window small enough for tests: two blocks of keys become due after the prompt.
SHORT = dict(residual_length=16, k_group_size=16)
LAYERS = 2  # which may share codes


@pytest.fixture(autouse=True)
def in_plain_torch(request, monkeypatch):
    """Steps compile no kernels, but for those of the embedded model: kernels give the same (test_uncompiled.py)."""
    if "trained" not in request.fixturenames:
        monkeypatch.setattr(uncompiled, "WARM", 10**9)


def plans() -> dict[str, object]:
    """Every preset in short blocks, and what no preset has."""
    config = range_config(**SHORT, k_bits=(2, 4, 16, 1), v_bits=(1, 1, 8, 16), share_values_from=0)  # of 4 layers
    return {
        **{name: XQuantConfig.preset(name).replace(**SHORT) for name in PRESETS},
        "sinks": range_config(**SHORT, sink_tokens=4),
        "bits per layer": make_plan(config, 4),
        "groups": range_config(**SHORT, v_group_size=8, eta_1bit=0.0).replace(k_group_size=8),
        "longer windows of keys": XQuantConfig(k_residual_length=32, v_residual_length=12, k_group_size=16),
        "longer windows of values": range_config(residual_length=16, v_residual_length=24, k_group_size=16),
        "values rotated from outside": XQuantConfig(**SHORT, v_scheme="per_token_folded", v_bits=3),
        "no token norms": XQuantConfig(**SHORT, k_token_norms=False),
        "long residual": XQuantConfig(residual_length=128),
    }


def tokens(count: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(3, 128, (1, count), generator=torch.Generator().manual_seed(seed))


def both(model, ids, prompt: int, config) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits in full precision, simulated, and by real steps."""
    keep = torch.arange(prompt, ids.shape[1] - 1)
    window = Prefilled.of(model, ids, prompt)
    simulated, _ = simulated_logits(window, keep, config)
    return reference_logits(window, keep), simulated, step_logits(model, ids, prompt, keep, config)[0]


def off(config) -> float:
    """Most that a logit may be off. An 8-bit scale that tips over at a tie changes by a sixteenth."""
    return 1e-2 if getattr(config, "k_scheme", "") == "per_channel_ranked" else 1e-3


@pytest.mark.parametrize("name", plans())
def test_simulation_equals_steps(tiny_llama, name):
    layers = 4 if name == "bits per layer" else LAYERS
    full, simulated, steps = both(tiny_llama(layers=layers), tokens(78), 29, plans()[name])
    assert float((simulated - steps).abs().max()) < off(plans()[name])
    assert kl_divergence(steps, simulated) < 1e-4 * off(plans()[name])
    moved = kl_divergence(full, steps)
    assert moved < 1e-9 if name in ("full", "long residual") else moved > 1e-5


SLOW = pytest.mark.slow


@pytest.mark.parametrize("prompt", [1, pytest.param(5, marks=SLOW), pytest.param(16, marks=SLOW), 32, 70])
def test_simulation_equals_steps_at_any_prompt(tiny_llama, prompt):
    for config in (range_config(**SHORT, sink_tokens=2), XQuantConfig(**SHORT, sink_tokens=2)):
        _, simulated, steps = both(tiny_llama(layers=2), tokens(78), prompt, config)
        assert float((simulated - steps).abs().max()) < off(config)


def test_simulation_equals_the_independent_reference(tiny_llama):
    """Not by the product's reads and limits: the reference of the tests stores and attends by itself."""
    model, ids, prompt = tiny_llama(layers=2), tokens(70), 29
    config = range_config(**SHORT, share_values_from=0)
    reference: ReferenceCache = ReferenceCache(2, config)
    logits = []
    for piece in (ids[:, :prompt], *ids[:, prompt:-1].split(1, 1)):
        logits.append(logits_of(model.forward, piece, reference)[:, -1:])
        reference.flush()
    _, simulated, _ = both(model, ids, prompt, config)
    assert float((torch.cat(logits[1:], 1) - simulated).abs().max()) < 1e-3


@pytest.mark.parametrize("name", [pytest.param("kivi-2", marks=pytest.mark.slow), "xquant-2.2"])
def test_simulation_equals_steps_on_the_embedded_model(trained, name):
    model, ids = trained
    config = XQuantConfig.preset(name)
    full, simulated, steps = both(model, ids[:, :430], 400, config)
    assert float((simulated - steps).abs().max()) < 2 * off(config)
    assert kl_divergence(steps, simulated) < 1e-2 * off(config) * kl_divergence(full, steps) + 1e-9


@pytest.mark.slow
def test_compiled_steps(tiny_llama):
    model, ids, keep = tiny_llama(layers=2), tokens(40), torch.arange(29, 39)
    eager, _ = step_logits(model, ids, 29, keep, range_config(**SHORT))
    compiled, _ = step_logits(model, ids, 29, keep, range_config(**SHORT), compiled=True)
    assert torch._dynamo.utils.counters["xquant"]["fuse_decode"] > 0
    torch.testing.assert_close(compiled, eager, rtol=1e-3, atol=1e-3)


def test_sliding_windows_that_are_quantized():
    """Steps overwrite what has left the window; one pass looks back on all of it."""
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    model = MistralForCausalLM(MistralConfig(
        vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, sliding_window=40, initializer_range=0.2,
    )).eval()  # fmt: skip
    config = XQuantConfig(**SHORT, sliding_windows=True)
    full, simulated, steps = both(model, tokens(150), 60, config)
    assert float((simulated - steps).abs().max()) < 1e-3
    assert kl_divergence(full, steps) > 1e-5
    window, stepped = Prefilled.of(model, tokens(150), 60), XQuantCache(model.config, 150, config=config)
    with torch.no_grad():
        model(tokens(150)[:, :149], past_key_values=stepped)
    looked_back = simulated_logits(window, torch.tensor([148]), config)[1]
    assert size_of(looked_back) == size_of(stepped) and size_of(stepped).true_bits > 2


def test_sliding_windows_stay_in_full_precision():
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, sliding_window=24, initializer_range=0.2, attn_logit_softcapping=5.0,
    )  # fmt: skip
    # In transformers 5.17 its SDPA leaves the softcap out.
    model = Gemma2ForCausalLM._from_config(config, attn_implementation="eager").eval()
    assert config.layer_types == ["sliding_attention", "full_attention"]
    full, simulated, steps = both(model, tokens(78), 29, range_config(**SHORT))
    assert float((simulated - steps).abs().max()) < 1e-3
    assert kl_divergence(full, steps) > 1e-5


@pytest.mark.parametrize(
    ("name", "attention"), [("gpt2", "sdpa"), ("gemma3_text", "sdpa"), ("gpt_oss", "eager"), ("qwen3_next", "sdpa")]
)
def test_architectures(name, attention):
    """Old names, sliding windows, sink logits, linear attention."""
    model, config = tiny(name, attention), range_config(residual_length=8, k_group_size=8)
    full, simulated, steps = both(model, tokens(60) % 64, 21, config)
    assert float((simulated - steps).abs().max()) < 1e-3
    assert kl_divergence(full, steps) > 1e3 * kl_divergence(steps, simulated)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("deepseek_v3", "attention must read what its layer stores, and layer 0 reads something else"),
        ("falcon", "FalconForCausalLM must let its attention be set, and it kept 'sdpa'"),
    ],
)
def test_architectures_that_only_real_steps_measure(name, reason):
    model, ids, settings = tiny(name), tokens(60) % 64, {"a": range_config(residual_length=8, k_group_size=8)}
    with pytest.raises(ArgumentError, match=reason):
        quality_report(model, ids, settings, reading=Reading(21))
    assert quality_report(model, ids, settings, reading=Reading(21, steps=True))["a"].summary.kl > 0


def test_attention_is_put_back(tiny_llama):
    model = tiny_llama(layers=2)
    before = model.config._attn_implementation
    window = Prefilled.of(model, tokens(30), 20)
    with pytest.raises(ConfigError, match="the plan is for 3 quantized layers, the model has 2"):
        simulated_logits(window, torch.tensor([25]), make_plan(XQuantConfig(), 3))
    with pytest.raises(RuntimeError, match="stop"), models.attending(model, lambda *a, **k: None):
        raise RuntimeError("stop")
    assert model.config._attn_implementation == before
    for mapping in (models.ALL_ATTENTION_FUNCTIONS, models.ALL_MASK_ATTENTION_FUNCTIONS):
        assert models.NAME not in mapping


def test_blocks_of_queries_do_not_matter(tiny_llama, monkeypatch):
    model, config = tiny_llama(layers=2), range_config(**SHORT)
    _, whole, _ = both(model, tokens(78), 29, config)
    monkeypatch.setattr(attention, "BLOCK", 7)
    _, parts, _ = both(model, tokens(78), 29, config)
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-5)


def test_attention_that_is_not_known_is_refused(tiny_llama, monkeypatch):
    window, keep = Prefilled.of(tiny_llama(layers=2), tokens(40), 20), torch.arange(20, 39)
    simulate.check_attention(window, keep, reference_logits(window, keep))
    monkeypatch.setattr(simulate, "Form", lambda scale, *rest: attention.Form(scale * 30, *rest))
    with pytest.raises(ArgumentError, match="the model's attention does something that the simulation does not"):
        simulate.check_attention(window, keep, reference_logits(window, keep))


def test_paired_by_hand():
    windows = [[Measured([1], [kl], [1.0], [1.0], [1]) for kl in each] for each in ((1.0, 5.0), (2.0, 7.0))]
    first, second = map(summarize, windows)
    assert paired(second, first) == pytest.approx((1.5, 0.5))  # differences of 1 and 2, where either spreads by more
    assert paired(summarize(windows[1][:1]), summarize(windows[0][:1])) == (1.0, None)


def test_measure_by_hand():
    full = torch.tensor([[0.5, 0.5], [0.9, 0.1]]).log()
    other = torch.tensor([[0.25, 0.75], [0.9, 0.1]]).log() + 3
    found = measure(full, other, torch.tensor([0, 1]), torch.tensor([7, 9]))
    kl = 0.5 * math.log(2) + 0.5 * math.log(0.5 / 0.75)
    assert found.position == [7, 9]
    assert found.kl == pytest.approx([kl, 0.0], abs=1e-6)
    assert found.nll_full == pytest.approx([-math.log(0.5), -math.log(0.1)], rel=1e-6)
    assert found.nll == pytest.approx([-math.log(0.25), -math.log(0.1)], rel=1e-6)
    assert found.same_top == [0, 1]


def test_summary_by_hand():
    windows = [
        Measured([10, 12, 14, 16], [0.0, 1.0, 2.0, 3.0], [1.0] * 4, [2.0] * 4, [1, 1, 0, 0]),
        Measured([10, 12, 14, 16], [4.0, 5.0, 6.0, 7.0], [1.0] * 4, [2.0] * 4, [1, 1, 1, 1]),
    ]
    found = summarize(windows, bins=2)
    assert (found.windows, found.positions, found.kl, found.kl_max) == (2, 8, 3.5, 7.0)
    assert found.kl_error == pytest.approx(2.0)  # windows of 1.5 and 5.5
    assert found.kl_windows == [1.5, 5.5]
    assert found.kl_percentiles["50"] == 3.5
    assert found.kl_percentiles["90"] == pytest.approx(6.3)
    assert (found.perplexity_full, found.perplexity) == pytest.approx((math.e, math.e**2))
    assert found.p_rms == pytest.approx(math.exp(-1) - math.exp(-2))
    assert found.same_top == 0.75
    assert [(d.first, d.last, d.kl) for d in found.depths] == [(10, 12, 2.5), (14, 16, 4.5)]
    assert summarize(windows[:1]).kl_error is None


@pytest.mark.parametrize(("name", "bits"), [("kivi-2", 2.375), ("xquant", 1.75), ("full", 16.0)])
def test_true_bits(name, bits):
    """head_dim 64: keys 2 + 32 / 128, values 2 + 32 / 64; a shared layer keeps the scales alone."""
    from transformers import LlamaConfig

    from xquant_fx import XQuantCache

    config = LlamaConfig(num_hidden_layers=4, num_attention_heads=1, num_key_value_heads=1, head_dim=64, hidden_size=64)
    cache = XQuantCache(config, max_cache_len=200, config=XQuantConfig.preset(name).replace(sink_tokens=4))
    for layer in range(4):
        cache.update(*torch.randn(2, 1, 1, 150, 64).unbind(), layer)
    assert true_bits([state.spec for state in cache.states]) == bits


def test_windows_are_evenly_spaced():
    class Words:
        def __call__(self, text, add_special_tokens=True, verbose=True):
            ids = [int(word) for word in text.split()]
            return {"input_ids": [0, *ids] if add_special_tokens else ids}

    text = " ".join(str(i) for i in range(1, 101))
    windows = cut_windows(Words(), text, 11, 3)
    assert windows.tolist() == [[0, *range(a, a + 10)] for a in (16, 46, 76)]
    assert cut_windows(Words(), text, 101, 1).shape == (1, 101)
    with pytest.raises(ArgumentError, match="must hold a window of 102 tokens, it has 101"):
        cut_windows(Words(), text, 102, 1)
    with pytest.raises(ArgumentError, match="got 0 of 11"):
        cut_windows(Words(), text, 11, 0)


def test_settings_from_files(tmp_path):
    config = XQuantConfig(k_bits=4)
    for name, content in (("config", config), ("plan", make_plan(config, 3))):
        (tmp_path / f"{name}.json").write_text(content.to_json())
        assert Setting.of_file(tmp_path / f"{name}.json") == Setting(name, content)
    (tmp_path / "some.json").write_text('{"k_bits": 2}')  # what is left out is the default
    assert Setting.of_file(tmp_path / "some.json") == Setting("some", XQuantConfig(k_bits=2))
    for text in ("{", "[]", '{"k_bits": 77}', '{"nonsense": 1, "scale_dtype": "float16"}'):
        (tmp_path / "wrong.json").write_text(text)
        with pytest.raises(ConfigError, match=r"wrong.json must be what XQuantConfig.to_json or Plan.to_json writes"):
            Setting.of_file(tmp_path / "wrong.json")


def test_report(tiny_llama, tmp_path, monkeypatch):
    model, out = tiny_llama(layers=2), tmp_path / "results.json"
    windows = torch.cat([tokens(60, seed) for seed in (1, 2)])
    settings = {"a": range_config(**SHORT), "b": range_config(**SHORT, k_bits=8, v_bits=8, share_values_from=None)}
    reading = Reading(prompt=29, stride=3)
    report = quality_report(model, windows, settings, reading=reading, out=str(out))
    assert report["a"].summary.kl > report["b"].summary.kl > 0
    assert report["a"].summary.positions == 2 * 10
    assert report["a"].size.true_bits < report["b"].size.true_bits
    text = str(report)
    assert "2 window(s) of 60 tokens, prompt 29, 1 position in 3, simulated steps" in text
    assert "mean KL, nats" in text
    assert "more than a" in text
    assert "29 to " in text
    assert json.loads(out.read_text())["report"]["qualities"][0]["summary"]["kl"] == report["a"].summary.kl

    # Nothing of the same is run again; another prompt, model or setting is.
    ran = []
    monkeypatch.setattr(quality, "simulated_logits", lambda *a: ran.append(a) or simulated_logits(*a))
    again = quality_report(model, windows, {"c": settings["a"]}, reading=reading, out=str(out))
    assert ran == []
    assert again["c"].summary == report["a"].summary
    quality_report(model, windows, settings, reading=dataclasses.replace(reading, prompt=28), out=str(out))
    assert len(ran) == 4
    model.lm_head.weight.data[5, 5] += 1
    quality_report(model, windows[:1], settings, reading=reading, out=str(out))
    assert len(ran) == 6


def test_other_code_measures_again(monkeypatch):
    key = results.key_of(a=1)
    assert results.key_of(a=1) == key != results.key_of(a=2)
    assert re.fullmatch("[0-9a-f]{24}", key)
    changed = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda p: changed(p) + b"#" * (p.name == "per_channel.py"))
    results._code.cache_clear()
    assert results.key_of(a=1) != key
    results._code.cache_clear()


def test_report_of_steps_is_that_of_the_simulation(tiny_llama):
    model, settings = tiny_llama(layers=2), {"a": range_config(**SHORT)}
    reports = [
        quality_report(model, tokens(60), settings, reading=Reading(29, 1, steps=steps)) for steps in (False, True)
    ]
    simulated, steps = (report["a"] for report in reports)
    assert simulated.summary.kl == pytest.approx(steps.summary.kl, rel=1e-3)
    assert simulated.summary.kl_max == pytest.approx(steps.summary.kl_max, rel=1e-3)
    assert simulated.size == steps.size


def test_arguments_are_checked(tiny_llama, tmp_path):
    model, config = tiny_llama(layers=2), {"a": XQuantConfig()}
    with pytest.raises(ArgumentError, match="prompt and stride must be 1 or more, got 0 and 2"):
        Reading(prompt=0)
    with pytest.raises(ArgumentError, match="compiled=True needs steps=True"):
        Reading(compiled=True)
    with pytest.raises(ArgumentError, match="2 tokens after its prompt of 20, got 21 in all"):
        quality_report(model, tokens(21), config, reading=Reading(20))
    with pytest.raises(ConfigError, match=r"each with a name of its own, got \['a', 'a'\]"):
        quality_report(model, tokens(60), [Setting("a", XQuantConfig())] * 2, reading=Reading(20))
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(ArgumentError, match=r"other.json must hold the results of an evaluation, or not exist"):
        quality_report(model, tokens(60), config, reading=Reading(20), out=str(tmp_path / "other.json"))
