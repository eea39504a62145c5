"""The life of a cache: what comes of each thing that is done to one, with three caches, in eager code and compiled.

Each scenario does it on a small Llama at 16 bits, and its logits are compared with those of a plain ``DynamicCache``.
Compiled steps are rewritten graphs that run op by op. A ``StaticCache`` and a ``DynamicCache`` are quantized by one
compiled step before anything is done; "eager" means the steps after that. Where the program itself calls `generate()`,
"eager" is without the backend: what is right "in full precision" then has nothing quantized. "-" is what means nothing
for that kind of cache. Only the rows that name Inductor, and the one of `mode=`, run what it builds.

    .venv/bin/python benchmarks/life_of_a_cache.py  # writes docs/life.json and docs/life.md
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from conformance import DOCS
from forked import in_process, in_words
from life_caches import KINDS, MODES, Life
from life_inductor import BY_INDUCTOR
from life_programs import RUN_BY
from life_scenarios import DONE_TO_IT, DoesNotApply
from torch import Tensor
from tqdm import tqdm

EXACT = 1e-4
SCENARIOS = DONE_TO_IT | RUN_BY | BY_INDUCTOR


def outcome(name: str, kind: str, mode: str) -> dict[str, Any]:
    """ "right", "wrong" with the relative error, or the error's words."""
    scenario = SCENARIOS[name]
    with torch.no_grad():
        try:
            right = _numbers(scenario(Life("DynamicCache", "plain")))
        except Exception as error:
            right = in_words(error)
        try:
            got = _numbers(scenario(life := Life(kind, mode)))
        except DoesNotApply:
            return {"does not apply": True}
        except AssertionError as error:
            return {"wrong": str(error)}
        except Exception as error:  # whatever is raised is what a person would read
            return {"error": in_words(error)}
    if isinstance(right, str) or got.shape != right.shape:
        return {"wrong": f"a DynamicCache without the backend: {right if isinstance(right, str) else right.shape}"}
    error = float((got - right).norm() / right.norm())
    if not error < EXACT:
        return {"wrong": f"off by {error:.1e}"}
    return {"right": True, "in full precision": True} if life.in_full_precision() else {"right": True}


def _numbers(logits: list[Tensor]) -> Tensor:
    return torch.cat([torch.zeros(0).double(), *(each.double().flatten() for each in logits)])


def page(rows: dict[str, dict[str, dict[str, Any]]]) -> str:
    """The table."""
    columns = [f"{kind}, {mode}" for kind in KINDS for mode in MODES]
    lines = [f"| what is done | {' | '.join(columns)} |", "|---|" + "---|" * len(columns)]
    notes: list[str] = []
    for name, row in rows.items():
        lines.append(f"| {name} | {' | '.join(_cell(row.get(column, {}), notes) for column in columns)} |")
    told = [f"{number}. {note}" for number, note in enumerate(notes, 1)]
    intro = __doc__.split("\n\n    .venv")[0].strip().replace("``", "`")
    head, *rest = intro.split("\n\n")
    return "\n".join(["# The life of a cache", "", head, "", *rest, "", *lines, "", "Errors:", "", *told, ""])


def _cell(found: dict[str, Any], notes: list[str]) -> str:
    if "error" not in found:
        right = "right, in full precision" if "in full precision" in found else "right"
        return right if "right" in found else f"**wrong: {found['wrong']}**" if "wrong" in found else "-"
    if found["error"] not in notes:
        notes.append(found["error"])
    return f"error {notes.index(found['error']) + 1}"


def main() -> None:
    """Live through all of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", help="words of the scenarios to live through anew")
    parser.add_argument("--folder", type=Path, default=DOCS)
    parser.add_argument("--seconds", type=float, default=300, help="limit for one scenario")
    args = parser.parse_args()
    path = args.folder / "life.json"
    rows = json.loads(path.read_text()) if path.exists() and args.only else {}
    torch.set_num_threads(1)
    outcome("reset(), another prompt", "StaticCache", "compiled")  # what is imported here is not imported again
    chosen = [name for name in SCENARIOS if not args.only or any(word in name for word in args.only)]
    for name in tqdm(chosen, unit=" scenarios"):
        for kind in KINDS:
            for mode in MODES:
                rows.setdefault(name, {})[f"{kind}, {mode}"] = in_process(outcome, args.seconds, name, kind, mode)
        path.write_text(json.dumps(rows, indent=1) + "\n")
        (args.folder / "life.md").write_text(page(rows))
    print((args.folder / "life.md").read_text())


if __name__ == "__main__":
    main()
