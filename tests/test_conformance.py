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
from conformance_report import page, sums  # noqa: E402

RECORDS: dict[str, dict[str, Any]] = json.loads((ROOT / "docs" / "conformance.json").read_text())
#: Other ways to write, to read or to attend each.
THIRTY = (
    "apertus", "arcee", "bloom", "codegen", "cohere", "cohere2", "deepseek_v3", "diffllama", "doge", "falcon",
    "gemma", "gemma2", "gemma3_text", "glm", "gpt2", "gpt_bigcode", "gpt_neo", "gpt_neox", "gpt_oss", "gptj",
    "granite", "llama", "mistral", "mixtral", "nemotron", "olmo2", "opt", "phi", "qwen3", "stablelm",
)  # fmt: skip
WORST = 0.5  # relative error of logits at 4 bits, of random models, whose routers may choose other experts


@pytest.mark.parametrize("name", [name for name in THIRTY if name in RECORDS])
def test_no_less_than_recorded(name: str) -> None:
    """More is fine: then `make conformance` renews the record."""
    record = RECORDS[name]
    logging.disable(logging.WARNING)
    try:
        with torch.no_grad():
            found = found_in(name)
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


def test_the_page_is_what_the_records_say() -> None:
    text = (ROOT / "docs" / "conformance.md").read_text()
    assert sums(RECORDS) in text
    assert [line.split(" | ")[0] for line in text.splitlines() if line[:2] == "| "][1:] == [f"| {n}" for n in RECORDS]


def test_a_skip_shows() -> None:
    record = {"eager": "", "sites": 2, "quantized": 1, "fused": 1, "left": {"a reason": 1}, "error at 16 bits": 1e-6}
    text = page({"one": {**record, "same tokens": True}}, 2)
    assert "(1 examined)" in text and "quantized: 1; fused: 1" in text and "| 1x a reason |" in text
    assert "exact at 16 bits, with the same greedy tokens: 1 of 1" in text and "left 1 times: a reason" in text
