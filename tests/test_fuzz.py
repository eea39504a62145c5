"""Decoders drawn at random, beside eager code (``tests/fuzz``): a short run, and what longer ones found."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from typing import Any

import pytest
from fuzz.campaign import PLAIN, Campaign, script, smaller
from fuzz.case import Case
from fuzz.comparison import Outcome, run

from xquant_fx.passes import fuse_decode

SECONDS = 8
#: A case of the plainest choices.
USUAL: dict[str, Any] = dict(PLAIN, events=(9, 1, 1, 1))


def case(**choices: Any) -> Case:
    """The plainest case with these choices."""
    return Case(**{**USUAL, **choices})


#: What went wrong once, by what it was.
FOUND = {
    "a bias without batch, beside keys that grow: its last size is a symbol": case(
        append="cat", attention="written out", before="alibi", heads=2, bits=4, dynamic=True, events=(9, 1, 1, 2, 1)
    ),
    "an append by index_put_": case(append="index_put_", bits=4),
    "an append by scatter_, and a graph break before attention, left without a word": case(
        append="scatter_", graph_break="before attention"
    ),
    "a concatenation, and a graph break before attention, left without a word": case(
        append="cat", graph_break="before attention"
    ),
    "a graph break before all layers: the options were taken for others than those of the takeover": case(
        position="item", layers=2, bits=4, scheme="shared", attention="written out"
    ),
    "the same, and keys that grow": case(
        position="item", layers=2, bits=4, scheme="shared", attention="written out", append="cat"
    ),
    "rank 3, an attention that is spelt out, left without a word": case(
        layout="rank 3", attention="written out", weights="spelt out", events=(10, 1)
    ),
    "keys and values in one tensor, and a graph break before attention, left without a word": case(
        holder="stacked", graph_break="before attention", events=(6, 1)
    ),
}

#: What is refused, with words of the error.
REFUSED = {
    "a rotating buffer whose positions the graph computes": (
        case(position="scalar tensor", rotating=8, mask="none", bits=2, eager_prompt=False, events=(11, 1)),
        "a step wrote at a position that the program computes",
    )
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_an_error(name: str) -> None:
    tried, words = REFUSED[name]
    outcome = run(tried)
    assert outcome.kind == "refused" and words in outcome.detail, outcome


def test_a_short_run() -> None:
    """The first cases of the first seed, as many as there is time for; `make fuzz` goes on."""
    end, said = time.monotonic() + SECONDS, []
    campaign = Campaign(None, 0, said.append)
    campaign.run(lambda: time.monotonic() > end or campaign.counts["cases"] >= 25)
    # A rotating buffer whose positions the graph computes is refused with an error that says so: docs/limits.md.
    assert [failure for failure in campaign.failures if failure["kind"] != "refused"] == [], "\n".join(said)
    assert campaign.counts["right"] and not campaign.counts["invalid"]


@pytest.mark.parametrize("name", FOUND)
def test_found_once(name: str) -> None:
    outcome = run(FOUND[name])
    assert (outcome.kind, outcome.detail, outcome.is_silent) == ("right", "", False)
    assert outcome.fused or "without a word" in name


def masks_are_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuse_decode, "build_mask", lambda *a: None)


def test_a_fault_is_found_and_made_smaller(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    """The plainest case is right; without masks it is wrong, and told with a script that runs."""
    wide = case(bits=4, layers=2, read="contiguous", events=(9, 1, 1, 1))
    assert run(wide) == Outcome("right", "", 4, 4, 2, (), 2)
    masks_are_lost(monkeypatch)
    campaign = Campaign(tmp_path / "fuzz.json", 0, (said := []).append)
    outcome = campaign.try_case(wide)
    assert outcome.kind == "wrong" and "the same contents" in outcome.detail
    (failure,) = json.loads((tmp_path / "fuzz.json").read_text())["failures"]
    small = Case.from_json(failure["case"])
    assert (small.layers, small.read) == (1, "whole") and len(small.events) < 4 and "class Decoder" in said[0]
    assert Campaign(tmp_path / "fuzz.json", 0).counts == campaign.counts


def test_a_case_that_cannot_be_plainer_stays() -> None:
    plain = case()
    assert smaller(plain, lambda other: False) == plain == Case.from_json(plain.to_json())


def test_the_script_runs() -> None:
    text = script(case(bits=16, events=(3, 1)), "nothing")
    assert compile(text, "script", "exec")
    eager = text.replace('backend="xquant", options={"config": config}', 'backend="eager"')
    done = subprocess.run([sys.executable, "-c", eager], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [float(line.split()[-1]) < 1e-4 for line in done.stdout.splitlines()] == [True, True]
