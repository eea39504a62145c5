"""Retrieval, error anatomy, plots, the command line, and a real model where one was fetched."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from states import range_config

from xquant_fx import XQuantConfig, anatomy_report, needle_report, quality_report
from xquant_fx.errors import ArgumentError
from xquant_fx.evaluate import cli, models, needle
from xquant_fx.evaluate.attention import plain
from xquant_fx.evaluate.measures import Depth, Summary
from xquant_fx.evaluate.needle import Haystack, NeedleReport
from xquant_fx.evaluate.plots import pareto_front, plot_needle, plot_quality
from xquant_fx.evaluate.quality import Reading
from xquant_fx.evaluate.report import Quality, QualityReport
from xquant_fx.evaluate.settings import Setting
from xquant_fx.evaluate.simulate import Prefilled, simulated_logits
from xquant_fx.evaluate.size import Size
from xquant_fx.evaluate.steps import step_logits
from xquant_fx.evaluate.windows import cut_windows

pytest_plugins = ["plain_torch"]

ROOT = Path(__file__).resolve().parents[1]
REAL = ROOT / "models" / "smollm2-135m-instruct"
SHORT = dict(residual_length=16, k_group_size=16)


class Letters:
    """A tokenizer of one token per character, and a BOS token."""

    def __call__(self, text, add_special_tokens=True, verbose=True):
        ids = [ord(c) % 125 + 3 for c in text]
        return {"input_ids": [1, *ids] if add_special_tokens else ids}


@pytest.fixture
def tokens():
    return torch.randint(3, 128, (1, 80), generator=torch.Generator().manual_seed(1))


def test_needle_stands_where_it_should():
    hay = Haystack(Letters(), "x" * 400, torch.device("cpu"))
    room = 250 - len("^" + needle.NEEDLE.format(key=12345))
    for depth, before in ((0.0, 0), (0.5, room // 2), (1.0, room)):
        ids, prompt = hay.window(250, depth, 0)
        text = "".join(chr(i - 3) if i > 1 else "^" for i in ids[0].tolist())
        assert prompt == 250
        assert text.startswith("^" + "x" * before + "\n\nThe pass key is ")
        assert text[250:].startswith(needle.QUESTION + " ")
        key = text[-5:]
        assert hay.answer_tokens == 6
        assert text.count(key) == 3
        assert key.isdigit()
    for length, depth in ((20, 0.5), (900, 0.5), (250, 1.5)):
        with pytest.raises(ArgumentError, match=rf"to 400 tokens \(the text\), got {depth} and {length}"):
            hay.window(length, depth, 0)


def test_needle_report_counts_whole_answers(tiny_llama, monkeypatch):
    """A model that knows the answer but for one digit at 8 bits, as the logits are made to say."""

    def logits(window, keep, wrong):
        made = torch.nn.functional.one_hot(window.ids[:, keep + 1], 200).float()
        made[:, -1] *= -1 if wrong else 1
        return made

    monkeypatch.setattr(needle, "reference_logits", lambda window, keep: logits(window, keep, False))
    monkeypatch.setattr(
        needle, "simulated_logits", lambda window, keep, config: (logits(window, keep, config.k_bits == 8), None)
    )
    settings = {"good": XQuantConfig(), "bad": range_config(k_bits=8)}
    report = needle_report(
        tiny_llama(layers=1), Letters(), "x" * 300, settings, lengths=[150, 200], depths=[0.0, 1.0], trials=2
    )
    assert report.found == {needle.FULL: [[1.0] * 2] * 2, "good": [[1.0] * 2] * 2, "bad": [[0.0] * 2] * 2}
    assert "bad: 0.0 % of pass keys found" in str(report)
    assert "150 tokens" in str(report)


def test_greedy_decoding_writes_what_was_counted(tiny_llama, tokens):
    """One pass over the answer tells what greedy decoding does, token by token."""
    model, config, prompt, answer = tiny_llama(layers=2), range_config(**SHORT), 60, 4
    ids = tokens[:, :70]
    for _ in range(answer):
        keep = torch.tensor([ids.shape[1] - 1])
        logits, _ = step_logits(model, torch.nn.functional.pad(ids, (0, 1)), prompt, keep, config)
        ids = torch.cat([ids, logits.argmax(-1)], 1)
    settings = [Setting("a", config)]
    assert dict(needle._answers(model, ids, prompt, answer, settings))["a"] == ids[0, -answer:].tolist()
    ids[0, -2] = (ids[0, -2] + 1) % 128
    assert dict(needle._answers(model, ids, prompt, answer, settings))["a"] != ids[0, -answer:].tolist()


def test_what_follows_a_wrong_token_is_not_an_answer():
    """After it the right answer was read on, so the most likely tokens are those of a hint."""
    assert needle._written([1, 2, 3], [1, 2, 3]) == [1, 2, 3]
    assert needle._written([9, 2, 3], [1, 2, 3]) == [9]
    assert needle._written([1, 9, 3], [1, 2, 3]) == [1, 9]


def test_anatomy(tiny_llama, tokens):
    model = tiny_llama(layers=4)
    config = range_config(**SHORT, k_bits=(16, 8, 2, 2), v_bits=(16, 16, 16, 1), share_values_from=None)
    report = anatomy_report(model, tokens, config, prompt=40)
    assert [each.layer for each in report.layers] == [0, 1, 2, 3]
    exact, keys_only, coarse, both = report.layers
    assert exact.keys == exact.values == [0.0, 0.0]
    assert max(exact.output) == 0.0
    assert keys_only.values == [0.0, 0.0]
    assert keys_only.output == keys_only.output_by_keys
    assert keys_only.output_by_values == [0.0] * 4
    assert 0 < max(keys_only.keys) < 0.02 < min(coarse.keys)
    assert min(both.values) > 0.1
    assert coarse.output == coarse.output_by_keys
    assert both.output != both.output_by_keys != coarse.output_by_keys
    assert min(both.output_by_values) > 0
    assert report.worst[0] == 3
    assert report.worst[-1] == 0
    assert "worst layers by output: 3, " in str(report)


def test_anatomy_is_of_the_pass(tiny_llama, tokens):
    """The errors of the first layer, computed apart from its keys alone."""
    model, config, seen = tiny_llama(layers=1), range_config(**SHORT, k_bits=2, v_bits=16), []
    simulated_logits(Prefilled.of(model, tokens, 40), torch.tensor([50]), config, seen.append)
    keys = seen[0].keys
    n = keys.read.shape[2]
    assert n == 64  # at the last of 79 tokens, 4 blocks of 16 are quantized
    assert torch.equal(keys.limits, torch.arange(40, 79) // 16 * 16)
    assert seen[0].values.read.shape[2] == 0
    error = (keys.read - keys.full[:, :, :n])[0].flatten(1).norm(dim=1) / keys.full[0, :, :n].flatten(1).norm(dim=1)
    report = anatomy_report(model, tokens, config, prompt=40)
    assert report.layers[0].keys == pytest.approx(error.tolist(), rel=1e-5)
    assert plain(keys.full, 3).limits.tolist() == [0, 0, 0]


def test_pareto_front():
    points = [(2.0, 0.5), (1.0, 0.9), (3.0, 0.6), (4.0, 0.1), (2.0, 0.7)]
    assert pareto_front(points) == [1, 0, 3]


def report_of(**kl) -> QualityReport:
    """A report with one setting per name."""
    depths = [Depth(0, 9, 0.1, 1.0), Depth(10, 19, 0.2, 1.0)]
    percentiles = {p: 0.0 for p in ("50", "90", "99", "99.9")}
    return QualityReport("title", [
        Quality(name, Summary(2, 20, value, 0.01, [value, value], percentiles, 1.0, 9.0, 10.0, 0.1, 0.9, 0.0, depths),
                Size(2.0 + i, 3.0, 100, 4.0))
        for i, (name, value) in enumerate(kl.items())
    ])  # fmt: skip


def test_plots(tmp_path):
    pytest.importorskip("matplotlib")
    plot_quality(report_of(a=0.5, b=0.1, full=0.0), tmp_path / "quality.png")
    plot_needle(NeedleReport("title", [8, 16], [0.0, 1.0], {"a": [[1.0, 0.5], [0.0, 1.0]]}), tmp_path / "needle.png")
    for name in ("quality", "needle"):
        assert (tmp_path / f"{name}.png").read_bytes()[:4] == b"\x89PNG"


def test_a_plot_without_matplotlib(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ArgumentError, match="a plot needs matplotlib"):
        plot_quality(report_of(a=0.5), tmp_path / "quality.png")


EVAL = ("eval", "examples/model", "--text", "LICENSE", "--window", "300", "--prompt", "200", "--windows", "2")


def test_command_eval(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(ROOT)
    (tmp_path / "mine.json").write_text(range_config(k_bits=8, v_bits=8).to_json())
    out = tmp_path / "results.json"
    args = ["--preset", "kivi-2", "full", "--config", str(tmp_path / "mine.json"), "--out", str(out)]
    assert cli.main([*EVAL, *args]) == 0
    printed = capsys.readouterr().out
    assert "examples/model, float32: 2 window(s) of 300 tokens, prompt 200, 1 position in 2, simulated steps" in printed
    (head,) = (line.split() for line in printed.splitlines() if "mine" in line and "before" not in line)
    assert head == ["kivi-2", "full", "mine"]
    assert out.exists()


def test_command_anatomy_and_needle(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    common = ("examples/model", "--text", "LICENSE", "--preset", "kivi-2")
    assert cli.main(["anatomy", *common, "--window", "300", "--prompt", "200"]) == 0
    assert "worst layers by output" in capsys.readouterr().out
    assert cli.main(["needle", *common, "--lengths", "150", "--depths", "0.5", "--trials", "1"]) == 0
    assert "kivi-2: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--window", "100"], "a window must hold 2 tokens after its prompt of 200, got 100 in all"),
        (["--window", "99999"], "(--window 99999 --prompt 200: for a short text give less of both)"),
        (["--compile"], "compiled=True needs steps=True"),
        (["--config", "LICENSE"], "LICENSE must be what XQuantConfig.to_json or Plan.to_json writes"),
        (["--text", "nowhere.txt"], "nowhere.txt"),
    ],
)
def test_command_says_what_is_wrong(monkeypatch, capsys, more, message):
    monkeypatch.chdir(ROOT)
    assert cli.main([*EVAL, *more]) == 2
    assert message in capsys.readouterr().err


def test_module_runs_as_the_command():
    done = subprocess.run([sys.executable, "-m", "xquant_fx", "--help"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0
    assert all(name in done.stdout for name in ("eval", "needle", "anatomy"))


@pytest.fixture(scope="module")
def real():
    """(model, windows [1, 480]) of SmolLM2 on the license."""
    if not (REAL / "config.json").exists():
        pytest.skip("needs models/smollm2-135m-instruct: run `make models`")
    model, tokenizer = models.load(str(REAL), torch.float32)
    return model, cut_windows(tokenizer, (ROOT / "LICENSE").read_text(), 480, 1)


@pytest.mark.slow  # test_evaluate.py has it for the embedded model
@pytest.mark.real
def test_real_simulation_equals_steps(real):
    model, ids = real
    keep = torch.arange(450, 479)
    simulated, _ = simulated_logits(Prefilled.of(model, ids, 450), keep, XQuantConfig())
    steps, _ = step_logits(model, ids, 450, keep, XQuantConfig())
    # Scales are stored in 8 bits: one that tips over at a tie moves a logit a little.
    assert float((simulated.log_softmax(-1) - steps.log_softmax(-1)).abs().max()) < 2e-2


@pytest.mark.real
def test_real_presets_are_in_order(real, no_compiler):
    model, ids = real
    names = ("full", "kivi-4", "kivi-2", "xquant-2.7", "xquant-2.2", "xquant-1.4", "xquant", "xquant-paper")
    settings = {name: XQuantConfig.preset(name) for name in names}
    report = quality_report(model, ids, settings, reading=Reading(400, 4))
    kl = {name: report[name].summary.kl for name in names}
    assert kl["full"] == 0 < kl["kivi-4"] < 0.1 * kl["kivi-2"]
    assert kl["xquant-2.7"] < kl["xquant-2.2"] < kl["xquant-1.4"] < 0.2 * kl["kivi-2"]
    assert kl["xquant-2.2"] < 0.05  # an odd text, and a short one
    assert kl["kivi-2"] < kl["xquant"] < kl["xquant-paper"]
