"""What the rotation of values costs in a decode step on a CPU: what folding it into the weights would save.

    python benchmarks/rotation_share.py                       # the shape of SmolLM2-135M: 3 KV heads, 9 query heads

One layer, one thread. The kernels of the product beside the same sources without the rotation of the output and of the
token that leaves the window; calls in turn, ratios of minima. Written to benchmarks/results/ as JSON.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch
from results import where, write
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig

from xquant_fx import XQuantCache, XQuantConfig, decode_attention
from xquant_fx.kernels.cpu import build
from xquant_fx.kernels.quantize_store.cpu_call import run_cpu

#: Line of the C++ that rotates, and what stands for it.
WITHOUT = {
    "decode": (
        "if constexpr (ROTATED) rotate_back(softmax.acc + r * ACC);",
        "for (int64_t d = 0; d < DV; d++) softmax.acc[r * ACC + d] += softmax.acc[r * ACC + CODES_AT + d];",
    ),
    "append": ("    hadamard<D, ROTATED>(y);\n", ""),
}


def recorded(run: Callable[[], Any], which: str) -> tuple[tuple[str, ...], str, tuple[Any, ...]]:
    """(argument types, source, arguments) of the kernel in ``run()`` that rotates as ``which`` does."""
    seen = []

    def load(types: tuple[str, ...], code: str) -> Callable[..., Any]:
        kernel = build.load(types, code)

        def call(*args: Any) -> Any:
            seen.append((types, code, args))
            return kernel(*args)

        return call

    with patch("xquant_fx.kernels.cpu.build.load", load_keeping(load)):
        run()
    return next(each for each in seen if WITHOUT[which][0] in each[1])


def load_keeping(load: Callable[..., Any]) -> Callable[..., Any]:
    """``load``, which itself calls the real one."""
    real = build.load

    def kept(types: tuple[str, ...], code: str) -> Callable[..., Any]:
        with patch("xquant_fx.kernels.cpu.build.load", real):
            return load(types, code)

    return kept


def times(run: Callable[[], Any], which: str, seconds: float) -> dict[str, float]:
    """Microseconds of a call, with the rotation and without."""
    types, code, args = recorded(run, which)
    kernels = [build.load(types, code), build.load(types, code.replace(*WITHOUT[which]))]
    best = [float("inf")] * 2
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        for i, kernel in enumerate(kernels):
            begin = time.perf_counter()
            for _ in range(10):
                kernel(*args)
            best[i] = min(best[i], (time.perf_counter() - begin) / 10)
    return {"us": 1e6 * best[0], "without_us": 1e6 * best[1], "share": 1 - best[1] / best[0]}


def append_value(cache: XQuantCache, x: torch.Tensor, position: int) -> None:
    """Append by the kernel of compiled steps (eager ones run plain torch)."""
    state = cache.states[1]
    run_cpu(x=x, pos=torch.tensor([position]), **state.tensors, **state.spec.store_constants(), fit=None)


@torch.no_grad()
def measure(args: argparse.Namespace, context: int) -> dict[str, Any]:
    """Both kernels at one context."""
    torch.manual_seed(0)
    heads = args.kv_heads * args.gqa
    model = LlamaConfig(
        num_hidden_layers=1, num_attention_heads=heads, num_key_value_heads=args.kv_heads, head_dim=args.head_dim,
        hidden_size=heads * args.head_dim,
    )  # fmt: skip
    cache = XQuantCache(model, max_cache_len=context + 64, config=XQuantConfig.preset(args.preset))
    shape = (1, args.kv_heads, context, args.head_dim)
    cache.update(*torch.randn(2, *shape, dtype=torch.bfloat16), 0)
    token = torch.randn(2, 1, args.kv_heads, 1, args.head_dim, dtype=torch.bfloat16)
    q = torch.randn(1, heads, 1, args.head_dim, dtype=torch.bfloat16)
    cache.update(*token, 0)
    decode = times(lambda: decode_attention(q, cache, 0), "decode", args.seconds)
    append = times(lambda: append_value(cache, token[1], context), "append", args.seconds)
    saved = decode["us"] - decode["without_us"] + append["us"] - append["without_us"]
    return {"context": context, "decode": decode, "append": append, "saved_us": saved,
            "share": saved / (decode["us"] + append["us"])}  # fmt: skip


def main() -> None:
    """Run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in dict(kv_heads=3, gqa=3, head_dim=64).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    parser.add_argument("--contexts", type=int, nargs="+", default=[512, 1024, 2048, 8192, 32768])
    parser.add_argument("--preset", default="xquant-2.2")
    parser.add_argument("--seconds", type=float, default=1.5, help="of each kernel")
    args = parser.parse_args()
    args.device = "cpu"
    torch.set_num_threads(1)
    rows = [measure(args, context) for context in args.contexts]
    made = Table(title=f"rotation of values, {args.kv_heads} KV heads, GQA {args.gqa}, head_dim {args.head_dim}")
    for column in ("context", "decode, us", "without", "append of a value, us", "without", "share, %"):
        made.add_column(column, justify="right")
    for row in rows:
        cells = [row[which][us] for which in WITHOUT for us in ("us", "without_us")]
        made.add_row(f"{row['context']:,}", *(f"{cell:.1f}" for cell in cells), f"{100 * row['share']:.1f}")
    Console(width=120).print(made)
    write("rotation-share-cpu", {"rows": rows, **where(args)})
    print("written to benchmarks/results/rotation-share-cpu.json")


if __name__ == "__main__":
    main()
