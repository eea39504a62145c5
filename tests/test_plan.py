"""Plans: made once, printed, compared, saved, and given wherever a config is."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from dynamo_graphs import tiny
from rewrites import Rewrites, quantized_layers, two_layers
from states import range_config
from stepping import interpreted
from torch._dynamo.utils import counters
from transformers import StaticCache

from xquant_fx import PRESETS, ConfigError, XQuantCache, XQuantConfig, explain
from xquant_fx.cache.kv_tensor import QuantizedKV
from xquant_fx.compiler.options import parse
from xquant_fx.plan.buffer_plan import BufferPlan
from xquant_fx.plan.plan import LayerPlan, Plan, make_plan

pytest_plugins = ["plain_torch"]

CONFIG = range_config(k_bits=2, v_bits=1, share_values_from=0, k_group_size=8, residual_length=8)
IDS = torch.arange(3, 17)[None]


def changed(plan: Plan, layer: int, role: str, **fields) -> Plan:
    """``plan`` with other ``fields`` in one entry."""
    layers = list(plan.layers)
    entry = dataclasses.replace(layers[layer].of(role), **fields)
    layers[layer] = dataclasses.replace(layers[layer], **{role: entry})
    return Plan(tuple(layers))


@pytest.mark.parametrize("preset", PRESETS)
def test_json_round_trip(preset):
    plan = make_plan(XQuantConfig.preset(preset), 5)
    assert Plan.from_json(plan.to_json()) == plan
    assert make_plan(plan, 5) is plan
    assert hash(plan) == hash(Plan.from_json(plan.to_json()))


@pytest.mark.parametrize("field", dataclasses.fields(BufferPlan), ids=lambda field: field.name)
def test_every_field_is_saved_and_compared(field):
    other = {
        "role": "value", "scheme": "per_token", "bits": 4, "group_size": 4, "residual_length": 16, "eta": 0.3,
        "sink_tokens": 2, "scale_dtype": torch.float32, "fit": "minmax", "partner": 0, "reason": "because",
        "rollback_tokens": 30, "token_norms": False,
    }  # fmt: skip
    plan = make_plan(XQuantConfig() if field.name == "token_norms" else CONFIG, 3)
    entry = dataclasses.replace(plan.layers[2].key, **{field.name: other[field.name]})
    assert entry != plan.layers[2].key
    assert BufferPlan.from_dict(json.loads(json.dumps(entry.to_dict())), "here") == entry


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: d["layers"][0]["key"].update(bits=5), "layer 0 keys: k_bits must be one of .* got 5"),
        (lambda d: d["layers"][0]["key"].update(scheme="tree"), "layer 0 keys: scheme must be one of .* got 'tree'"),
        (lambda d: d["layers"][1]["value"].update(fit="median"), "layer 1 values: fit must be one of .* got 'median'"),
        (lambda d: d["layers"][1]["value"].update(scale_dtype="int8"), "layer 1 values: scale_dtype must be one of"),
        (lambda d: d["layers"][1]["value"].update(scale_dtype="none"), "layer 1 values: scale_dtype must be one of"),
        (lambda d: d["layers"][1]["value"].pop("eta"), "layer 1 values: an entry of a plan must have the fields"),
        (lambda d: d["layers"][1].pop("value"), "layer 1 values: an entry .* got None"),
        (lambda d: d["layers"][1]["value"].update(partner=1), "layer 1 values: only the upper layer of a pair"),
        (lambda d: d["layers"][0]["value"].update(partner=1), "layer 0 values: only the upper layer of a pair"),
        (lambda d: d["layers"][0]["value"].update(bits=2), "layer 1 values: layers that share codes must agree"),
        (lambda d: d["layers"][0]["key"].update(residual_length=12), "multiple of k_group_size, got 12 and 8"),
        (
            lambda d: d["layers"][1]["value"].update(residual_length=16),
            "layer 1 values: layers that share codes must agree in residual_length, got 8 and 16",
        ),
        (lambda d: d["layers"].clear(), "one layer at least"),
        (lambda d: d.pop("layers"), "no plan as Plan.to_json writes it"),
        (lambda d: d.update(xquant_plan=2), "version 2"),
    ],
)  # fmt: skip
def test_files_that_are_no_plan(change, words):
    data = json.loads(make_plan(CONFIG, 2).to_json())
    change(data)
    with pytest.raises(ConfigError, match=words):
        Plan.from_json(json.dumps(data))


def test_text_that_is_no_json():
    with pytest.raises(ConfigError, match="no plan"):
        Plan.from_json("bits: 2")


def test_printed():
    text = str(make_plan(CONFIG.replace(v_bits=(2, 1, 1, 1)), 4))
    assert "layers 0 and 1 differ in bits: 2 and 1" in text and "reads the codes of the layer below" in text
    assert text.count("keys") == text.count("values") == 4


def test_a_cache_from_a_plan_is_that_of_its_config():
    model = tiny("llama")
    caches = [XQuantCache(model.config, 32, config=c) for c in (CONFIG, make_plan(CONFIG, 2))]
    with torch.no_grad():
        logits = [model(IDS, past_key_values=cache).logits for cache in caches]
    assert torch.equal(*logits)
    assert [s.spec for s in caches[0].states] == [s.spec for s in caches[1].states]
    assert caches[0].group.plan == caches[1].group.plan == make_plan(CONFIG, 2)


def test_another_number_of_layers():
    model = tiny("llama")
    with pytest.raises(ConfigError, match="the plan is for 3 quantized layers, the model has 2"):
        XQuantCache(model.config, 32, config=make_plan(CONFIG, 3))


def test_a_plan_no_config_can_say_through_cache_and_takeover(attended_by):
    """Wide values in the first layer, other windows in the second, longer ones of keys."""
    model = tiny("llama")
    plan = changed(make_plan(CONFIG.replace(share_values_from=None), 2), 0, "value", bits=8)
    plan = changed(changed(plan, 1, "key", residual_length=16), 1, "value", residual_length=12)
    ours, theirs = XQuantCache(model.config, 48, config=plan), StaticCache(config=model.config, max_cache_len=48)
    ids = torch.arange(3, 40)[None]
    step = torch.compile(model.forward, backend=interpreted(config=plan), dynamic=False)
    out = {id(ours): [], id(theirs): []}
    with torch.no_grad():
        for cache in (ours, theirs):
            model(ids[:, :30], past_key_values=cache)
            for t in range(30, 34):
                out[id(cache)].append(step(ids[:, t : t + 1], past_key_values=cache).logits)
    assert counters["xquant"]["fuse_decode"] > 0
    specs = [s.spec for s in ours.states]
    assert [(s.bits, s.residual_length) for s in specs] == [(2, 8), (8, 8), (2, 16), (1, 12)]
    taken = [buffer.spec for layer in theirs.layers for buffer in (layer.keys, layer.values)]
    assert isinstance(theirs.layers[0].keys, QuantizedKV) and taken == specs
    # The first step of the takeover sees what it takes over quantized: the same tokens as the other cache.
    torch.testing.assert_close(out[id(ours)][1:], out[id(theirs)][1:], rtol=1e-3, atol=1e-3)


def test_options_that_differ_from_the_plan_in_use(attended_by):
    model = tiny("llama")
    cache = XQuantCache(model.config, 32, config=make_plan(CONFIG, 2))
    other = parse(None, {"config": make_plan(CONFIG.replace(v_bits=2), 2)})
    same = interpreted(config=CONFIG)  # a config that means the same plan
    with torch.no_grad():
        model(IDS, past_key_values=cache)
        torch.compile(model.forward, backend=same)(IDS[:, :1], past_key_values=cache)
        torch._dynamo.reset()
        with pytest.raises(Exception, match="options differ from the config of the XQuantCache"):
            torch.compile(model.forward, backend=interpreted(config=other.config))(IDS[:, :1], past_key_values=cache)


def test_unequal_entries_of_a_layer_are_not_fused():
    """The kernel knows one number of sinks: keys and values of others are read dequantized, and explain says so."""
    model = tiny("llama")
    plan = changed(make_plan(CONFIG, 2), 0, "value", sink_tokens=2)
    plan = changed(plan, 1, "value", sink_tokens=2)
    cache = XQuantCache(model.config, 32, config=plan)
    with torch.no_grad():
        model(IDS, past_key_values=cache)
    sites = explain(model, IDS[:, :1], past_key_values=cache).sites
    assert [s.dequantized for s in sites] == ["keys and values differ in sink_tokens: 0 and 2"] * 2


def test_explain_says_why_layers_do_not_share():
    model = tiny("llama")
    cache = XQuantCache(model.config, 32, CONFIG.replace(v_bits=(2, 1)))
    with torch.no_grad():
        model(IDS, past_key_values=cache)
    found = explain(model, IDS[:, :1], past_key_values=cache)
    assert [s.notes for s in found.sites] == [(), ("value codes of its own: layers 0 and 1 differ in bits: 2 and 1",)]
    assert "differ in bits" in " ".join(str(found).split())


def test_a_pair_of_unequal_shape_says_so():
    plan = make_plan(CONFIG, 2)
    lower = plan.layers[0].value.bind(0, (1, 2, 32, 8), torch.float32, None)
    upper = plan.layers[1].value.bind(1, (1, 2, 32, 16), torch.float32, lower)
    assert upper.partner is None and "differ in geometry" in upper.reason


def test_layers_of_a_plan_are_pairs_of_entries():
    layer = make_plan(CONFIG, 1).layers[0]
    assert isinstance(layer, LayerPlan) and [entry.role for entry in layer] == ["key", "value"]


def test_a_hand_written_step_with_a_plan(attended_by):
    plan, seen = make_plan(CONFIG, 2), Rewrites()
    layers = quantized_layers(plan)
    step = torch.compile(two_layers, backend=seen, dynamic=False)
    with torch.no_grad():
        step(*(torch.randn(1, 2, 1, 8) for _ in range(3)), layers, torch.tensor([0]))
    assert len(seen.made) == 1
