"""Prompts and turns of a chat with ``compile_prompts`` and without, and how long it takes to compile for them.

    python benchmarks/compiled_prompts.py MODEL                    # a folder or a name on the Hugging Face hub
    python benchmarks/compiled_prompts.py MODEL --tokens 512 4096 --turns 64 --threads 1

One model, one run, the two ways in turn, medians by the clock in milliseconds; a first call of each way, which traces
and compiles, is printed by itself. Each prompt is another length, some tokens less than the one before. JSON goes to
benchmarks/results/.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from results import where, write
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM

from xquant_fx import XQuantCache

WAYS = {"as they are": {}, "compiled": {"compile_prompts": True}}
FIRST = 48
"""Tokens of the prompt and of the turn that nothing is compiled for yet."""


def seconds_of(step: Callable[..., Any], ids: torch.Tensor, cache: Any) -> float:
    """One call by the clock."""
    begin = time.perf_counter()
    step(ids, past_key_values=cache, logits_to_keep=1).logits.cpu()  # which waits for a GPU
    return time.perf_counter() - begin


def pair(model: Any, step: Callable[..., Any], prompt: int, turn: int, device: str) -> tuple[float, float]:
    """Seconds of a prompt of a new cache, and of the turn behind it."""
    ids = torch.arange(prompt + turn, device=device)[None] * 7919 % model.config.vocab_size
    cache = XQuantCache(model.config, max_cache_len=-(-(prompt + turn) // 1024) * 1024)
    return seconds_of(step, ids[:, :prompt], cache), seconds_of(step, ids[:, prompt:], cache)


@torch.no_grad()
def main() -> None:
    """Run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--tokens", type=int, nargs="+", default=[64, 256, 1024, 4096])
    parser.add_argument("--turns", type=int, default=64, help="tokens of the turn behind each prompt")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--name", help="of the results file; compiled-prompts-DEVICE if not given")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=getattr(torch, args.dtype)).eval().to(args.device)
    steps: dict[str, Any] = {
        name: torch.compile(model.forward, backend="xquant", options=options or None) for name, options in WAYS.items()
    }
    firsts = {name: pair(model, step, FIRST, FIRST, args.device) for name, step in steps.items()}
    made = Table("tokens", "what", *WAYS, "compiled / as they are", title="prompts and turns, ms")
    for number, what in enumerate(("prompt", "turn")):
        made.add_row(str(FIRST), f"first {what}", *(f"{1e3 * found[number]:.0f}" for found in firsts.values()), "")
    rows = []
    for tokens in args.tokens:
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in WAYS}
        for number in range(args.rounds + 1):  # the first one does not count
            for name, step in steps.items():
                times[name].append(pair(model, step, tokens - number, args.turns - number, args.device))
        for number, what in enumerate(("prompt", "turn")):
            ms = {name: 1e3 * statistics.median(run[number] for run in found[1:]) for name, found in times.items()}
            old, new = times.values()
            ratio = statistics.median(b[number] / a[number] for a, b in zip(old[1:], new[1:], strict=True))
            rows.append({"tokens": tokens, "what": what, **ms, "ratio": ratio})
            made.add_row(f"{tokens:,}", what, *(f"{x:.1f}" for x in ms.values()), f"{ratio:.2f}")
    Console(width=120).print(made)
    write(
        args.name or f"compiled-prompts-{args.device}",
        {**where(args), "threads": args.threads, "first": firsts, "rows": rows},
    )


if __name__ == "__main__":
    main()
