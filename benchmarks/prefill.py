"""Time to the first token and peak memory of a prompt: XQuantCache beside StaticCache, in one piece and in chunks.

    python benchmarks/prefill.py MODEL                            # a folder or a name on the Hugging Face hub
    python benchmarks/prefill.py MODEL --tokens 512 4096 --chunk 1024 --rounds 5

Each prompt is read by ``generate(max_new_tokens=1)``, which compiles no graph, in a process of its own, the ways in
turn. A shorter prompt has gone before, but for ``first``: the first prompt of a process loads the kernel that stores
it. Printed are medians over the rounds: seconds of the clock and of the processor, and by how much the process grew.
Ratios are medians of each round's, so that what else the machine does meanwhile counts less. JSON goes to
benchmarks/results/.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from forked import in_process
from results import where, write
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, StaticCache

from xquant_fx import PRESETS, XQuantCache, XQuantConfig

WARM_UP = 256
"""Tokens of the shorter prompt; of fewer than LONG_CHUNK plain torch is the kernel."""
SPARE = 128
"""Tokens that caches have room for beyond the prompt."""
KIB = 1024
#: Way to the way that it is compared with.
WAYS = {
    "static": "static", "xquant": "static", "xquant, first": "static",
    "static, chunks": "static, chunks", "xquant, chunks": "static, chunks",
}  # fmt: skip


def seconds() -> dict[str, float]:
    """Clock, and processor time of this process."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return {"clock": time.perf_counter(), "processor": used.ru_utime + used.ru_stime}


def peak_mib() -> float:
    """The most memory that this process had since it was forked."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / KIB


def resident_mib() -> float:
    """Memory that this process has."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / KIB**2


def made(model: Any, way: str, tokens: int, args: argparse.Namespace) -> Any:
    """A cache with room for ``tokens`` and some more."""
    length = tokens + SPARE
    if way.startswith("static"):
        return StaticCache(model.config, max_cache_len=length)
    return XQuantCache(model.config, max_cache_len=length, config=XQuantConfig.preset(args.preset))


def first_token(model: Any, way: str, tokens: int, args: argparse.Namespace) -> dict[str, Any]:
    """One prompt, in this process."""
    ids = torch.arange(tokens)[None] % (model.config.vocab_size - 1) + 1
    model(ids[:, :WARM_UP], past_key_values=None if way.endswith("first") else made(model, way, WARM_UP, args))
    cache = made(model, way, tokens, args)
    chunk = {"prefill_chunk_size": args.chunk} if way.endswith("chunks") else {}
    memory, before = resident_mib(), seconds()
    out = model.generate(ids, past_key_values=cache, max_new_tokens=1, do_sample=False, **chunk)
    used = {kind: value - before[kind] for kind, value in seconds().items()}
    return {**used, "mib": peak_mib() - memory, "token": int(out[0, -1])}


def measure(model: Any, tokens: int, args: argparse.Namespace) -> dict[str, Any]:
    """The ways in turn, ``args.rounds`` times: medians, and median ratios to the other cache."""
    wanted = {way for each in args.ways for way in (each, WAYS[each])}
    runs: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS if way in wanted}
    for _ in range(args.rounds):
        for way in runs:
            found = in_process(first_token, args.seconds, model, way, tokens, args, threads=args.threads)
            if "error" in found:
                raise SystemExit(f"{way}: {found['error']}")
            runs[way].append(found)
    kinds = ("clock", "processor", "mib")
    rows: dict[str, Any] = {}
    for way, other in ((way, WAYS[way]) for way in runs):
        middle = {kind: statistics.median(run[kind] for run in runs[way]) for kind in kinds}
        pairs = list(zip(runs[way], runs[other], strict=True))
        ratios = {f"{kind} ratio": statistics.median(a[kind] / b[kind] for a, b in pairs) for kind in kinds}
        rows[way] = {**middle, **ratios, "runs": runs[way]}
    return {"tokens": tokens, "ways": rows}


def table(rows: list[dict[str, Any]], args: argparse.Namespace) -> Table:
    """A row for each way and length; ratios to StaticCache in the same number of pieces."""
    made = Table(title=f"time to the first token, {args.model}, {args.preset}, chunks of {args.chunk}")
    for column in ("tokens", "way", "s", "processor, s", "ratio", "of processor", "MiB", "ratio of MiB", "load"):
        made.add_column(column, justify="left" if column == "way" else "right")
    for row in rows:
        for way, found in row["ways"].items():
            ratios = [f"{found[f'{kind} ratio']:.3f}" for kind in ("clock", "processor", "mib")]
            made.add_row(
                f"{row['tokens']:,}", way, f"{found['clock']:.2f}", f"{found['processor']:.2f}", *ratios[:2],
                f"{found['mib']:.1f}", ratios[2], f"{os.getloadavg()[0]:.1f}",
            )  # fmt: skip
    return made


def main() -> None:
    """Run, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 4096])
    parser.add_argument("--chunk", type=int, default=1024, help="tokens, of prefill_chunk_size")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--ways", nargs="+", choices=[*WAYS], default=[*WAYS])
    parser.add_argument("--preset", choices=sorted(PRESETS), default="xquant-2.2")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--name", default="prefill-cpu", help="of the file in benchmarks/results")
    parser.add_argument("--seconds", type=float, default=600, help="that one prompt may take")
    args = parser.parse_args()
    torch.set_num_threads(1)  # a process that has run more cannot be forked into one that does
    model, rows = AutoModelForCausalLM.from_pretrained(args.model, dtype=getattr(torch, args.dtype)).eval(), []
    args.device = "cpu"
    for tokens in args.tokens:
        rows.append(measure(model, tokens, args))
        Console(width=120).print(table(rows, args))
        write(args.name, {**where(args), "threads": args.threads, "rows": rows})


if __name__ == "__main__":
    main()
