"""Sharing codes in a plan that is chosen: tried for every pair, taken only where it measures free, told in any case."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from xquant_fx import Plan, XQuantCache, XQuantConfig, auto_report, explain
from xquant_fx.evaluate.auto import auto_plan
from xquant_fx.evaluate.probe import FULL, Probe, Width
from xquant_fx.evaluate.quality import Reading, quality_report
from xquant_fx.evaluate.sensitivity import Item, Losses, item_losses
from xquant_fx.evaluate.sharing import SharingTrial, blocks_of, layers_of, shared_widths, try_sharing

pytest_plugins = ["plain_torch"]

SHORT = XQuantConfig(residual_length=16, k_group_size=16, sink_tokens=2)
RANGE = SHORT.replace(k_scheme="per_channel", v_scheme="per_token")
IDS = torch.randint(3, 128, (3, 96), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def plain(tiny_llama):
    """Layers that have nothing in common, and average over many tokens: shared codes keep but the mean of a token."""
    model = tiny_llama(layers=4, heads=2, kv_heads=1, head_dim=64)
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight.data *= 0.1
    return model


@pytest.fixture
def alike(tiny_llama):
    """Layer 3 has the values of layer 2, which adds nothing to the residual stream."""
    model = tiny_llama(layers=4, heads=2, kv_heads=1, head_dim=64)
    lower, upper = model.model.layers[2:]
    for weight in (lower.self_attn.o_proj.weight, lower.mlp.down_proj.weight):
        weight.data.zero_()
    upper.self_attn.v_proj.weight.data.copy_(lower.self_attn.v_proj.weight.data)
    return model


def quiet(passes: int) -> None:
    """Nobody watches."""


def losses(role, first, last, *bits):
    return Losses(Item(role, first, last), {}, {b: 1.0 / b for b in (*bits, FULL)})


def partners(plan: Plan, role: str) -> list[int | None]:
    return [layer.of(role).partner for layer in plan.layers]


def test_blocks_are_pairs_or_items_of_whole_pairs():
    each = [losses(*at) for at in (("key", 0, 0), ("value", 0, 0), ("key", 1, 1), ("value", 1, 1), ("key", 2, 2))]
    assert [(b[0].item.role, layers_of(b)) for b in blocks_of(each)] == [
        ("key", [0, 1]), ("value", [0, 1]), ("key", [2]),
    ]  # fmt: skip
    each = [losses(*at) for at in (("key", 0, 3), ("key", 4, 4), ("key", 5, 5), ("key", 6, 7))]
    assert [layers_of(b) for b in blocks_of(each)] == [[0, 1, 2, 3], [4, 5], [6, 7]]


def test_which_layers_would_share():
    shared, own = Width(1, shared=True), Width(1)
    assert shared_widths((losses("value", 2, 5, 1, 2),)) == dict.fromkeys(range(2, 6), shared)
    assert shared_widths((losses("value", 0, 0, 2), losses("value", 1, 1, 2))) == {0: shared, 1: shared}
    assert shared_widths((losses("value", 4, 6, 1),)) == {4: shared, 5: shared, 6: own}
    # No pair; a layer without partner that cannot have the width.
    assert shared_widths((losses("value", 4, 4, 1),)) == {}
    assert shared_widths((losses("key", 4, 6, 1, 3),)) == {}


def test_what_is_free():
    trial = SharingTrial("key", 0, 1, 2, 1.5, 0.75, 2, 2.125, 0.5, 0.25)
    assert trial.is_free
    assert not dataclasses.replace(trial, kl=0.7501).is_free
    assert dataclasses.replace(trial, kl=0.5, noise=0.0).is_free
    assert not dataclasses.replace(trial, kl=None, reason="layers differ").is_free


@pytest.mark.parametrize("config", [SHORT, RANGE], ids=["own_scheme_cannot", "own_scheme_can"])
def test_a_trial_is_what_a_plan_loses(plain, config):
    probe = Probe(plain, IDS, 48, 1, config)
    block = tuple(item_losses(probe, Item("value", n, n), quiet) for n in (2, 3))
    trial = try_sharing(probe, block)
    plan = probe.plan(lambda role, n: Width(1, shared=True) if role == "value" and n > 1 else Width(FULL))
    assert partners(plan, "value") == [None, None, None, 2]
    assert [layer.value.scheme for layer in plan.layers[2:]] == ["per_token"] * 2
    assert {layer.value.bits for layer in plan.layers[:2]} == {layer.key.bits for layer in plan.layers} == {FULL}
    reading = Reading(48, 1)
    measured = quality_report(plain, IDS, {"shared": plan}, reading=reading)["shared"].summary.kl
    assert trial.kl == pytest.approx(measured, rel=1e-4)
    # One bit in one of two layers; two scales or one in 8 bits for each 64 channels.
    assert trial.true_bits == pytest.approx((1 + 2 * 32 / 64) / 2)
    width, true = (1, 1 + 32 / 64) if config is RANGE else (1, 1 + 8 / 64)
    assert (trial.own_bits, trial.own_true_bits) == (width, pytest.approx(true))
    own = sum(probe.losses(probe.alone("value", {n: Width(width)}), n) for n in (2, 3))
    assert trial.own_kl == pytest.approx(float(own.mean()))
    apart = probe.losses(plan) - own
    assert trial.noise == pytest.approx(float(apart.std()) / math.sqrt(3))
    assert trial.is_free == (float(apart.mean()) <= trial.noise)


def test_one_window_has_no_noise_to_hide_in(plain):
    probe = Probe(plain, IDS[:1], 48, 1, SHORT)
    assert try_sharing(probe, tuple(item_losses(probe, Item("value", n, n), quiet) for n in (2, 3))).noise == 0


@pytest.mark.parametrize(
    "config", [SHORT, pytest.param(RANGE, marks=pytest.mark.slow)], ids=["own_scheme_cannot", "own_scheme_can"]
)
def test_sharing_is_chosen_where_it_is_free(alike, config, no_compiler):
    report = auto_report(alike, bits=2.0, text=IDS, config=config)
    trials = {(trial.role, trial.first): trial for trial in report.sharing}
    assert sorted(trials) == [("key", 0), ("key", 2), ("value", 0), ("value", 2)]
    assert trials["value", 2].is_free
    assert partners(report.plan, "value")[2:] == [None, 2]
    assert report.true_bits <= 2.0
    (group,) = [g for g in report.groups if g.shared and (g.role, g.first) == ("value", 2)]
    assert (group.layers, group.bits) == ("2 to 3", 1)
    assert group.kl == trials["value", 2].kl
    assert report.predicted_kl == pytest.approx(sum(g.kl for g in report.groups))
    assert "2 to 3   values   1 shared" in str(report)
    # Such a plan is saved, and real steps lose what was measured.
    again = Plan.from_json(report.plan.to_json())
    assert again == report.plan
    steps = quality_report(alike, IDS, {"auto": again}, reading=Reading(48, 1, steps=True))["auto"]
    assert steps.size.true_bits == pytest.approx(report.true_bits)
    assert steps.summary.kl == pytest.approx(report.measured_kl, rel=1e-3)
    sites = explain(alike, IDS[:1, :8], past_key_values=XQuantCache(alike, 64, config=again)).sites
    assert [site.value_partner for site in sites] == partners(again, "value")
    slow = {layer: reason for layer, reason in report.unfused.items() if layer > 1}
    if config is RANGE:
        assert slow == {}
    else:
        assert set(slow) == {2, 3} and "keys are stored per channel ranked and its values per token" in slow[2]
        assert f"are read dequantized, slower: {slow[2]}" in str(report)


def test_sharing_that_is_not_free_is_told_and_not_chosen(plain):
    report = auto_report(plain, bits=1.9, text=IDS, config=SHORT)
    values = [trial for trial in report.sharing if trial.role == "value"]
    assert len(values) == 2 and not any(trial.is_free for trial in values)
    assert partners(report.plan, "value") == [None] * 4
    trial = values[-1]
    assert f"{trial.kl:.5f}" in str(report) and "if the layers of each pair shared codes" in str(report)
    assert trial.own_kl in [told["own_kl"] for told in report.to_dict()["sharing"]]


def test_sharing_can_be_turned_off(alike, capsys):
    plan = auto_plan(alike, bits=2.0, text=IDS, config=SHORT, sharing=False)
    assert partners(plan, "key") == partners(plan, "value") == [None] * 4
    assert "shared" not in capsys.readouterr().out


def test_layers_that_differ_are_not_tried(plain, monkeypatch):
    probe = Probe(plain, IDS, 48, 1, SHORT)
    block = tuple(item_losses(probe, Item("value", n, n), quiet) for n in (2, 3))
    shape = probe.shape
    monkeypatch.setattr(probe, "shape", lambda n, role: (1, 2 if n == 3 else 1, *shape(n, role)[2:]))
    trial = try_sharing(probe, block)
    assert trial.kl is None and not trial.is_free
    assert trial.reason.startswith("layers 2 and 3 differ in geometry")
