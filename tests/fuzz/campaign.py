"""Many cases: ``python -m fuzz.campaign --minutes 60 --out fuzz.json`` (``make fuzz MINUTES=60``).

Each case is drawn from the grammar by its number. Most rewritten graphs run op by op; every ``--every``-th case is
compiled by Inductor, which takes ten times as long. What came of them is counted in the file of ``--out``, with which a
later run goes on. A failure is made smaller and printed as a script.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from fuzz.case import FORK, Case, draw
from fuzz.comparison import Outcome, dynamic_of, run, settings_of
from fuzz.program import source

FAILED = ("wrong", "crashed", "refused")
#: Field to its plainest choice, tried in this order to make a failure smaller.
PLAIN: dict[str, Any] = dict(
    all_dynamic=False, graph_break="", in_place="", rotating=0, differs="", odd=-1, products="linear",
    layers=1, batch=1, kv_heads=1, heads=1, dim=8,
    dtype="float32", layout="bhtd", holder="list of tuples", position="tensor", append="index_copy_", read="whole",
    mask="causal", repeat="repeat_interleave", attention="sdpa", product="matmul", before="nothing",
    applied="masked_fill", after="nothing", weights="softmax", output="matmul", bits=16, scheme="kivi",
    dynamic=False, eager_prompt=True,
)  # fmt: skip


def smaller(case: Case, fails: Callable[[Case], bool]) -> Case:
    """The plainest case that still fails, by one pass over fields and one over events."""
    for name, value in PLAIN.items():
        if getattr(case, name, value) != value:
            other = dataclasses.replace(case, **{name: value})
            case = other if fails(other) else case
    for i in reversed(range(len(case.events))):
        other = dataclasses.replace(case, events=(*case.events[:i], *case.events[i + 1 :]))
        case = other if other.events and fails(other) else case
    return case


SCRIPT = """{source}

# {detail}
# Case.from_json({json!r})
from xquant_fx import XQuantConfig

config = XQuantConfig.from_json({config!r})
model, cache, twin = Decoder().eval(), empty(), empty()
step = torch.compile(model, backend="xquant", options={{"config": config}}, dynamic={dynamic})
at, random, pad = 0, torch.Generator().manual_seed(0), torch.arange(B) * 2
with torch.no_grad():
    for number, event in enumerate({events}):
        if event <= 0:
            at -= -event or at
            for tensor in (*leaves(cache), *leaves(twin)) if event == 0 else ():
                tensor.zero_()
            continue
        first = at % {rotating} if {rotating} else at
        event = min(event, {rotating} - first) if {rotating} else event
        ids = torch.randint(48, (B, event), generator=random)
        args = lambda: (ids, torch.arange(first, first + event), first, pad.clone())
        right, twin = model(*args(), twin)
        out, cache = (model if number == 0 and {eager_prompt} else step)(*args(), cache)
        print(number, event, "relative error", ((out - right).norm() / right.norm()).item())
        at += event
"""

SHORT = """{source}

# {detail}
from fuzz.case import Case
from fuzz.comparison import run

print(run(Case.from_json({json!r})))
"""


def script(case: Case, detail: str) -> str:
    """A failure as a program of its own, or one that needs this package where rows or forks are in it."""
    if case.ragged or FORK in case.events:
        return SHORT.format(source=source(case), detail=detail, json=case.to_json())
    return SCRIPT.format(
        source=source(case), detail=detail, json=case.to_json(), config=settings_of(case).to_json(),
        events=case.events, rotating=case.rotating, eager_prompt=case.eager_prompt,
        dynamic=dynamic_of(case),
    )  # fmt: skip


class Campaign:
    """Counts and failures so far, in a file."""

    def __init__(self, out: Path | None, every: int, say: Callable[[str], None] = print, first: int = 1) -> None:
        self.out, self.every, self.say = out, every, say
        self.counts: Counter[str] = Counter()
        self.failures: list[dict[str, str]] = []
        self.reasons: Counter[str] = Counter()
        self.number, self.seconds = first - 1, 0.0
        if out is not None and out.exists():
            held = json.loads(out.read_text())
            self.counts, self.reasons = Counter(held["counts"]), Counter(held["reasons"])
            self.failures, self.number, self.seconds = held["failures"], held["number"], held["seconds"]

    def run(self, until: Callable[[], bool], tick: Callable[[], None] = lambda: None) -> None:
        """Cases until ``until()``."""
        while not until():
            self.number += 1
            self.try_case(draw(self.number))
            tick()

    def try_case(self, case: Case) -> Outcome:
        """Run one case, count it, and report it if it failed."""
        by_inductor = bool(self.every) and self.number % self.every == 0
        began = time.monotonic()
        outcome = run(case, by_inductor)
        self.counts.update(["cases", outcome.kind, *["silent"] * outcome.is_silent, *["Inductor"] * by_inductor])
        self.counts["tensors"] += outcome.tensors
        self.counts["quantized tensors"] += outcome.quantized
        self.counts["fused attentions"] += outcome.fused
        self.counts["quantized"] += bool(outcome.quantized)
        self.counts["fused"] += bool(outcome.fused)
        self.counts["left with a reason"] += not outcome.quantized and bool(outcome.reasons)
        self.reasons.update(outcome.reasons)
        if outcome.kind in FAILED or outcome.is_silent:
            self._failed(case, outcome, by_inductor)
        self.seconds += time.monotonic() - began
        self.save()
        return outcome

    def _failed(self, case: Case, outcome: Outcome, by_inductor: bool) -> None:
        kind = "silent" if outcome.is_silent else outcome.kind
        known = sum(failure["kind"] == kind and failure["what"] == _what(outcome) for failure in self.failures)
        if known < 3:

            def fails(other: Case, by_inductor: bool = False) -> bool:
                result = run(other, by_inductor)
                return result.is_silent if kind == "silent" else result.kind == kind

            if by_inductor and fails(case):
                by_inductor = False
            if not by_inductor:  # through Inductor that would take long
                case = smaller(case, fails)
                outcome = run(case)
        route = "Inductor" if by_inductor else "op by op"
        held = {"kind": kind, "what": _what(outcome), "case": case.to_json(), "detail": outcome.detail, "run": route}
        self.failures.append(held)
        if known < 3:
            self.say(f"# ---- {kind}\n{script(case, outcome.detail or kind)}")

    def save(self) -> None:
        """Write all of it."""
        if self.out is not None:
            held: dict[str, Any] = dict(number=self.number, seconds=self.seconds)
            held.update(counts=self.counts, reasons=self.reasons, failures=self.failures)
            self.out.write_text(json.dumps(held, indent=1) + "\n")

    def summary(self) -> str:
        """Counts, one a line."""
        names = (
            "cases", "Inductor", "right", "quantized", "fused", "left with a reason", "silent", "refused", "wrong",
            "crashed", "invalid", "tensors", "quantized tensors", "fused attentions",
        )  # fmt: skip
        lines = [f"{name:20} {self.counts[name]}" for name in names]
        lines.append(f"{'hours':20} {self.seconds / 3600:.2f}")
        return "\n".join([*lines, "", *(f"{count:5} {reason}" for reason, count in self.reasons.most_common())])


def _what(outcome: Outcome) -> str:
    """What failures of one kind have in common."""
    return outcome.detail.split(": ", 1)[-1].split(" by ")[0][:80]


def main() -> None:
    """Run for some minutes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--out", type=Path, default=Path("fuzz.json"))
    parser.add_argument("--every", type=int, default=10, help="every so many cases one is compiled by Inductor")
    parser.add_argument("--first", type=int, default=1, help="number of the first case of a campaign that begins")
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("torch._dynamo").setLevel(logging.CRITICAL)
    end = time.monotonic() + 60 * args.minutes
    campaign = Campaign(args.out, args.every, tqdm.write, args.first)
    with tqdm(unit=" cases", initial=campaign.counts["cases"]) as bar:
        campaign.run(lambda: time.monotonic() > end, bar.update)
    print(campaign.summary())


if __name__ == "__main__":
    main()
