"""Which model a plan is for: known again in any dtype and after saving, told from a trained one, and how to get by."""

from __future__ import annotations

import copy
import dataclasses
import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from xquant_fx import ConfigError, Plan, XQuantCache, XQuantConfig, make_plan
from xquant_fx.evaluate.anatomy import anatomy_report
from xquant_fx.evaluate.needle import needle_report
from xquant_fx.evaluate.quality import Reading, quality_report
from xquant_fx.plan.model_facts import ModelFacts
from xquant_fx.plan.model_weights import TOLERANCE, sample_of, why_another
from xquant_fx.warn_once import forget

SHORT = XQuantConfig(residual_length=16, k_group_size=16, sink_tokens=2)


@pytest.fixture
def model(tiny_llama):
    return tiny_llama(layers=4, head_dim=32)


@pytest.fixture
def plan(model):
    return dataclasses.replace(make_plan(SHORT, 4), model=ModelFacts.of(model))


@torch.no_grad()
def merged(model, share: float, rank: int = 4):
    """A copy with an adapter merged into the query weights of all layers, ``share`` times as large as they are."""
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(3)
    for layer in other.model.layers:
        w = layer.self_attn.q_proj.weight
        step = torch.randn(w.shape[0], rank, generator=generator) @ torch.randn(rank, w.shape[1], generator=generator)
        w += share * w.norm() / step.norm() * step
    return other


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_same_model_in_another_dtype(model, plan, dtype):
    # float16 weights that are made float32 must be known again by a plan made on bfloat16 ones, too.
    for made_on in (model, copy.deepcopy(model).to(torch.bfloat16)):
        facts = ModelFacts.of(made_on)
        facts.check(copy.deepcopy(model).to(dtype))
        facts.check(copy.deepcopy(model).to(dtype).to(torch.float32))
    XQuantCache(copy.deepcopy(model).to(dtype), max_cache_len=32, config=plan)


def test_the_same_model_from_a_folder(model, plan, tmp_path):
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    again = Plan.from_json(plan.to_json())
    assert again == plan and hash(again) == hash(plan)
    again.check_model(loaded)
    again.check_model(torch.compile(loaded))
    assert again.to_json() == plan.to_json()


@pytest.mark.parametrize("share", [0.05, 0.3])
def test_a_merged_adapter_makes_another_model(model, plan, share):
    other = merged(model, share)
    message = (
        r"another model than this: its weights '\d\.self_attn\.q_proj\.weight' are \d+\.\d% apart .*merging an "
        r'adapter; make a plan for this one, .* plan.for_any_model\(\), or delete "model" from its file'
    )
    ids = torch.randint(3, 128, (1, 64))
    for use in (
        plan.check_model,
        lambda m: XQuantCache(m, max_cache_len=32, config=plan),
        lambda m: quality_report(m, ids, {"mine": plan}, reading=Reading(40)),
        lambda m: needle_report(m, None, "", {"mine": plan}),
        lambda m: anatomy_report(m, ids, plan, prompt=40),
    ):
        with pytest.raises(ConfigError, match=message):
            use(other)
    skipped = quality_report(other, ids, {"mine": plan, "any": SHORT}, reading=Reading(40), skip_invalid=True)
    assert list(skipped.refused) == ["mine"]
    # A config knows no weights; and there is the way out that the message names.
    XQuantCache(other.config, max_cache_len=32, config=plan)
    free = plan.for_any_model()
    XQuantCache(other, max_cache_len=32, config=free)
    data = json.loads(plan.to_json())
    del data["model"]
    assert Plan.from_json(json.dumps(data)) == free


def test_what_no_dtype_would_tell_apart_is_the_same_model(model, plan):
    plan.check_model(merged(model, TOLERANCE / 20))


def test_the_largest_difference_decides():
    ours = (("0.a", (1.0, 2.0)), ("1.a", (3.0, 0.0)))
    assert why_another(ours, ours) == ""
    assert "'1.a' are 50.0% apart" in why_another(ours, (("0.a", (1.1, 2.0)), ("1.a", (3.0, 1.5))))
    assert "no floating-point weights called '1.a'" in why_another(ours, ours[:1])
    assert "inf% apart" in why_another(ours, (("0.a", (1.0,)), ours[1]))
    # What float16 cannot hold.
    assert why_another((("0.a", (3e-9, 0.0)),), (("0.a", (0.0, 0.0)),)) == ""


def test_quantized_weights_make_another_model(model, plan):
    other = copy.deepcopy(model)
    q = other.model.layers[0].self_attn.q_proj
    q.weight = torch.nn.Parameter(q.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(ConfigError, match=r"no floating-point weights called '0\.self_attn\.q_proj\.weight'"):
        plan.check_model(other)


def test_weights_that_are_elsewhere_are_passed_over_with_a_warning(model, plan, caplog):
    forget()
    plan.check_model(copy.deepcopy(model).to("meta"))
    assert "a plan's weights are not compared with the model's, which are not in memory" in caplog.text
    assert sample_of(copy.deepcopy(model).to("meta")) is None
    no_layers = torch.nn.Linear(2, 2)
    no_layers.config = model.config
    assert sample_of(no_layers) is None


def test_files_without_weights_are_read(plan, model):
    data = json.loads(plan.to_json())
    del data["model"]["weights"]
    older = Plan.from_json(json.dumps(data))
    assert older.model == dataclasses.replace(plan.model, weights=None) == ModelFacts.of(model.config)
    older.check_model(merged(model, 0.3))
    for weights in ({"a": "1"}, {"a": [None]}, {}, [1.0]):
        data["model"]["weights"] = weights
        with pytest.raises(ConfigError, match="weights of the model of a plan must be lists of numbers by name, got"):
            Plan.from_json(json.dumps(data))
