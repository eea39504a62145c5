"""Several continuations of one prompt, by ``cache.fork()`` and by ``copy.deepcopy``: memory, and time of a step.

    python benchmarks/continuations.py MODEL                      # a folder or a name on the Hugging Face hub
    python benchmarks/continuations.py MODEL --contexts 8000 32000 --copies 8 --tokens 128

Linux only. The prompt is random keys and values, so that no time goes into prefill. Memory is by how much this process
grows (Pss) with ``--copies`` copies: once they are made, and when each has ``--tokens`` tokens more. Steps are
compiled; times are medians of steps of both ways in turn. JSON goes to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import gc
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from filled import fill
from results import where, write
from rich.console import Console
from rich.table import Table
from torch._dynamo.utils import counters
from transformers import AutoModelForCausalLM

from xquant_fx import PRESETS, XQuantCache, XQuantConfig, memory_report

MIB = 2**20
SPARE = 192
"""Tokens that caches have room for beyond the prompt."""
WAYS: dict[str, Callable[[Any], Any]] = {"fork": lambda cache: cache.fork(), "deepcopy": copy.deepcopy}


def mib() -> float:
    """Memory of this process without files on disk, such as weights; pages that are shared count once."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith(("Pss_Anon:", "Pss_Shmem:"))) * 1024 / MIB


def filled(model: Any, context: int, args: argparse.Namespace) -> XQuantCache:
    """A cache with random keys and values of ``context`` tokens."""
    torch.manual_seed(0)
    cache = XQuantCache(model.config, max_cache_len=context + SPARE, config=XQuantConfig.preset(args.preset))
    return fill(cache, model, context)


def memory(step: Callable[[Any], float], make: Callable[[Any], Any], cache: Any, args: argparse.Namespace) -> Any:
    """MiB that ``--copies`` copies take, new and with some tokens more, and milliseconds to make them."""
    before, copies, ms = mib(), [], []
    for _ in range(args.copies):
        begin = time.perf_counter()
        copies.append(make(cache))
        ms.append(1e3 * (time.perf_counter() - begin))
    step(cache)  # whose pages the system maps when they are read
    new = mib() - before
    for each in copies:
        for _ in range(args.tokens):
            step(each)
    made = {"first, ms": ms[0], "others, ms": statistics.median(ms[1:])}
    return {**made, "MiB new": new, "MiB grown": mib() - before}


def times(step: Callable[[Any], float], cache: Any, args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Milliseconds of a step by way, the first one of a copy and the median of the others, in turn."""
    taken: dict[str, list[list[float]]] = {way: [] for way in WAYS}
    for _ in range(args.rounds):
        copies = {way: make(cache) for way, make in WAYS.items()}
        for way in WAYS:
            taken[way].append([])
        for _ in range(args.tokens):
            for way, each in copies.items():
                taken[way][-1].append(step(each))
    return {
        way: {
            "first step, ms": statistics.median(runs[0] for runs in rounds),
            "step, ms": statistics.median(ms for runs in rounds for ms in runs[1:]),
        }
        for way, rounds in taken.items()
    }


def measure(model: Any, context: int, args: argparse.Namespace) -> dict[str, Any]:
    """Both ways at one length of the prompt."""
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(model.forward, backend="xquant", dynamic=False)
    ids = torch.zeros(1, 1, dtype=torch.long)

    def step(cache: Any) -> float:
        begin = time.perf_counter()
        compiled(ids, past_key_values=cache)
        return 1e3 * (time.perf_counter() - begin)

    cache = filled(model, context, args)
    step(cache)
    found = {way: memory(step, make, cache, args) for way, make in WAYS.items()}
    for way, more in times(step, cache, args).items():
        found[way].update(more)
    graphs = counters["stats"]["unique_graphs"]
    return {"context": context, "MiB": memory_report(cache).total_bytes / MIB, "graphs": graphs, "ways": found}


def table(rows: list[dict[str, Any]], args: argparse.Namespace) -> Table:
    """A row for each way and length."""
    title = f"{args.copies} continuations of {args.tokens} tokens, {args.model}, {args.preset}"
    made = Table(title=title)
    kinds = ("first, ms", "others, ms", "MiB new", "MiB grown", "first step, ms", "step, ms")
    for column in ("prompt", "its MiB", "way", *kinds):
        made.add_column(column, justify="left" if column == "way" else "right")
    for row in rows:
        for way, found in row["ways"].items():
            made.add_row(f"{row['context']:,}", f"{row['MiB']:.1f}", way, *(f"{found[kind]:.1f}" for kind in kinds))
    return made


@torch.no_grad()
def main() -> None:
    """Run, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--contexts", type=int, nargs="+", default=[8000, 32000])
    parser.add_argument("--copies", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--preset", choices=sorted(PRESETS), default="xquant-2.2")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    args.device = "cpu"
    torch.set_num_threads(args.threads)
    model, rows = AutoModelForCausalLM.from_pretrained(args.model, dtype=getattr(torch, args.dtype)).eval(), []
    for context in args.contexts:
        rows.append(measure(model, context, args))
        Console(width=120).print(table(rows, args))
        write("continuations-cpu", {**where(args), "threads": args.threads, "rows": rows})


if __name__ == "__main__":
    main()
