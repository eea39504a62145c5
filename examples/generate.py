"""Write the same text with a full-precision KV cache and with XQuant, and compare the two.

    python examples/generate.py
    python examples/generate.py --model Qwen/Qwen2.5-0.5B-Instruct --preset kivi-2 --device cuda

The model is SmolLM2-135M-Instruct where ``make models`` has fetched it, else the small one that comes with the project.
One that follows instructions gets a chapter to read and a question on it; others continue a page. It runs in the dtype
that it is stored in; in float32 where the processor is far slower in that one (bfloat16 without AVX-512, say), since
most of the demo is prompts.

Both go one way: ``model.compile(backend=...)``, then ``model.generate(past_key_values=...)``. From
transformers 5.24 on that argument is called ``cache``; ``cache_argument`` takes the right one.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import statistics
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, StaticCache

from xquant_fx import PRESETS, XQuantCache, XQuantConfig, explain, memory_report
from xquant_fx.plan.plan import make_plan
from xquant_fx.quality import agreement, kl_divergence, teacher_forced_logits, top1_agreement

HERE = Path(__file__).resolve().parent
MODELS = (HERE.parent / "models" / "smollm2-135m-instruct", HERE / "model")
TIMED_RUNS = 2
SLOWER = 2.0
"""So many times slower than in float32 is too slow."""
QUESTION = "Who came to the inn in this chapter, what did he bring with him, and what was he afraid of? Answer briefly."


class Clock:
    """A streamer that notes when each token arrives; the first call brings the prompt."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        """Called by ``generate`` with the prompt, then with each token."""
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Called by ``generate`` when it is done."""

    @property
    def tokens_per_second(self) -> float:
        """Of the decode steps alone: from the first new token to the last."""
        first, last = self.times[1], self.times[-1]
        return (len(self.times) - 2) / (last - first)


@dataclasses.dataclass
class Run:
    """What one kind of cache gave."""

    new_ids: Tensor
    cache: Any
    tokens_per_second: float
    first_seconds: float
    """Wall time of the first run, compilation included."""


def cache_argument(model: Any, cache: Any) -> dict[str, Any]:
    """``cache`` by the name that the model has for it: transformers 5.24 renamed it and warns of the old name."""
    renamed = "cache" in inspect.signature(model.forward).parameters
    return {"cache" if renamed else "past_key_values": cache}


def write(model: Any, ids: Tensor, new_tokens: int, make_cache: Callable[[], Any]) -> Run:
    """Generate greedily: once to compile and for the text, then a few times for the clock."""

    def generate(**decoding: Any) -> tuple[Tensor, Any, Clock]:
        cache, clock = make_cache(), Clock()
        given = dict(max_new_tokens=new_tokens, **cache_argument(model, cache))
        out = model.generate(ids, do_sample=False, streamer=clock, **given, **decoding)
        return out[0, ids.shape[1] :], cache, clock

    start = time.perf_counter()
    text, cache, _ = generate(no_repeat_ngram_size=4)  # small models repeat themselves for ever
    first_seconds = time.perf_counter() - start
    rates = [generate(min_new_tokens=new_tokens)[2].tokens_per_second for _ in range(TIMED_RUNS)]
    return Run(text, cache, statistics.median(rates), first_seconds)


def fitting_dtype(stored: torch.dtype, device: str) -> torch.dtype:
    """``stored``, or float32 where this processor multiplies matrices ``SLOWER`` times as fast in that."""
    seconds = {dtype: seconds_of_product(dtype) for dtype in (stored, torch.float32)} if device == "cpu" else {}
    return torch.float32 if seconds and seconds[stored] > SLOWER * seconds[torch.float32] else stored


def seconds_of_product(dtype: torch.dtype) -> float:
    """What a linear layer takes for a prompt's tokens: the least of a few times."""
    x, weight = torch.ones(512, 512, dtype=dtype), torch.ones(1024, 512, dtype=dtype)
    seconds = []
    for _ in range(4):
        start = time.perf_counter()
        torch.nn.functional.linear(x, weight)
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def summary(explanation: Any) -> str:
    """An Explanation in a few lines: how many attention sites had which fate."""
    done = sum(site.rewritten for site in explanation.sites)
    fates = Counter(site.reason for site in explanation.sites)
    lines = [f"{done} of {len(explanation.sites)} attention sites rewritten, in {explanation.graphs} graph(s)"]
    return "\n".join([*lines, *(f"  {count} {fate}" for fate, count in fates.items())])


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    there = next(folder for folder in MODELS if (folder / "config.json").exists())
    parser.add_argument("--model", default=str(there), help=f"folder or Hub id (default: {there.name})")
    parser.add_argument("--preset", default="xquant-2.2", choices=sorted(PRESETS))
    parser.add_argument("--prompt", help="text to continue or to answer (default: from Treasure Island)")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", help="of the model (default: what it is stored in, where that is fast)")
    args = parser.parse_args(argv)
    if args.max_new_tokens < 3:
        parser.error("--max-new-tokens must be at least 3, to time the steps between them")
    return args


def prompt_of(tokenizer: Any, prompt: str | None) -> tuple[Tensor, str]:
    """(token ids [1, T], what is asked): a question on a chapter for a model that chats, else a page to continue."""
    if not tokenizer.chat_template:
        text = prompt if prompt is not None else (HERE / "prompt.txt").read_text()
        return tokenizer(text, return_tensors="pt").input_ids, text
    asked = prompt if prompt is not None else QUESTION
    text = asked if prompt is not None else f"{(HERE / 'passage.txt').read_text()}\n{asked}"
    message = [{"role": "user", "content": text}]
    ids = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    return ids["input_ids"], asked


def main(argv: list[str] | None = None) -> None:
    """Run both caches and print the comparison."""
    args, console = parse_args(argv), Console(highlight=False)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=args.dtype or "auto").eval()
    stored = model.dtype
    model.to(args.device, stored if args.dtype else fitting_dtype(stored, args.device))
    ids, asked = prompt_of(tokenizer, args.prompt)
    ids = ids.to(args.device)
    config = XQuantConfig.preset(args.preset)
    prompt_length, length = ids.shape[1], ids.shape[1] + args.max_new_tokens
    context = model.config.max_position_embeddings
    if length > context:
        raise SystemExit(f"{prompt_length} tokens of prompt and {args.max_new_tokens} new ones exceed {context}")
    caches: dict[str, Callable[[], Any]] = {
        "full precision": lambda: StaticCache(model.config, max_cache_len=length),
        args.preset: lambda: XQuantCache(model.config, max_cache_len=length, config=config),
    }
    name = "/".join(Path(args.model).parts[-2:])
    console.print(f"{name}, {model.dtype}: {prompt_length} tokens of prompt, {args.max_new_tokens} new")
    if model.dtype != stored:
        console.print(f"[yellow]not in {stored}, which it is stored in: this processor is far slower in that")
    entries = [entry for layer in make_plan(config, 1).layers for entry in layer]
    if length <= (window := min(entry.residual_length for entry in entries)):
        console.print(f"[yellow]every token stays in the residual windows, of {window} tokens at least")

    runs, logits = [], []
    for (name, make_cache), backend in zip(caches.items(), ("inductor", "xquant"), strict=True):
        if args.compile:
            console.print(f"{name}: compiling with {backend} ...")
            model.compile(backend=backend)
        runs.append(write(model, ids, args.max_new_tokens, make_cache))
        # Both are fed the text that full precision wrote, so that one difference is not the end of it.
        text = torch.cat([ids[0], runs[0].new_ids])[None]
        logits.append(teacher_forced_logits(model, text, prompt_length, **cache_argument(model, make_cache())))

    full, quantized = runs
    console.print(
        Panel(asked[-600:], title="asked" if tokenizer.chat_template else "the prompt ends", title_align="left")
    )
    for name, run in zip(caches, runs, strict=True):
        console.print(Panel(tokenizer.decode(run.new_ids, skip_special_tokens=True), title=name, title_align="left"))
    table = Table("", *caches, title="speed", title_justify="left")
    table.add_row("decode, tokens per second", *(f"{run.tokens_per_second:.1f}" for run in runs))
    table.add_row("first run, compilation included, seconds", *(f"{run.first_seconds:.1f}" for run in runs))
    console.print(table)
    free = agreement(full.new_ids, quantized.new_ids)
    table = Table("agreement with full precision", args.preset)
    first = "none" if free.first_difference is None else str(free.first_difference)
    table.add_row("first new token that differs", first)
    table.add_row("equal tokens, each continuing its own text", f"{free.share:.1%}")
    table.add_row("equal top-1 token, both continuing one text", f"{top1_agreement(*logits):.1%}")
    table.add_row("mean KL divergence of the next token, nats", f"{kl_divergence(*logits):.4f}")
    console.print(table)
    print(memory_report(quantized.cache))
    print()
    print(summary(explain(model, ids, **cache_argument(model, caches[args.preset]()))))


if __name__ == "__main__":
    main()
