"""A decode step beside what a CPU user would pick instead: ``StaticCache`` under Inductor, llama.cpp, OpenVINO.

    make bench-peers
    python benchmarks/peers.py --contexts 256 1024 4096 --presets xquant-2.2 kivi-2 --threads 2
    python benchmarks/peers.py --model random --contexts 256 4096 32768 --name peers-cpu-100m

The same model for all, with weights of 16 bits: SmolLM2-135M, from the GGUF file that ``examples/fetch_models.py``
fetches, or a random Llama of 99 million parameters with heads of 128 channels. Ours and StaticCache start from random
keys and values, llama.cpp from copies of 512 tokens', OpenVINO from a prompt. All ways in turn, several rounds, each in
a process of its own. Two times are printed and written as JSON to benchmarks/results/: by the clock, which other work
on the machine makes longer, and of processors, which it hardly does (the least of all rounds; with several threads
waiting counts, so compare it with --threads 1). Ratios are to the first way: above 1, the first is that many times
faster. A way that is not installed is named, with the reason.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from peer_llama_cpp import LlamaCpp
from peer_models import fetched, is_random, random_llama, write_gguf
from peer_processes import Apart
from peer_ways import WARM_UP, Compiled, MissingError, OpenVino, Time, Way
from results import ROOT, where, write
from rich.console import Console
from rich.table import Table

from xquant_fx import PRESETS

MODEL = ROOT / "models" / "smollm2-135m-instruct"


def ways(args: argparse.Namespace, ggufs: dict[str, Path]) -> tuple[dict[str, Way], dict[str, str]]:
    """All ways by name, and why some are missing."""
    made, missing, margin = dict[str, Way](), dict[str, str](), args.rounds * (WARM_UP + args.steps) + 8
    room = max(args.contexts) + margin
    compiled, sizes = (Compiled, args.model), (room, margin, args.threads)
    makers: dict[str, Any] = {f"ours, {p}": (*compiled, p, *sizes) for p in args.presets}
    makers["StaticCache, Inductor"] = (*compiled, None, *sizes)
    for kind in ("f16", "q4_0"):
        makers[f"llama.cpp, {kind} cache"] = (LlamaCpp, ggufs["BF16"], kind, room, args.threads)
    makers["OpenVINO, u8 cache"] = (OpenVino, ggufs["F16"], "u8", args.threads)
    for name, maker in makers.items():
        if args.only and not any(word in name for word in args.only):
            missing[name] = "left out (--only)"
            continue
        try:
            made[name] = Apart(*maker)
        except MissingError as error:
            missing[name] = str(error)
    return made, missing


def measure(made: dict[str, Any], context: int, args: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds per step of each way, in rounds."""
    times: dict[str, list[Time]] = {name: [] for name in made}
    for _ in range(args.rounds):
        for name, way in made.items():
            times[name] += way.steps(context, args.steps)
    return {
        "context": context,
        "ms": {name: statistics.median(t.wall for t in found) for name, found in times.items()},
        "least_ms": {name: min(t.wall for t in found) for name, found in times.items()},
        "least_processor_ms": {name: min(t.processor for t in found) for name, found in times.items()},
    }


def table(row: dict[str, Any]) -> Table:
    """One context length: each way, and how many times faster the first is."""
    made = Table(title=f"{row['context']:,} tokens, ms per decode step")
    kinds = {"median": "ms", "least": "least_ms", "least, of processors": "least_processor_ms"}
    for column in ["", *(c for kind in kinds for c in (kind, "ratio"))]:
        made.add_column(column, justify="right" if column else "left")
    for name in row["ms"]:
        cells = []
        for kind in kinds.values():
            first = next(iter(row[kind].values()))
            cells += [f"{row[kind][name]:.2f}", f"{row[kind][name] / first:.2f}"]
        made.add_row(name, *cells)
    return made


def main() -> None:
    """Run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contexts", type=int, nargs="+", default=[256, 1024, 4096])
    parser.add_argument("--presets", choices=sorted(PRESETS), nargs="+", default=["xquant-2.2"])
    for name, default in {"threads": torch.get_num_threads(), "steps": 16, "rounds": 5}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--model", type=Path, default=MODEL, help="Hugging Face folder (make models), or random")
    parser.add_argument("--gguf", type=Path, default=None, help="GGUF file of the same model; fetched if not given")
    parser.add_argument("--only", nargs="+", default=[], help="ways whose names hold one of these words")
    parser.add_argument("--name", default="peers-cpu", help="of the results file")
    args = parser.parse_args()
    random = random_llama() if is_random(args.model) else None
    with tempfile.TemporaryDirectory() as name:
        source = args.gguf or fetched(Path(name))
        ggufs = {kind: write_gguf(source, Path(name) / f"{kind}.gguf", kind, random) for kind in ("BF16", "F16")}
        made, missing = ways(args, ggufs)
        told = {"model": args.model.name, "gguf": source.name, "device": "cpu"}
        rows, settings = [], argparse.Namespace(**{**vars(args), **told})
        used = {name: built for name, way in made.items() if (built := getattr(way, "instructions", ""))}
        for context in args.contexts:
            rows.append(measure(made, context, args))
            Console(width=120).print(table(rows[-1]))
            write(args.name, {"rows": rows, "missing": missing, "instructions": used, **where(settings)})
    for name, reason in missing.items():
        print(f"not measured: {name}: {reason}")
    print(f"llama.cpp is built for: {next(iter(used.values()), 'not installed')}")
    print(f"written to benchmarks/results/{args.name}.json")


if __name__ == "__main__":
    main()
