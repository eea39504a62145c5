"""A plan chosen on a model: exact allocation, budgets, determinism, and refusal elsewhere."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig

from xquant_fx import ConfigError, Plan, XQuantCache, XQuantConfig, auto_plan, auto_report, make_plan
from xquant_fx.errors import ArgumentError
from xquant_fx.evaluate import calibration, cli, models, sensitivity
from xquant_fx.evaluate.allocation import Choice, Option, best_within, cheapest_within, pareto_choices
from xquant_fx.evaluate.calibration import Windows, calibration_ids
from xquant_fx.evaluate.probe import FULL, Probe, Width
from xquant_fx.evaluate.quality import Reading, quality_report
from xquant_fx.evaluate.replay import Noted
from xquant_fx.evaluate.sensitivity import (
    Item,
    Losses,
    all_losses,
    distortion,
    filled_in,
    item_losses,
    items_of,
    stands_out,
    widths_of,
)  # fmt: skip
from xquant_fx.evaluate.windows import cut_windows
from xquant_fx.kernels.widths import DISTORTION
from xquant_fx.plan.model_facts import ModelFacts

pytest_plugins = ["plain_torch"]

ROOT = Path(__file__).resolve().parents[1]
REAL = ROOT / "models" / "smollm2-135m-instruct"
SHORT = XQuantConfig(residual_length=16, k_group_size=16, sink_tokens=2)
DIM, KV_HEADS = 32, 2


@pytest.fixture
def small(tiny_llama):
    """(a random model of 4 layers, token ids [2, 96])."""
    ids = torch.randint(3, 128, (2, 96), generator=torch.Generator().manual_seed(1))
    return tiny_llama(layers=4, head_dim=DIM), ids


def bits_of(plan: Plan) -> list[tuple[float, float]]:
    return [(layer.key.bits, layer.value.bits) for layer in plan.layers]


def true_bits_by_hand(plan: Plan) -> float:
    """Key scales and mid points, value scales, norms of tokens over all KV heads: 8 bits each."""
    each = [key + 16 / SHORT.k_group_size + 8 / (KV_HEADS * DIM) + value + 8 / DIM for key, value in bits_of(plan)]
    return sum(each) / (2 * len(each))


# Allocation.

OPTION = st.builds(Option, st.just(0.0), st.integers(0, 6), st.sampled_from([0.0, 0.25, 0.5, 1.0, 1.5, 4.0]))
ITEMS = st.lists(st.lists(OPTION, min_size=1, max_size=4), min_size=1, max_size=5)


def every_choice(items):
    """All choices there are."""
    for picks in itertools.product(*(range(len(options)) for options in items)):
        chosen = [options[i] for options, i in zip(items, picks, strict=True)]
        yield Choice(sum(o.cost for o in chosen), sum(o.loss for o in chosen), picks)


@settings(deadline=None, max_examples=200)
@given(ITEMS)
def test_allocation_is_that_of_brute_force(items):
    front, every = pareto_choices(items), list(every_choice(items))
    assert set(front) <= set(every)
    assert front == sorted(front)
    for budget in range(31):
        affordable = [choice.loss for choice in every if choice.cost <= budget]
        found = best_within(front, budget)
        assert (found.loss if found else None) == (min(affordable) if affordable else None)
    for loss in {choice.loss for choice in every} | {-1.0}:
        enough = [choice.cost for choice in every if choice.loss <= loss]
        found = cheapest_within(front, loss)
        assert (found.cost if found else None) == (min(enough) if enough else None)


def test_allocation_of_no_options_is_empty():
    assert pareto_choices([[Option(1, 1, 1.0)], []]) == []
    assert pareto_choices([]) == [Choice(0, 0.0, ())]


# Losses.


def test_widths_fill_whole_words():
    assert widths_of("key", "per_channel_ranked", 64) == (1, 1.5, 2, 2.5, 3, 4)
    assert widths_of("key", "per_channel_ranked", 32) == (1, 2, 3, 4)
    assert widths_of("key", "per_channel_ranked", 16) == (2, 4)
    assert widths_of("value", "per_token_rotated", 16) == widths_of("key", "per_channel", 16) == (1, 2, 3, 4)


def test_losses_between_and_beyond_what_was_measured():
    assert [distortion(bits) for bits in (1, 2, 4)] == pytest.approx([DISTORTION[bits] for bits in (1, 2, 4)])
    assert distortion(1.5) == pytest.approx(math.sqrt(DISTORTION[1] * DISTORTION[2]))
    found = filled_in({1: 8.0, 2: 2.0}, (1, 1.5, 2, 4))
    assert found == pytest.approx({1: 8.0, 1.5: 4.0, 2: 2.0, 4: 2.0 * DISTORTION[4] / DISTORTION[2]})
    assert filled_in({2: 0.5}, (1, 2)) == pytest.approx({1: 0.5 * DISTORTION[1] / DISTORTION[2], 2: 0.5})
    # More bits are never expected to lose more.
    assert filled_in({1: 1.0, 2: 3.0}, (1, 2)) == {1: 1.0, 2: 1.0}
    assert filled_in({1: 0.0, 2: 0.0}, (1, 2, 4))[4] == 0.0


@pytest.mark.parametrize("layers", [1, 7, 10, 11, 13, 20, 29, 30, 32])
def test_items_cover_all_layers_once(layers):
    for role in ("key", "value"):
        assert [n for item in items_of(layers) if item.role == role for n in item.layers] == list(range(layers))
    sizes = {len(item.layers) for item in items_of(layers)}
    assert max(sizes) - min(sizes) <= (0 if layers <= 10 else 2)
    assert len(items_of(layers)) <= 20
    # Single layers, or whole pairs.
    assert layers <= 10 or all(item.first % 2 == 0 for item in items_of(layers))


def test_losses_of_windows_that_were_not_measured():
    one, two = torch.tensor([1.0, 3.0]).double(), torch.tensor([0.5, 0.5]).double()
    losses = Losses(Item("key", 0, 0), {1: one, 2: two}, {1: 2.0, 1.5: 1.0, 2: 0.5, 4: 0.1, FULL: 0.0})
    assert losses.windows(1) is one
    assert losses.windows(1.5).tolist() == [0.5, 1.5]
    assert losses.windows(4).tolist() == pytest.approx([0.1, 0.1])
    assert losses.windows(FULL).tolist() == [0, 0]


def losses_of(role, first, last, **means):
    measured = {int(bits[1:]): torch.tensor([kl]).double() for bits, kl in means.items()}
    return Losses(Item(role, first, last), measured, {bits: float(kl) for bits, kl in measured.items()})


def test_a_group_that_stands_out():
    groups = [losses_of("key", 0, 1, b1=1, b2=0.1), losses_of("key", 2, 3, b1=1, b2=0.1),
              losses_of("key", 4, 5, b1=1, b2=0.1), losses_of("key", 6, 7, b1=1, b2=0.1),
              losses_of("key", 8, 9, b1=0.5, b2=0.3), losses_of("value", 0, 9, b1=9)]  # fmt: skip
    assert [stands_out(group, groups) for group in groups] == [False, False, False, False, True, True]


def test_a_group_that_stands_out_is_measured_layer_by_layer(tiny_llama):
    model = tiny_llama(layers=12, head_dim=DIM)
    model.model.layers[0].self_attn.o_proj.weight.data *= 3  # its values count for more
    ids = torch.randint(3, 128, (2, 64), generator=torch.Generator().manual_seed(1))
    passes = []
    found = all_losses(Probe(model, ids, 32, 4, SHORT), passes.append)
    values = [losses.item for losses in found if losses.item.role == "value"]
    assert Item("value", 0, 0) in values and Item("value", 1, 1) in values
    assert Item("value", 10, 11) in values
    assert [n for item in values for n in item.layers] == list(range(12))
    assert sum(passes) == len(passes) >= 6 * 5 + 2 * 2
    assert {losses.means[FULL] for losses in found} == {0.0}


def test_a_pass_from_the_middle_gives_the_same(small):
    model, ids = small
    probe = Probe(model, ids, 48, 1, SHORT)
    assert len(probe.noted.layers) == 4
    ran = []
    for layer in model.model.layers:
        layer.mlp.register_forward_hook(lambda *a: ran.append(1))
    for item in (Item("key", 0, 1), Item("value", 2, 2), Item("key", 3, 3)):
        plan = probe.alone(item.role, dict.fromkeys(item.layers, Width(1)))
        ran.clear()
        part = probe.losses(plan, item.first)
        assert len(ran) == 4 - item.first
        assert torch.equal(part, probe.losses(plan))
        assert part.shape == (2,) and (part > 0).all() and probe.loss(plan) == float(part.mean())
    assert not any("forward" in vars(layer) for layer in model.model.layers)


def loss_of(probe):
    """Of the highest layer's keys at 1 bit."""
    return probe.loss(probe.alone("key", {3: Width(1)}), 3)


def test_layers_that_cannot_be_left_out_are_not(small, monkeypatch):
    """Where what layers gave is not all that a pass is made of, every pass runs whole."""
    model, ids = small
    right = loss_of(Probe(model, ids, 48, 1, SHORT))
    monkeypatch.setattr(Noted, "_hook", lambda self, i: lambda m, a, out: self.outputs.__setitem__(i, out * 2))
    probe = Probe(model, ids, 48, 1, SHORT)
    assert probe.noted.layers == []
    assert loss_of(probe) == pytest.approx(right)


# Plans.


def test_same_plan_again_within_the_budget(small):
    model, ids = small
    reports = [auto_report(model, bits=2.6, text=ids, config=SHORT) for _ in range(2)]
    assert reports[0] == reports[1]
    report = reports[0]
    assert 2.3 < report.true_bits <= 2.6
    assert report.true_bits == pytest.approx(true_bits_by_hand(report.plan))
    assert report.predicted_kl == pytest.approx(sum(group.kl for group in report.groups))
    assert f"{report.true_bits:.3f} true bits per element; KL predicted" in str(report)
    assert json.loads(json.dumps(report.to_dict()))["measured_kl"] == report.measured_kl
    reading = Reading(48, 1)
    both = quality_report(
        model, ids, {"auto": report.plan, "fixed": SHORT.replace(k_bits=2, v_bits=1)}, reading=reading
    )
    assert both["auto"].size.true_bits == pytest.approx(report.true_bits)
    assert both["auto"].summary.kl == pytest.approx(report.measured_kl, rel=1e-4)
    assert both["fixed"].size.true_bits <= 2.6
    assert report.measured_kl < both["fixed"].summary.kl


def test_more_bits_are_not_worse_and_a_budget_is_met_exactly(small):
    model, ids = small
    least = true_bits_by_hand(make_plan(SHORT.replace(k_bits=1, v_bits=1), 4))
    found = [auto_report(model, bits=bits, text=ids, config=SHORT) for bits in (least, 16)]
    assert bits_of(found[0].plan) == [(1, 1)] * 4
    # Whatever the budget, something is quantized.
    widths = sorted(bits for layer in bits_of(found[1].plan) for bits in layer)
    assert widths == [4] + [FULL] * 7
    assert found[0].measured_kl > found[1].measured_kl > 0
    with pytest.raises(ArgumentError, match=rf"bits must be at least {least:.4f} true bits .*, got 1.5"):
        auto_plan(model, bits=1.5, text=ids, config=SHORT, verbose=False)


def test_full_precision_goes_where_it_pays(small, no_compiler):
    model, ids = small
    report = auto_report(model, bits=8, text=ids, config=SHORT)
    widths = bits_of(report.plan)
    assert {4, FULL} <= {bits for layer in widths for bits in layer}
    assert 7 < report.true_bits <= 8
    fixed = auto_report(model, bits=4.7, text=ids, config=SHORT)  # all at 4 bits, or a little less
    assert report.measured_kl < fixed.measured_kl
    # Groups that kept more were those that lose more at 4 bits.
    kept = [group.options[4] for group in report.groups if group.bits == FULL]
    assert min(kept) > min(group.options[4] for group in report.groups if group.bits < FULL)
    steps = quality_report(model, ids, {"auto": report.plan}, reading=Reading(48, 1, steps=True))["auto"]
    assert steps.summary.kl == pytest.approx(report.measured_kl, rel=1e-3)
    assert steps.size.true_bits == pytest.approx(report.true_bits)
    one_sided = [n for n, (k, v) in enumerate(widths) if (k == FULL) != (v == FULL)]
    assert one_sided == sorted(report.unfused)
    if one_sided:
        assert f"{one_sided[0]}" in str(report) and "are read dequantized, slower: 16-bit storage" in str(report)


def test_largest_kl(small):
    model, ids = small
    middle = auto_report(model, bits=2.6, text=ids, config=SHORT).measured_kl
    report = auto_report(model, max_kl=middle, text=ids, config=SHORT)
    assert report.measured_kl <= middle
    assert report.true_bits <= 2.6
    with pytest.raises(
        ArgumentError, match=r"max_kl must be at least 0\.\d+ nats, the least that was found .* \(at 14"
    ):
        auto_plan(model, max_kl=1e-9, text=ids, config=SHORT, verbose=False)


def test_arguments_are_checked(small, tiny_llama):
    model, ids = small
    for goal in ({}, {"bits": 2, "max_kl": 0.1}):
        with pytest.raises(ArgumentError, match="a plan is chosen for bits or for max_kl, one of the two; got"):
            auto_plan(model, text=ids, **goal)
    for goal in ({"bits": 0}, {"bits": True}, {"max_kl": -1.0}, {"max_kl": math.nan}, {"bits": "2"}):
        with pytest.raises(ArgumentError, match="must be a positive number, got"):
            auto_plan(model, text=ids, **goal)
    with pytest.raises(ConfigError, match="must leave something to quantize of a prompt of 48 tokens, got 384 and 4"):
        auto_plan(model, bits=2, text=ids)
    with pytest.raises(ArgumentError, match="config must be an XQuantConfig, whose bits are chosen anew, got Plan"):
        auto_plan(model, bits=2, text=ids, config=make_plan(SHORT, 4))
    with pytest.raises(ArgumentError, match=r"token ids must be int64 \[windows, tokens\]"):
        auto_plan(model, bits=2, text=ids[0], config=SHORT)
    with pytest.raises(ArgumentError, match="a text needs the model's tokenizer, and none is found at ''"):
        auto_plan(model, bits=2, config=SHORT)
    with pytest.raises(ConfigError, match="no width fills whole words for the keys of layers 0 to 0"):
        auto_plan(tiny_llama(layers=2, head_dim=4), bits=2, text=ids, config=SHORT, verbose=False)
    with pytest.raises(ConfigError, match=r'preset "auto" is chosen on a model .* use xquant_fx.auto_plan'):
        XQuantConfig.preset("auto")


def test_a_plan_is_for_its_model(small, tiny_llama):
    model, ids = small
    plan = auto_plan(model, bits=2.6, text=ids, config=SHORT, verbose=False)
    again = Plan.from_json(plan.to_json())
    assert again == plan
    assert again.to_json() == plan.to_json()
    assert plan.model == ModelFacts.of(model)
    XQuantCache(model.config, max_cache_len=64, config=again)
    other = tiny_llama(layers=4, head_dim=16)
    message = "made for another model: it needs hidden_size 128, got 64; head_dim 32, got 16"
    with pytest.raises(ConfigError, match=message):
        XQuantCache(other.config, max_cache_len=64, config=again)
    with pytest.raises(ConfigError, match=message):
        quality_report(other, ids, {"auto": again}, reading=Reading(48))
    # Without that, as version 1 always was, it serves any model of as many layers.
    plain = dataclasses.replace(plan, model=None)
    assert "model" not in json.loads(plain.to_json())
    assert Plan.from_json(plain.to_json()) == plain != plan
    XQuantCache(other.config, max_cache_len=64, config=plain)
    with pytest.raises(ConfigError, match="the model of a plan must have the fields"):
        Plan.from_json(json.dumps({**json.loads(plan.to_json()), "model": {"layers": 4}}))


def test_facts_of_configs_that_say_less():
    facts = ModelFacts.of(LlamaConfig(hidden_size=64, num_attention_heads=4, num_key_value_heads=None, head_dim=None))
    assert (facts.kv_heads, facts.head_dim, facts.model_type) == (4, 16, "llama")
    assert ModelFacts.of(object()).layers is None


# Texts.


def test_the_built_in_text(monkeypatch, small):
    model, _ = small
    text = (ROOT / "xquant_fx" / "evaluate" / "calibration.txt").read_text()
    assert len(text.encode()) < 40_000
    read = []
    monkeypatch.setattr(
        calibration, "cut_windows", lambda tokenizer, content, *a: read.append(content) or torch.ones(1)
    )
    calibration_ids(model, None, object(), Windows(4, 64, 48))
    calibration_ids(model, "mine", object(), Windows(4, 64, 48))
    assert read == [text, "mine"]


def test_sampled_text_is_the_same_each_time(small):
    model, _ = small
    state = torch.get_rng_state()
    first, second = (calibration_ids(model, "sampled", None, Windows(2, 20, 10)) for _ in range(2))
    assert torch.equal(first, second)
    assert first.shape == (2, 20)
    assert not torch.equal(first[0], first[1])
    assert torch.equal(torch.get_rng_state(), state)


def test_windows_fit_the_context():
    assert Windows.for_model(LlamaConfig(max_position_embeddings=8192)) == Windows(8, 1216, 1152)
    assert Windows.for_model(LlamaConfig(max_position_embeddings=200)) == Windows(8, 200, 136)
    assert Windows(1, 10, 4, 2).positions.tolist() == [4, 6, 8]


# The command.


@pytest.fixture
def quick(monkeypatch, no_compiler):
    """Short windows and few groups."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(Windows, "for_model", classmethod(lambda cls, config: cls(1, 440, 400)))
    monkeypatch.setattr(sensitivity, "GROUPS", 2)


def test_command_plan(quick, capsys, tmp_path):
    (tmp_path / "base.json").write_text(SHORT.to_json())
    out = tmp_path / "plan.json"
    args = ["plan", "examples/model", "--bits", "2.2", "--config", str(tmp_path / "base.json"), "-o", str(out)]
    assert cli.main([*args, "--text", "LICENSE"]) == 0
    assert "xquant plan for examples/model: 1 window(s) of 440 tokens" in capsys.readouterr().out
    plan = Plan.from_json(out.read_text())
    assert plan.layers[0].key.residual_length == 16
    assert true_bits_by_hand(plan) <= 2.2
    assert cli.main([*args, "--text", "nowhere.txt"]) == 2


@pytest.mark.slow  # the command as such: test_command_plan
def test_command_eval_of_auto(quick, capsys):
    args = ["eval", "examples/model", "--text", "LICENSE", "--window", "440", "--prompt", "400", "--windows", "1"]
    assert cli.main([*args, "--preset", "auto", "kivi-2", "--bits", "2.3"]) == 0
    printed = capsys.readouterr().out
    assert "more than auto" in printed
    assert cli.main([*args, "--preset", "auto"]) == 2
    assert "--preset auto needs a budget: --bits or --max-kl, got neither" in capsys.readouterr().err
    assert cli.main([*args, "--preset", "kivi-2", "--bits", "2"]) == 2
    assert "--bits and --max-kl are the budget of --preset auto" in capsys.readouterr().err


def test_a_model_that_overflows_is_refused(small):
    model, ids = small
    probe = Probe(model, ids, 48, 1, SHORT)
    model.lm_head.weight.data[5] = torch.nan
    with pytest.raises(ArgumentError, match=r"must be a finite number of nats, got nan in torch\.float32"):
        item_losses(probe, Item("key", 0, 1), print)


@pytest.mark.slow
@pytest.mark.real
def test_real_plan_is_better_than_presets():
    if not (REAL / "config.json").exists():
        pytest.skip("needs models/smollm2-135m-instruct: run `make models`")
    model, tokenizer = models.load(str(REAL), torch.float32)
    report = auto_report(model, bits=1.7)
    assert report.measured_kl == pytest.approx(report.predicted_kl, rel=0.5)
    ids = cut_windows(tokenizer, (ROOT / "LICENSE").read_text(), 1024, 1)
    fixed = {name: XQuantConfig.preset(name) for name in ("xquant-1.7", "xquant-1.4")}
    found = quality_report(model, ids, {"auto": report.plan, **fixed}, reading=Reading(768))
    assert found["auto"].size.true_bits <= 1.7
    assert found["auto"].summary.kl < min(found[name].summary.kl for name in fixed)
