"""What storing costs: a token appended in a decode step, and a prompt prefilled, beside a StaticCache.

    python benchmarks/store.py
    python benchmarks/store.py --device cuda --dtype bfloat16

Medians of one run, the ways in turn; written to benchmarks/results/ as JSON.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from results import synchronize, where, write
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

from xquant_fx import PRESETS, XQuantCache, XQuantConfig

BLOCK = 128  # steps: one of them quantizes a block of keys


def build(args: argparse.Namespace) -> LlamaForCausalLM:
    """A random Llama, 4 query heads a KV head."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1024, hidden_size=1024, intermediate_size=2816, num_hidden_layers=args.layers,
        num_attention_heads=4 * args.kv_heads, num_key_value_heads=args.kv_heads, head_dim=args.head_dim,
        max_position_embeddings=args.prompt + 1024,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval().to(args.device, getattr(torch, args.dtype))


def append_only(cache: Any, layers: int) -> Callable[..., Any]:
    """A function that appends one token to every layer, and does nothing else."""

    def step(k: torch.Tensor, v: torch.Tensor) -> None:
        for layer in range(layers):
            cache.update(k, v, layer)

    return step


def microseconds_per_token(cache: Any, backend: str, args: argparse.Namespace) -> float:
    """Mean time to append a token to one layer, over a whole block, flush included; compiled."""
    torch._dynamo.reset()
    shape = (1, args.kv_heads, 256, args.head_dim)
    k, v = torch.randn(2, *shape, device=args.device, dtype=getattr(torch, args.dtype))
    append_only(cache, args.layers)(k, v)
    step = torch.compile(append_only(cache, args.layers), backend=backend, dynamic=False)
    for _ in range(3):
        step(k[:, :, :1], v[:, :, :1])
    synchronize(args.device)
    begin = time.perf_counter()
    for _ in range(BLOCK):
        step(k[:, :, :1], v[:, :, :1])
    synchronize(args.device)
    return 1e6 * (time.perf_counter() - begin) / BLOCK / args.layers


def prefill_ms(model: LlamaForCausalLM, make: Callable[[], Any], args: argparse.Namespace) -> float:
    """Median time of an uncompiled prefill, as ``generate()`` does it."""
    ids, times = torch.randint(0, 1024, (1, args.prompt), device=args.device), []
    for _ in range(4):
        cache = make()
        synchronize(args.device)
        begin = time.perf_counter()
        model(ids, past_key_values=cache)
        synchronize(args.device)
        times.append(time.perf_counter() - begin)
    return 1e3 * statistics.median(times[1:])


@torch.no_grad()
def main() -> None:
    """Run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("layers", 4), ("kv-heads", 4), ("head-dim", 64), ("prompt", 1024)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--preset", choices=sorted(PRESETS), default="xquant-2.2")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="bfloat16")
    args = parser.parse_args()
    model, room = build(args), args.prompt + 1024
    caches = {
        "static": lambda: StaticCache(model.config, room),
        "xquant": lambda: XQuantCache(model.config, room, XQuantConfig.preset(args.preset)),
    }
    backends = {"static": "inductor", "xquant": "xquant"}
    rows = {
        "append, microseconds a token and layer": {
            name: microseconds_per_token(make(), backends[name], args) for name, make in caches.items()
        },
        f"prefill of {args.prompt} tokens, ms": {name: prefill_ms(model, make, args) for name, make in caches.items()},
    }
    table = Table("", "xquant / static", "static", "xquant", title=f"{args.layers} layers, {args.dtype}, {args.device}")
    for what, found in rows.items():
        ratio = found["xquant"] / found["static"]
        table.add_row(what, f"{ratio:.2f}", f"{found['static']:.2f}", f"{found['xquant']:.2f}")
    Console().print(table)
    write(f"store-{args.device}-{args.preset}", {"rows": rows, **where(args)})
    print(f"written to benchmarks/results/store-{args.device}-{args.preset}.json")


if __name__ == "__main__":
    main()
