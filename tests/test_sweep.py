"""Sweeps over fields of a config: which settings, what they cost, and what cannot be run, with the rule."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from states import range_config

from xquant_fx import ConfigError, XQuantConfig, make_plan, sweep_report
from xquant_fx.evaluate import cli, quality
from xquant_fx.evaluate.quality import Reading
from xquant_fx.evaluate.settings import Setting
from xquant_fx.evaluate.simulate import simulated_logits
from xquant_fx.evaluate.sweep import parse_grid, sweep

ROOT = Path(__file__).resolve().parents[1]
SHORT = range_config(residual_length=16, k_group_size=16, share_values_from=None)


def test_grids_are_read():
    words = ["residual_length=64,128", "v_group_size=none,32", "k_bits=2,1.5,2:2:1:1", "scale_dtype=float32"]
    assert parse_grid([*words, "shared_fit=minmax"]) == {
        "residual_length": [64, 128], "v_group_size": [None, 32], "k_bits": [2, 1.5, (2, 2, 1, 1)],
        "scale_dtype": [torch.float32], "shared_fit": ["minmax"],
    }  # fmt: skip
    for wrong in (["k_bits"], ["k_bits="], ["k_bits=2", "k_bits=4"]):
        with pytest.raises(ConfigError, match=f"FIELD=VALUE,VALUE,... with each field once, got '{wrong[-1]}'"):
            parse_grid(wrong)


def test_one_grid_is_a_product_and_two_are_not():
    base = Setting("xquant-2.2", XQuantConfig(residual_length=256))
    swept = sweep(base, {"residual_length": [128, 256], "sink_tokens": [0, 4]})
    names = [
        "residual_length=128 sink_tokens=0",
        "residual_length=128 sink_tokens=4",
        "residual_length=256 sink_tokens=0",
    ]
    assert [s.name for s in swept.settings] == [
        "xquant-2.2",
        *(f"xquant-2.2 {name}" for name in names),
    ]  # one is the base
    assert swept.settings[1].config == XQuantConfig(residual_length=128, sink_tokens=0)
    apart = sweep(base, {"residual_length": [128, 256]}, {"sink_tokens": [0, 4], "k_bits": [(2, 3)]})
    assert [s.name.removeprefix("xquant-2.2 ") for s in apart.settings[1:]] == [
        "residual_length=128", "sink_tokens=0 k_bits=2:3", "sink_tokens=4 k_bits=2:3",
    ]  # fmt: skip


def test_what_is_not_possible_is_kept_with_the_rule():
    swept = sweep(Setting("a", XQuantConfig()), {"residual_length": [64, 128], "k_bits": [2, 5]})
    assert swept.refused["a residual_length=64 k_bits=2"] == (
        "residual_length must be a multiple of k_group_size, got 64 and 128"
    )
    assert "k_bits must be one of" in swept.refused["a residual_length=128 k_bits=5"]
    assert len(swept.refused) == 3
    assert [s.name for s in swept.settings] == ["a", "a residual_length=128 k_bits=2"]
    for grid in ({"nonsense": [1]}, {"k_bits": []}):
        with pytest.raises(ConfigError, match="a sweep gives values to fields of XQuantConfig"):
            sweep(Setting("a", XQuantConfig()), grid)
    with pytest.raises(ConfigError, match="and 'a' is a Plan"):
        sweep(Setting("a", make_plan(XQuantConfig(), 2)), {"k_bits": [2]})


def test_report(tiny_llama, tmp_path, monkeypatch):
    model, out = tiny_llama(layers=2), tmp_path / "sweep.json"
    windows = torch.randint(3, 128, (2, 60), generator=torch.Generator().manual_seed(1))
    given = dict(reading=Reading(29, 3), out=str(out))
    grid = {"v_bits": [1, 8], "v_group_size": [None, 5]}
    found = sweep_report(model, windows, SHORT, grid, **given)
    assert [q.name for q in found.report.qualities] == [
        "base", "base v_bits=8 v_group_size=None",
    ]  # fmt: skip
    assert set(found.refused) == {"base v_bits=1 v_group_size=5", "base v_bits=8 v_group_size=5"}
    assert all("v_group_size" in reason for reason in found.refused.values())  # known once the model is there
    assert found.true_front == found.front == ["base", "base v_bits=8 v_group_size=None"]
    text = str(found)
    assert "not possible" in text and "more than the base" in text and "base v_bits=8 v_group_size=None" in text
    stored = json.loads(out.read_text())
    assert stored["refused"] == found.refused and stored["front"] == found.front
    assert stored["grids"] == [{"v_bits": ["1", "8"], "v_group_size": ["None", "5"]}]

    ran = []
    monkeypatch.setattr(quality, "simulated_logits", lambda *a: ran.append(a) or simulated_logits(*a))
    assert sweep_report(model, windows, SHORT, grid, **given).report == found.report
    assert len(ran) == 2  # what was refused is tried again, on each first window
    with pytest.raises(ConfigError, match=r"base: .*v_group_size"):
        sweep_report(model, windows, SHORT.replace(v_group_size=5), {"v_bits": [1]}, reading=Reading(29, 3))


def test_front_leaves_out_what_is_beaten(tiny_llama):
    windows = torch.randint(3, 128, (1, 60), generator=torch.Generator().manual_seed(1))
    found = sweep_report(tiny_llama(layers=2), windows, SHORT, {"v_bits": [1, 2, 8]}, {"eta_1bit": [0.49]},
                         reading=Reading(29, 1))  # fmt: skip
    worst = max(found.report.qualities, key=lambda q: q.summary.kl).name
    assert worst == "base eta_1bit=0.49"
    assert worst not in found.front


def test_command(monkeypatch, capsys, tmp_path):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(ROOT)
    common = ("eval", "examples/model", "--text", "LICENSE", "--window", "300", "--prompt", "200", "--windows", "1")
    plot = tmp_path / "sweep.png"
    args = ["--preset", "kivi-2", "--sweep", "residual_length=64,128", "k_group_size=64", "--plot", str(plot)]
    assert cli.main([*common, "--stride", "9", *args]) == 0
    printed = capsys.readouterr().out
    assert "kivi-2 residual_length=64 k_group_size=64" in printed and "not possible" not in printed
    assert plot.read_bytes()[:4] == b"\x89PNG"
    for more, message in (
        (["--sweep", "k_bits"], "FIELD=VALUE"),
        (["--preset", "full", "kivi-2", "--sweep", "k_bits=2"], "one preset or config, got"),
    ):
        assert cli.main([*common, *more]) == 2
        assert message in capsys.readouterr().err
