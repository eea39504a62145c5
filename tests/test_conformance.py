"""Of thirty architectures no less is quantized and fused than docs/conformance.json says (``make conformance``)."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

from conformance import EXACT, found_in  # noqa: E402
from conformance_report import ONE_LINE, TAKEN_OVER, page, sums  # noqa: E402
from forked import in_process  # noqa: E402
from life_inductor import BY_INDUCTOR  # noqa: E402
from life_of_a_cache import SCENARIOS, Life, outcome  # noqa: E402
from life_of_a_cache import page as life_page  # noqa: E402
from life_programs import RUN_BY  # noqa: E402

pytest_plugins = ["plain_torch"]

RECORDS: dict[str, dict[str, Any]] = json.loads((ROOT / "docs" / "conformance.json").read_text())
#: Other ways to write, to read or to attend each.
THIRTY = (
    "apertus", "arcee", "bloom", "codegen", "cohere", "cohere2", "deepseek_v32", "diffllama", "doge", "falcon_h1",
    "gemma", "gemma2", "gemma3_text", "glm", "gpt2", "gpt_bigcode", "gpt_neo", "gpt_neox", "gpt_oss", "gptj",
    "granite", "llama", "mistral", "mixtral", "nemotron", "olmo2", "opt", "phi", "qwen3", "stablelm",
)  # fmt: skip
#: Those of them that are most like another, or are in GROWING: gemma is as gemma2, cohere as cohere2, gpt2 as
#: gpt_bigcode, gpt_neox as gptj, mistral and qwen3 as llama, with a window as gemma2's. That of bloom, gemma2 and
#: llama all is fused, test_fuse_decode.py says.
ALIKE = {
    "apertus", "arcee", "bloom", "codegen", "cohere", "deepseek_v32", "falcon_h1", "gemma", "gemma2", "glm", "gpt2",
    "gpt_neox", "gpt_oss", "granite", "llama", "mistral", "mixtral", "nemotron", "olmo2", "phi", "qwen3", "stablelm",
}  # fmt: skip
#: A window with sinks, latents, an indexer and a hybrid, of those that grow by concatenation.
GROWING = ("gpt_oss", "deepseek_v3", "deepseek_v32", "falcon_h1")
LATENT = ("deepseek_v3",)  # as deepseek_v32 without an indexer
WORST = 0.25  # relative error of logits at 4 bits, of random models


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        pytest.param(name, "XQuantCache", marks=pytest.mark.slow if name in ALIKE else ())
        for name in THIRTY
        if name in RECORDS
    ]
    + [pytest.param(name, "DynamicCache", marks=pytest.mark.slow if name in LATENT else ()) for name in GROWING],
)
def test_no_less_than_recorded(name: str, kind: str, plain_torch: None) -> None:
    """More is fine: then `make conformance` renews the record."""
    record = RECORDS[name] if kind == "XQuantCache" else RECORDS[name][kind]
    logging.disable(logging.WARNING)
    try:
        with torch.no_grad():
            found = found_in(name, kind)
    finally:
        logging.disable(logging.NOTSET)
    assert found["sites"] >= record["sites"]
    assert found["quantized"] >= record["quantized"], found["left"]
    assert found["fused"] >= record["fused"], found["read dequantized"]


def test_what_is_recorded_is_right() -> None:
    """Exact at 16 bits, nothing refused by a self-check, each attention that is left with a reason."""
    ran = {name: record for name, record in RECORDS.items() if not record.get("eager", "not run")}
    assert len(ran) >= 30
    for name, record in ran.items():
        assert record["error at 16 bits"] < EXACT and record["same tokens"], name
        assert record["error at 4 bits"] < WORST and not record["refused by self_check"], name
        assert record["sites"] == record["quantized"] + sum(record["left"].values()), name
        assert all(record["left"]), name
    for name, record in RECORDS.items():
        for each in (record[kind] for kind in TAKEN_OVER if not record.get(kind, {}).get("eager", "not run")):
            assert each["error at 16 bits"] < EXACT and each["same tokens"], name
            assert each["sites"] == each["quantized"] + sum(each["left"].values()) and all(each["left"]), name
        line = record.get(ONE_LINE, {})
        if not line.get("eager", "not run"):
            assert line["error at 4 bits"] < WORST and not line["refused by self_check"], name
            assert line["sites"] == line["quantized"] + sum(line["left"].values()) and all(line["left"]), name


def test_what_generate_makes_by_itself_is_quantized_as_an_xquant_cache_is() -> None:
    """Of every architecture that runs with a ``DynamicCache``."""
    of_kind = {name: record["DynamicCache"] for name, record in RECORDS.items()}
    ran = [record for record in of_kind.values() if not record["eager"]]
    sites, quantized, fused = (sum(record[name] for record in ran) for name in ("sites", "quantized", "fused"))
    assert len(ran) >= 180 and quantized >= 0.97 * sites and fused >= 0.9 * quantized


def test_the_page_is_what_the_records_say() -> None:
    text = (ROOT / "docs" / "conformance.md").read_text()
    assert sums(RECORDS) in text
    assert [line.split(" | ")[0] for line in text.splitlines() if line[:2] == "| "][1:] == [f"| {n}" for n in RECORDS]


def test_a_skip_shows() -> None:
    record = {"eager": "", "sites": 2, "quantized": 1, "fused": 1, "left": {"a reason": 1}, "error at 16 bits": 1e-6}
    text = page({"one": {**record, "same tokens": True}}, 2)
    assert "(1 examined)" in text and "quantized: 1; fused: 1" in text and "| 1x a reason |" in text
    assert "exact at 16 bits, with the same greedy tokens: 1 of 1" in text and "left 1 times: a reason" in text


def test_nothing_in_the_life_of_a_cache_is_wrong() -> None:
    """By the last `make conformance`; the same things are tested one by one elsewhere."""
    lived = json.loads((ROOT / "docs" / "life.json").read_text())
    assert list(lived) == list(SCENARIOS)
    for name, row in lived.items():
        assert len(row) == 6 and all("wrong" not in found for found in row.values()), name
    assert (ROOT / "docs" / "life.md").read_text() == life_page(lived)


#: What takes few seconds to live through; the others are slow.
QUICK = ('pipeline("text-generation")', "a pipeline of two compiled stages", "each layer compiled by itself")
AGAIN = [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in RUN_BY | BY_INDUCTOR]


@pytest.mark.parametrize("name", AGAIN)
def test_what_runs_on_a_cache_comes_out_as_recorded(name: str) -> None:
    """With an ``XQuantCache``; the quick ones compile no more than that takes."""
    mode = "eager" if name == QUICK[0] else "compiled"
    recorded = json.loads((ROOT / "docs" / "life.json").read_text())[name][f"XQuantCache, {mode}"]
    assert in_process(outcome, 300, name, "XQuantCache", mode) == recorded


def test_what_is_wrong_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def differs(life: Life) -> list[torch.Tensor]:
        return [torch.ones(3) * (1 if life.mode == "plain" else 2)]

    def fails(life: Life) -> list[torch.Tensor]:
        if life.mode != "plain":
            raise ValueError("in words")
        return [torch.ones(3)]

    monkeypatch.setitem(SCENARIOS, "differs", differs)
    monkeypatch.setitem(SCENARIOS, "fails", fails)
    found = {name: {"XQuantCache, eager": outcome(name, "XQuantCache", "eager")} for name in ("differs", "fails")}
    assert found["differs"] == {"XQuantCache, eager": {"wrong": "off by 1.0e+00"}}
    text = life_page(found)
    assert "**wrong: off by 1.0e+00**" in text and "| fails | error 1 |" in text and "1. ValueError: in words" in text
