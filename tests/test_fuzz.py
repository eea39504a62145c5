"""Decoders drawn at random, beside eager code (``tests/fuzz``): a short run, and what longer ones found."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
from fast_and_slow import fast_but
from fuzz.campaign import PLAIN, Campaign, script, smaller
from fuzz.case import FORK, Case
from fuzz.comparison import Outcome, run

from xquant_fx.compiler import repeats
from xquant_fx.passes import fuse_decode

pytest_plugins = ["plain_torch"]

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
    "copies behind a graph break: their options were taken for others than those of the takeover": case(
        layers=2, position="item", bits=8, scheme="shared", attention="written out", events=(3, 1, FORK, 2)
    ),
    "a token taken back, and keys that are read by contiguous: the buffer was asked for its memory": case(
        bits=4, read="contiguous", mask="padded", events=(7, 1, -1, 1)
    ),
}

ROWS = dict(ragged=True, batch=3, bits=4, scheme="ranked", append="rows by scatter_", mask="padded")
#: A row begins anew.
ANEW = dict(ROWS, attention="written out", heads=2, mask="causal", events=(9, 1, 0, 1))
#: The same where nothing is fused.
UNFUSED = {
    "a row begins anew, and heads are chosen by an index: its mask was not looked for": case(**ANEW, repeat="index"),
    "the same, and a clamp of the scores": case(**ANEW, before="clamp", applied="added"),
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


@pytest.mark.parametrize("cases", [8, pytest.param(25, marks=pytest.mark.slow)])
def test_a_short_run(cases: int) -> None:
    """The first cases of the first seed, as many as there is time for; `make fuzz` goes on."""
    end, said = time.monotonic() + SECONDS, []
    campaign = Campaign(None, 0, said.append)
    campaign.run(lambda: time.monotonic() > end or campaign.counts["cases"] >= cases)
    # A rotating buffer whose positions the graph computes is refused with an error that says so: docs/limits.md.
    assert [failure for failure in campaign.failures if failure["kind"] != "refused"] == [], "\n".join(said)
    assert campaign.counts["right"] and not campaign.counts["invalid"]


#: Of the same cause as the one before them: the options of the graph behind a break.
LIKE_OTHERS = {
    "the same, and keys that grow",
    "copies behind a graph break: their options were taken for others than those of the takeover",
}


@pytest.mark.parametrize("name", fast_but(FOUND, LIKE_OTHERS))
def test_found_once(name: str, attended_by: str) -> None:
    outcome = run(FOUND[name])
    assert (outcome.kind, outcome.detail, outcome.is_silent) == ("right", "", False)
    assert outcome.fused or "without a word" in name


@pytest.mark.parametrize("name", UNFUSED)
def test_found_once_and_not_fused(name: str, attended_by: str) -> None:
    outcome = run(UNFUSED[name])
    assert (outcome.kind, outcome.detail, outcome.quantized, outcome.fused) == ("right", "", 2, 0)


def masks_are_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuse_decode, "build_mask", lambda *a: None)


@pytest.mark.slow  # a tool of `make fuzz` alone
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


DEEP = dict(layers=7, odd=5, differs="scale", bits=4, products="addmm", events=(9, 1, 1))


@pytest.mark.parametrize(
    ("tried", "tensors"),
    [
        (case(**ROWS, events=(11, 1, 1, FORK, 1, -2, 1, FORK, 0, 1)), 2),  # a row goes back, another begins anew
        (case(bits=4, differs="window", layers=2, odd=0, products="one tensor", events=(9, 1, FORK, 1, FORK, 1)), 4),
        (case(append="cat", bits=4, differs="theta", products="mm", events=(9, 1, FORK, 1, FORK, 1)), 2),
        (case(append="cat", layout="merged", bits=4, batch=2, kv_heads=2, heads=2, events=(9, 1, 1)), 2),
        (case(holder="stack behind the rows", append="both", layout="tbhd", bits=4, layers=2, events=(9, 1, 1)), 4),
    ],
    ids=["a row's own positions", "forks", "forks that grow", "growth in another order", "stacks in another order"],
)
def test_what_the_grammar_has(tried: Case, tensors: int) -> None:
    outcome = run(tried)
    assert (outcome.kind, outcome.detail, outcome.quantized, outcome.tensors) == ("right", "", tensors, tensors)
    assert outcome.fused and not outcome.reasons


def test_a_constant_of_one_of_several_equal_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal layers are run as the first of them is; numbers that are not compared would be the first one's."""
    assert run(case(**DEEP)).kind == "right"
    leaf = repeats._leaf
    monkeypatch.setattr(repeats, "_leaf", lambda value: "number" if isinstance(value, float) else leaf(value))
    outcome = run(case(**DEEP))
    assert outcome.kind == "wrong" and "the same contents" in outcome.detail


def test_a_case_that_cannot_be_plainer_stays() -> None:
    plain = case()
    assert smaller(plain, lambda other: False) == plain == Case.from_json(plain.to_json())


def test_the_script_runs(capsys: pytest.CaptureFixture[str]) -> None:
    text = script(case(bits=16, events=(3, 1)), "nothing")
    eager = text.replace('backend="xquant", options={"config": config}', 'backend="eager"')
    exec(compile(eager, "script", "exec"), {"__name__": "__main__"})
    assert [float(line.split()[-1]) < 1e-4 for line in capsys.readouterr().out.splitlines()] == [True, True]
