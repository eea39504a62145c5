"""Decode speed end to end: XQuantCache under ``xquant`` beside StaticCache under plain Inductor.

    python benchmarks/decode.py                                   # about 100M parameters, 256 to 16,384 tokens
    python benchmarks/decode.py --layers 2 --kv-heads 8 --head-dim 128 --hidden 4096 --contexts 32768
    python benchmarks/decode.py --device cuda --contexts 4096 131072

One run, both sides in turn, medians and their ratio. Caches are filled with random keys and values, so
no time goes into prefill. The table is printed and written as JSON with machine, versions and commit to
benchmarks/results/, with the break-even length: the least context from which on xquant is faster.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from filled import fill
from results import RESULTS, peak_bytes, synchronize, where, write
from rich.console import Console
from rich.table import Table
from torch._dynamo.utils import counters
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

from xquant_fx import PRESETS, XQuantCache, XQuantConfig, memory_report

WARM_UP = 3


def build(args: argparse.Namespace, context: int) -> LlamaForCausalLM:
    """A random Llama with grouped queries: ``--gqa`` query heads a KV head."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=args.vocabulary, hidden_size=args.hidden, intermediate_size=args.intermediate,
        num_hidden_layers=args.layers, num_attention_heads=args.kv_heads * args.gqa, num_key_value_heads=args.kv_heads,
        head_dim=args.head_dim, max_position_embeddings=context + 64, tie_word_embeddings=True,
    )  # fmt: skip
    with torch.device(args.device):  # random numbers of a CPU take it seconds
        return LlamaForCausalLM(config).eval().to(getattr(torch, args.dtype))


@torch.no_grad()
def steps(model: LlamaForCausalLM, backend: str | None, cache: Any, args: argparse.Namespace) -> dict[str, float]:
    """Median milliseconds of a decode step, seconds of the first, compiling call, and peak bytes of temporaries."""
    torch._dynamo.reset()
    counters.clear()
    gc.collect()
    step = torch.compile(model.forward, backend=backend, dynamic=False, mode=args.mode) if backend else model.forward
    ids = torch.zeros(args.batch, 1, dtype=torch.long, device=args.device)
    times = []
    for _ in range(WARM_UP + args.steps):
        synchronize(args.device)
        begin = time.perf_counter()
        step(ids, past_key_values=cache)
        synchronize(args.device)
        times.append(time.perf_counter() - begin)
    peak = peak_bytes(lambda: step(ids, past_key_values=cache), args.device)
    found = {"ms": 1e3 * statistics.median(times[WARM_UP:]), "first_s": times[0], "peak_bytes": peak}
    # With mode="reduce-overhead": graphs, or parts of them, that were not put into a CUDA graph; there should be none.
    return {**found, "cudagraph_skips": counters["inductor"]["cudagraph_skips"]}


def measure(args: argparse.Namespace, context: int) -> dict[str, Any]:
    """Both sides at one context length; ``speed`` is how many times faster xquant is."""
    model, room = build(args, context), context + 64
    quantized = XQuantCache(model.config, max_cache_len=room, config=XQuantConfig.preset(args.preset))

    def of(backend: str | None, cache: Any) -> dict[str, float]:
        return steps(model, backend, fill(cache, model, context, args.batch), args)

    sides: dict[str, Callable[[], dict[str, float]]] = {
        "static": lambda: of("inductor", StaticCache(model.config, room)),
        "xquant": lambda: of("xquant", quantized),
    }
    if args.quanto:  # Hugging Face's own quantized cache, which cannot be compiled
        sides["quanto"] = lambda: of(None, quanto_cache(model))
    found = {name: run() for name, run in sides.items()}
    report = memory_report(quantized)
    return {
        "context": context, **found, "speed": found["static"]["ms"] / found["xquant"]["ms"],
        "memory_ratio": report.ratio, "bits_per_element": report.bits_per_element,
        "parameters": sum(p.numel() for p in model.parameters()),
    }  # fmt: skip


def quanto_cache(model: LlamaForCausalLM) -> Any:
    """2 bits, groups of 64, the last 128 tokens in full precision; needs optimum-quanto."""
    from transformers import QuantizedCache

    return QuantizedCache("quanto", model.config, nbits=2, q_group_size=64, residual_length=128)


def break_even(rows: list[dict[str, Any]]) -> int | None:
    """The least measured context from which on xquant is always faster; None if the longest is not."""
    longest_slower = max((row["context"] for row in rows if row["speed"] < 1), default=0)
    return min((row["context"] for row in rows if row["context"] > longest_slower), default=None)


def bytes_a_token(rows: list[dict[str, Any]]) -> float | None:
    """By how much a longer context makes the temporaries of an xquant step larger."""
    first, last = rows[0], rows[-1]
    more = last["context"] - first["context"]
    return (last["xquant"]["peak_bytes"] - first["xquant"]["peak_bytes"]) / more if more else None


def table(rows: list[dict[str, Any]], args: argparse.Namespace) -> Table:
    """Ratios first."""
    made = Table(title=f"decode, {rows[0]['parameters'] / 1e6:.0f}M parameters, batch {args.batch}, {args.dtype}")
    columns = ["context", "times faster", "times smaller", "static, ms", "xquant, ms", "first call, s"]
    columns.append("temporaries, KiB")
    for column in columns + ["quanto, ms"] * args.quanto:
        made.add_column(column, justify="right")
    for row in rows:
        static, xquant = row["static"], row["xquant"]
        made.add_row(
            f"{row['context']:,}", f"{row['speed']:.2f}", f"{row['memory_ratio']:.2f}", f"{static['ms']:.2f}",
            f"{xquant['ms']:.2f}", f"{static['first_s']:.0f} / {xquant['first_s']:.0f}",
            f"{static['peak_bytes'] / 1024:,.0f} / {xquant['peak_bytes'] / 1024:,.0f}",
            *([f"{row['quanto']['ms']:.2f}"] if args.quanto else []),
        )  # fmt: skip
    return made


def plot(rows: list[dict[str, Any]], name: str) -> None:
    """Milliseconds a step over context."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(5, 4))
    for way in ("static", "xquant", "quanto"):
        known = [(row["context"], row[way]["ms"]) for row in rows if way in row]
        if known:
            axis.loglog(*zip(*known, strict=True), marker="o", label=way, ls="-" if way == "xquant" else "--")
    axis.set(title=f"decode, {rows[0]['parameters'] / 1e6:.0f}M parameters", xlabel="tokens", ylabel="ms a step")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(RESULTS / f"{name}.png", dpi=120)


def main() -> None:
    """Run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = dict(layers=8, kv_heads=4, gqa=4, head_dim=64, hidden=1024, intermediate=2816, vocabulary=8192, batch=1)
    for name, default in {**sizes, "steps": 30}.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    parser.add_argument("--contexts", type=int, nargs="+", default=[256, 1024, 4096, 16384])
    parser.add_argument("--preset", choices=sorted(PRESETS), default="xquant-2.2")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="bfloat16")
    parser.add_argument("--mode", default=None, help="of torch.compile, for both sides")
    parser.add_argument("--quanto", action="store_true", help="Hugging Face's quantized cache, too (optimum-quanto)")
    parser.add_argument("--name", default=None, help="of the results file")
    args = parser.parse_args()
    rows, name = [], args.name or f"decode-{args.device}-{args.preset}"
    for context in args.contexts:
        rows.append(measure(args, context))
        Console(width=120).print(table(rows, args))
        out = {"rows": rows, "break_even_tokens": break_even(rows), "temporary_bytes_a_token": bytes_a_token(rows)}
        write(name, {**out, **where(args)})
    plot(rows, name)
    print(f"written to benchmarks/results/{name}.json and .png")


if __name__ == "__main__":
    main()
