"""The first text of a model with sliding windows, which fill and move in it: how long it takes, and how many graphs.

    python benchmarks/sliding_windows.py                                   # random weights in the shape of Gemma 3 270M
    python benchmarks/sliding_windows.py --backends xquant inductor --runs cold warm

``generate()`` with a DynamicCache and a StaticCache, each run in a process of its own ("new", "cold", "warm":
compile_caches.py). JSON goes to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from compile_caches import WAYS, in_new_process
from results import where, write
from rich.console import Console
from rich.table import Table
from torch._dynamo.utils import counters
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, StaticCache

WINDOW, PROMPT, NEW = 64, 20, 80
SHAPE: dict[str, Any] = dict(
    hidden_size=640, intermediate_size=2048, num_hidden_layers=18, num_attention_heads=4, num_key_value_heads=1,
    head_dim=256, vocab_size=4096, query_pre_attn_scalar=256, sliding_window=WINDOW, pad_token_id=0, eos_token_id=None,
)  # fmt: skip


def one(backend: str, kind: str) -> dict[str, Any]:
    """Seconds of one ``generate()``, and Dynamo's graphs."""
    torch.manual_seed(0)
    model = Gemma3ForCausalLM(Gemma3TextConfig(**SHAPE)).eval().to(torch.bfloat16)
    model.compile(backend=backend)
    cache = StaticCache(config=model.config, max_cache_len=512)
    given = {"past_key_values": cache} if kind == "StaticCache" else {}
    ids = torch.randint(3, 4000, (1, PROMPT))
    begin = time.perf_counter()
    model.generate(ids, max_new_tokens=NEW, do_sample=False, **given)
    return {"seconds": time.perf_counter() - begin, "graphs": counters["stats"]["unique_graphs"]}


def main() -> None:
    """Run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backends", nargs="+", default=["xquant", "inductor"])
    parser.add_argument("--caches", nargs="+", default=["DynamicCache", "StaticCache"])
    parser.add_argument("--runs", nargs="+", choices=list(WAYS), default=["new", "cold", "warm", "warm"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--name", default="sliding-windows-cpu", help="of the results file")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    parser.set_defaults(device="cpu")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.one:
        print(json.dumps(one(*args.one)))
        return
    rows, made = [], Table("backend", "cache", "run", "seconds", "graphs", title=f"{PROMPT} tokens and {NEW} more")
    for backend in args.backends:
        for kind in args.caches:
            with tempfile.TemporaryDirectory() as folder:
                for run in args.runs:
                    arguments = ["--threads", str(args.threads), "--one", backend, kind]
                    found = in_new_process(run, arguments, Path(folder))
                    row = {"backend": backend, "cache": kind, "run": run, **found}
                    rows.append(row)
                    made.add_row(backend, kind, run, f"{row['seconds']:.1f}", str(row["graphs"]))
    write(args.name, {"rows": rows, **where(args)})
    Console().print(made)


if __name__ == "__main__":
    main()
