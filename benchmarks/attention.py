"""Decode attention alone: straight from the codes, beside what torch has for full-precision keys and values.

    python benchmarks/attention.py                              # 512 to 131,072 tokens
    python benchmarks/attention.py --contexts 32768 --batch 1 --gqa 4
    python benchmarks/attention.py --device cuda --batch 1 8

One run, all ways in turn on the same tokens, medians, ratios to the fastest full-precision way. Written
to benchmarks/results/ as JSON and PNG.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from results import RESULTS, peak_bytes, synchronize, where, write
from rich.console import Console
from rich.table import Table
from torch import Tensor
from tqdm import tqdm
from transformers import LlamaConfig

from xquant_fx import XQuantCache, XQuantConfig, decode_attention

LAYERS = 2
ROUNDS = 5
SETTINGS = {
    "xquant-2.2": XQuantConfig.preset("xquant-2.2"),
    "xquant-1.7": XQuantConfig.preset("xquant-1.7"),
    "xquant-1.4": XQuantConfig.preset("xquant-1.4"),
    "xquant-2.7": XQuantConfig.preset("xquant-2.7"),
    **{
        f"xquant {name}": XQuantConfig.preset("xquant").replace(k_bits=k, v_bits=v, share_values_from=None)
        for name, k, v in (("2 bits", 2, 2), ("K 2, V 1 bit", 2, 1), ("1 bit", 1, 1), ("4 bits", 4, 4))
    },
}


def once(run: Callable[[], Any], device: str) -> float:
    """Seconds of a call."""
    synchronize(device)
    begin = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - begin


def milliseconds(ways: dict[str, Callable[[], Any]], args: argparse.Namespace) -> dict[str, float]:
    """Median time of a call of each, taken in turns, so that a slow moment of the machine hits them all."""
    times: dict[str, list[float]] = {}
    for name, run in ways.items():
        try:
            run()
            times[name] = [once(run, args.device)]
        except RuntimeError as error:  # a back end that does not take this shape
            print(f"{name}: {str(error).splitlines()[0]}")
    for _ in range(ROUNDS):
        for name, seen in times.items():
            calls = min(args.repeats, max(2, int(1 / ROUNDS / seen[0])))
            once(ways[name], args.device)  # back in the caches
            seen += [once(ways[name], args.device) for _ in range(calls)]
    return {name: 1e3 * statistics.median(seen[1:]) for name, seen in times.items()}


def full_precision(q: Tensor, k: Tensor, v: Tensor, device: str) -> dict[str, Callable[[], Tensor]]:
    """Torch's ways: SDPA by back end, and two matrix products (whose grouping is done by views)."""
    sdpa, scale = torch.nn.functional.scaled_dot_product_attention, q.shape[3] ** -0.5
    batch, kv_heads, _, dim = k.shape
    grouped = q.view(batch, kv_heads, -1, dim)

    def matmul(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.softmax((q @ k.transpose(-1, -2)) * scale, -1) @ v

    ways: dict[str, Callable[[], Tensor]] = {"matmul": lambda: matmul(grouped, k, v)}
    if device == "cpu":
        ways = {"sdpa": lambda: sdpa(q, k, v, enable_gqa=True), **ways}
        if q.dtype != torch.float32:  # a cache of twice the bytes is the fastest where there are no 16-bit products
            wide = [t.float() for t in (grouped, k, v)]
            ways["matmul float32"] = lambda: matmul(*wide)
        return ways
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.attention.flex_attention import flex_attention

    def by(backend: Any) -> Callable[[], Tensor]:
        def run() -> Tensor:
            with sdpa_kernel(backend):
                return sdpa(q, k, v, enable_gqa=True)

        return run

    flex = torch.compile(flex_attention, dynamic=False)
    ways |= {"sdpa flash": by(SDPBackend.FLASH_ATTENTION), "sdpa cudnn": by(SDPBackend.CUDNN_ATTENTION)}
    return ways | {"flex": lambda: flex(q, k, v, enable_gqa=True)}


@torch.no_grad()
def measure(args: argparse.Namespace, batch: int, gqa: int, context: int) -> dict[str, Any]:
    """All ways on one shape: milliseconds, and the most bytes allocated meanwhile, by way."""
    torch._dynamo.reset()  # or flex attention runs unfused once it has been compiled for eight shapes
    torch.manual_seed(0)
    kind = dict(device=args.device, dtype=getattr(torch, args.dtype))
    shape = (batch, args.kv_heads, context, args.head_dim)
    k, v = torch.randn(shape, **kind), torch.randn(shape, **kind)
    q = torch.randn(batch, args.kv_heads * gqa, 1, args.head_dim, **kind)
    mask = torch.ones(1, 1, 1, context, dtype=torch.bool, device=args.device)
    ways: dict[str, Callable[[], Any]] = full_precision(q, k, v, args.device)
    for name in args.only or SETTINGS:
        model = LlamaConfig(
            num_hidden_layers=LAYERS, num_attention_heads=q.shape[1], num_key_value_heads=args.kv_heads,
            head_dim=args.head_dim, hidden_size=q.shape[1] * args.head_dim,
        )  # fmt: skip
        cache = XQuantCache(model, max_cache_len=context, config=SETTINGS[name])
        cache.update(k, v, 0)
        ways[name] = lambda cache=cache: decode_attention(q, cache, 0, mask=mask)
    ms = milliseconds(ways, args)
    peak = {name: peak_bytes(ways[name], args.device) for name in ms}
    best = min((name for name in ms if not name.startswith("xquant")), key=ms.__getitem__)
    ratios = {name: ms[best] / ms[name] for name in ms if name.startswith("xquant")}
    return {"batch": batch, "gqa": gqa, "context": context, "ms": ms, "peak_bytes": peak,
            "fastest_full": best, "times_faster": ratios}  # fmt: skip


def table(rows: list[dict[str, Any]], args: argparse.Namespace) -> Table:
    """Ratios first, then milliseconds."""
    ratios = list(rows[0]["times_faster"])
    full = [name for name in rows[0]["ms"] if name not in ratios]
    made = Table(title=f"decode attention, {args.kv_heads} KV heads, head_dim {args.head_dim}, {args.dtype}")
    faster, ms = (f"{r}\ntimes faster" for r in ratios), (f"{n}, ms" for n in (*full, *ratios))
    for column in ("batch", "GQA", "context", *faster, *ms):
        made.add_column(column, justify="right")
    for row in rows:
        values = [f"{row['times_faster'][r]:.2f}" for r in ratios]
        values += [f"{row['ms'][n]:.3f}" if n in row["ms"] else "-" for n in (*full, *ratios)]
        made.add_row(str(row["batch"]), str(row["gqa"]), f"{row['context']:,}", *values)
    return made


def plot(rows: list[dict[str, Any]], name: str) -> None:
    """Milliseconds over context, one panel a batch and group size."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = sorted({(row["batch"], row["gqa"]) for row in rows})
    figure, axes = plt.subplots(1, len(panels), figsize=(5 * len(panels), 4), squeeze=False)
    for axis, panel in zip(axes[0], panels, strict=True):
        mine = [row for row in rows if (row["batch"], row["gqa"]) == panel]
        for way in mine[0]["ms"]:
            known = [(row["context"], row["ms"][way]) for row in mine if way in row["ms"]]
            axis.loglog(*zip(*known, strict=True), marker="o", label=way, ls="-" if way.startswith("xquant") else "--")
        axis.set(title=f"batch {panel[0]}, GQA {panel[1]}", xlabel="tokens", ylabel="ms a step and layer")
        axis.grid(alpha=0.3)
    axes[0][0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(RESULTS / f"{name}.png", dpi=120)


def main() -> None:
    """Run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contexts", type=int, nargs="+", default=[512, 2048, 8192, 32768, 131072])
    parser.add_argument("--batch", type=int, nargs="+", default=[1])
    parser.add_argument("--gqa", type=int, nargs="+", default=[1, 4, 8])
    parser.add_argument("--only", nargs="+", choices=list(SETTINGS))
    for name, default in (("kv-heads", 8), ("head-dim", 128), ("repeats", 20)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="bfloat16")
    parser.add_argument("--name", default=None, help="of the results files")
    args = parser.parse_args()
    shapes = [(b, g, c) for b in args.batch for g in args.gqa for c in args.contexts]
    rows, name = [], args.name or f"attention-{args.device}"
    for shape in tqdm(shapes, disable=None):
        rows.append(measure(args, *shape))
        write(name, {"rows": rows, **where(args)})
    Console(width=200).print(table(rows, args))
    print(f"written to benchmarks/results/{name}.json and .png")
    plot(rows, name)


if __name__ == "__main__":
    main()
