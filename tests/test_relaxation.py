"""eta by the size of the group: against a Monte Carlo, in configs, plans, specs, and in what is stored."""

from __future__ import annotations

import json

import pytest
import torch
from numeric import seeded
from states import range_config, spec_of

from xquant_fx import ConfigError, XQuantCache, XQuantConfig, explain, make_plan, quantize
from xquant_fx.compiler.options import parse
from xquant_fx.kernels.reference import own_codes
from xquant_fx.kernels.relaxation import spread_eta, unbiased_eta
from xquant_fx.plan.plan import Plan

AUTO = dict(eta_1bit="auto", eta_2bit="auto")


def read_back(group: int, bits: int, eta: float, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(Gaussian groups, what is read of them), both about their group's mean: float64 [rows, group]."""
    x = torch.randn(rows, group, generator=seeded(group + bits))
    codes, scale, zero = own_codes(x, bits=bits, eta=eta, dim=1, dtype=torch.float32)
    x, y = x.double(), (codes * scale + zero).double()
    return x - x.mean(1, keepdim=True), y - y.mean(1, keepdim=True)


@pytest.mark.parametrize("bits", [1, 2])
@pytest.mark.parametrize("group", [3, 16, 128])
def test_against_a_monte_carlo(group: int, bits: int) -> None:
    rows = 400_000 // group
    x, y = read_back(group, bits, unbiased_eta(group, bits), rows)
    slope = (x * y).sum() / (x * x).sum()
    assert slope == pytest.approx(1, abs=0.006)
    x, y = read_back(group, bits, spread_eta(group, bits), rows)
    assert ((y * y).sum() / (x * x).sum()).sqrt() == pytest.approx(1, abs=0.006)
    # It is the size that matters: that of another group is off by much more.
    x, y = read_back(group, bits, unbiased_eta(1024, 1), rows)
    assert abs((x * y).sum() / (x * x).sum() - 1) > 0.02


def test_known_values() -> None:
    """Of ../docs/quality.md, by simulation."""
    found = [round(unbiased_eta(group, 1), 3) for group in (16, 64, 128, 256)]
    assert found == [0.151, 0.225, 0.250, 0.271]
    # One or two numbers are read back as they are.
    assert {f(group, bits) for f in (unbiased_eta, spread_eta) for group in (1, 2) for bits in (1, 2)} == {0.0}


def test_configs_say_auto() -> None:
    config = range_config(**AUTO, v_bits=(1, 2, 4))
    assert XQuantConfig.from_json(config.to_json()) == config != range_config(v_bits=(1, 2, 4))
    assert [config.eta("per_token", bits) for bits in (1, 2, 4, 16)] == ["auto", "auto", 0, 0]
    assert config.eta("per_token_rotated", 1) == 0
    assert parse(None, {"preset": "kivi-2", "eta_2bit": "auto"}).config.eta_2bit == "auto"
    for bad in ("half", "", None, True):
        with pytest.raises(ConfigError, match=rf'eta_2bit must be in \[0, 0.5\) or "auto", got {bad!r}'):
            XQuantConfig(eta_2bit=bad)


@pytest.mark.parametrize(("v_group", "dim"), [(None, 64), (None, 128), (16, 64)])
def test_specs_have_the_number_of_their_group(v_group: int | None, dim: int) -> None:
    config = range_config(**AUTO, k_bits=2, v_bits=1, k_group_size=32, residual_length=64, v_group_size=v_group)
    specs = [spec_of(config, role, (1, 2, 256, dim), torch.float32) for role in ("key", "value")]
    assert [spec.eta for spec in specs] == [spread_eta(32, 2), unbiased_eta(v_group or dim, 1)]
    wide = config.replace(v_bits=4)
    assert spec_of(wide, "value", (1, 2, 256, dim), torch.float32).eta == 0


def test_plans_keep_and_print_it() -> None:
    plan = make_plan(range_config(**AUTO, v_bits=(1, 4)), 2)
    again = Plan.from_json(plan.to_json())
    assert again == plan
    assert again.layers[0].value.eta == "auto"
    assert [entry.eta_text for layer in plan.layers for entry in layer] == [
        "0.057 (auto)", "auto", "0.057 (auto)", "0.000",
    ]  # fmt: skip
    assert "0.057 (auto)" in str(plan)
    assert "0.045" in str(make_plan(range_config(), 2))
    assert {entry.eta_text for layer in make_plan(XQuantConfig(), 2).layers for entry in layer} == {"-"}
    data = json.loads(plan.to_json())
    data["layers"][0]["key"]["eta"] = "wide"
    with pytest.raises(ConfigError, match=r'layer 0 keys: eta_1bit must be in \[0, 0.5\) or "auto", got \'wide\''):
        Plan.from_json(json.dumps(data))


def test_explain_prints_it(tiny_llama) -> None:
    model = tiny_llama(layers=2, head_dim=32)
    caches = [XQuantCache(model.config, 64, config) for config in (range_config(**AUTO), XQuantConfig())]
    auto, default = (explain(model, torch.arange(3, 9)[None], past_key_values=cache) for cache in caches)
    assert [(s.k_eta, s.v_eta) for s in auto.sites] == [
        (spread_eta(128, 2), unbiased_eta(32, 1)),
        (spread_eta(128, 2), None),  # fitted to the codes of layer 0
    ]
    assert "0.057, 0.192" in str(auto)
    assert [(s.k_eta, s.v_eta) for s in default.sites] == [(None, None)] * 2


def test_quantize_takes_auto() -> None:
    x = torch.randn(4, 64, generator=seeded(0))
    for bits, eta in ((1, unbiased_eta(64, 1)), (2, unbiased_eta(64, 2)), (4, 0.0)):
        chosen, fixed = (quantize(x, bits=bits, group_size=64, dim=-1, eta=e) for e in ("auto", eta))
        assert torch.equal(chosen.scale, fixed.scale) and torch.equal(chosen.zero, fixed.zero)
    with pytest.raises(ConfigError, match=r'eta must be in \[0, 0.5\) or "auto", got \'self\''):
        quantize(x, bits=1, group_size=64, dim=-1, eta="self")
