"""A turn of a chat, some tokens behind those that a cache holds, and a first prompt of as many, beside StaticCache.

    python benchmarks/turns.py MODEL                    # a folder or a name on the Hugging Face hub
    python benchmarks/turns.py MODEL --pasts 512 --tokens 64 --rooms 8192 --threads 1

Such chunks run uncompiled on CPUs, in compiled models, too, where kernels store and dequantize ("kernels"; here nothing
is compiled but those). In a model that is not compiled plain torch does, if they are few ("uncompiled"). Caches have
room for ``--rooms`` tokens; 0: for no more than come. One run, the ways in turn, medians by the clock in milliseconds.
JSON goes to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import statistics
import time
from typing import Any

import torch
from results import where, write
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, StaticCache

from xquant_fx import XQuantCache
from xquant_fx.kernels.cpu.at_hand import wanted

WAYS = {"static": StaticCache, "uncompiled": XQuantCache, "kernels": XQuantCache}


@torch.no_grad()
def turn(model: Any, name: str, past: int, tokens: int, room: int) -> float:
    """Milliseconds of one turn behind ``past`` tokens."""
    ids = torch.arange(past + tokens)[None] * 7919 % model.config.vocab_size
    cache: Any = WAYS[name](model.config, max_cache_len=max(room, past + tokens + 8))
    if past:
        model(ids[:, :past], past_key_values=cache, logits_to_keep=1)
    begin = time.perf_counter()
    model(ids[:, past:], past_key_values=cache, logits_to_keep=1)
    return 1e3 * (time.perf_counter() - begin)


def main() -> None:
    """Run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--pasts", type=int, nargs="+", default=[0, 512, 2048])
    parser.add_argument("--tokens", type=int, nargs="+", default=[20, 64, 200])
    parser.add_argument("--rooms", type=int, nargs="+", default=[0, 4096])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--name", default="turns-cpu", help="of the results file")
    parser.set_defaults(device="cpu")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=getattr(torch, args.dtype)).eval()
    columns = ("past", "tokens", "room", *WAYS, "uncompiled / static", "kernels / static")
    made, rows = Table(*columns, title="a turn of a chat, ms"), []
    for past, tokens, room in itertools.product(args.pasts, args.tokens, args.rooms):
        times: dict[str, list[float]] = {name: [] for name in WAYS}
        for _ in range(args.rounds + 1):  # the first one does not count
            for name in WAYS:
                with wanted() if name == "kernels" else contextlib.nullcontext():
                    times[name].append(turn(model, name, past, tokens, room))
        ms = {name: statistics.median(found[1:]) for name, found in times.items()}
        rows.append({"past": past, "tokens": tokens, "room": room, **ms})
        ratios = (f"{ms[name] / ms['static']:.2f}" for name in ("uncompiled", "kernels"))
        made.add_row(f"{past:,}", str(tokens), f"{room:,}", *(f"{x:.0f}" for x in ms.values()), *ratios)
    write(args.name, {"rows": rows, **where(args)})
    Console().print(made)


if __name__ == "__main__":
    main()
