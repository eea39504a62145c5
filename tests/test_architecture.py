"""ARCHITECTURE.md: what it names exists, and its questions are answered."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from xquant_fx.kernels.packing import BITS, FIELD_WIDTHS
from xquant_fx.passes.pipeline import PASSES

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "ARCHITECTURE.md").read_text()
#: In backticks, a file or a folder by its path from the root.
PATH = re.compile(r"`([\w./]+(?:\.(?:py|md|h|cpp)|/|/\w+))`")
#: What an op's folder holds is named once for the three of them.
IN_AN_OPS_FOLDER = re.compile(r"`(\w+\.(?:py|cpp))`")

QUESTIONS = {
    "a mask form": "passes/forms.py",
    "a bit width": "kernels/packing.py",
    "an ISA": "kernels/cpu/simd_portable.h",
    "a preset": "xquant_fx/plan/presets.py",
    "a fault": "kernels/faults.py",
    "a report column": "xquant_fx/reports/explain_table.py",
}


def paths() -> list[str]:
    return sorted(set(PATH.findall(TEXT)) - {name for name in IN_AN_OPS_FOLDER.findall(TEXT)})


def answers() -> dict[str, list[str]]:
    """Question to its two cells."""
    section = TEXT.split("\n## Six questions\n")[1]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line[:3] == "| a"]
    return {row[0]: row[1:] for row in rows}


@pytest.mark.parametrize("path", paths())
def test_path_exists(path: str) -> None:
    assert (ROOT / path).exists()


def test_names_within_an_ops_folder_exist() -> None:
    names = {name for name in IN_AN_OPS_FOLDER.findall(TEXT) if not (ROOT / name).exists()}
    assert names
    assert {name for name in names if not (ROOT / "kernels/decode_attention" / name).exists()} == set()


@pytest.mark.parametrize("question", QUESTIONS)
def test_question_is_answered(question: str) -> None:
    change, beyond = answers()[question]
    assert f"`{QUESTIONS[question]}`" in change
    assert PATH.search(beyond)


def test_no_other_question() -> None:
    assert list(answers()) == list(QUESTIONS)


def test_bit_widths_are_all_that_fit() -> None:
    assert set(FIELD_WIDTHS) == {width for width in range(1, 9) if 8 % width == 0} < set(BITS)


def test_every_pass_is_named() -> None:
    assert re.findall(r"^   \| (\w+) \| `passes/", TEXT, re.MULTILINE) == [each.name for each in PASSES]


def test_short() -> None:
    assert len(TEXT.splitlines()) < 220
