"""Causal attention of a prompt on a CPU: the kernel of uncompiled prompts beside torch's own.

    python benchmarks/prompt_attention.py
    python benchmarks/prompt_attention.py --threads 2 --shapes 32,8,128 --tokens 4096
    python benchmarks/prompt_attention.py --chunk 1024 --tokens 4096 --name prompt-attention-cpu-chunk
    python benchmarks/prompt_attention.py --chunk 1024 --window 512 --tokens 4096 --name prompt-attention-cpu-window

With ``--chunk`` the queries are the last tokens alone, and a mask of bools says what they see, as models give it: all
tokens before, or a window of them; KV heads are repeated then, as models do it.

The two in turn, the least of a few rounds: milliseconds of processor time, which is what threads take together, and of
the clock. Errors are relative to float64, of 64 queries at the end. JSON goes to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from results import where, write
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from xquant_fx.kernels.prompt_attention.cpu_call import attended, faster_dtypes

CHECKED = 64
"""Queries of which errors are taken."""


class Shape(NamedTuple):
    """Of one attention."""

    heads: int
    kv_heads: int
    head_dim: int

    @classmethod
    def of(cls, text: str) -> Shape:
        """From ``heads,KV heads,head_dim``."""
        return cls(*map(int, text.split(",")))


def torchs(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """What torch would run."""
    return scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=mask is None)


def ours(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """The same by the kernel."""
    out = attended(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=mask is None)
    assert out is not None, "the kernel does not take this shape"
    return out


def mask_of(tokens: int, queries: int, window: int | None) -> Tensor:
    """What the last ``queries`` of ``tokens`` see, bool [1, 1, q, n]."""
    seen = torch.ones(queries, tokens, dtype=torch.bool).tril(tokens - queries)
    return (seen if window is None else seen.triu(tokens - queries - window + 1))[None, None]


def error(out: Tensor, q: Tensor, k: Tensor, v: Tensor, window: int | None) -> float:
    """Relative distance from float64, of the last queries."""
    seen = mask_of(k.shape[2], CHECKED, window)
    exact = [x.double() for x in (q[:, :, -CHECKED:], k, v)]
    right = scaled_dot_product_attention(*exact, attn_mask=seen, enable_gqa=True)
    return float((out[:, :, -CHECKED:] - right).norm() / right.norm())


def milliseconds(run: Callable[[], Any]) -> tuple[float, float]:
    """Of the processor, and of the clock."""
    processor, clock = time.process_time(), time.perf_counter()
    run()
    return 1e3 * (time.process_time() - processor), 1e3 * (time.perf_counter() - clock)


def measure(shape: Shape, tokens: int, dtype: torch.dtype, args: argparse.Namespace) -> dict[str, Any]:
    """Both ways in turn."""
    random = torch.Generator().manual_seed(0)
    heads = (shape.heads, shape.kv_heads, shape.kv_heads)
    q, k, v = (torch.randn(1, n, tokens, shape.head_dim, generator=random).to(dtype) for n in heads)
    mask = None
    if args.chunk is not None:
        q, mask = q[:, :, -args.chunk :], mask_of(tokens, min(args.chunk, tokens), args.window)
        k, v = (x.repeat_interleave(shape.heads // shape.kv_heads, 1) for x in (k, v))
    ways = {"torch": torchs, "ours": ours}
    # The first call loads what is loaded once.
    errors = {name: error(way(q, k, v, mask), q, k, v, args.window) for name, way in ways.items()}
    runs: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for _ in range(args.rounds):
        for name, way in ways.items():
            runs[name].append(milliseconds(lambda way=way: way(q, k, v, mask)))
    least = {name: dict(zip(("processor", "clock"), map(min, zip(*found, strict=True)), strict=True))
             for name, found in runs.items()}  # fmt: skip
    faster = {kind: least["torch"][kind] / least["ours"][kind] for kind in ("processor", "clock")}
    return {
        **shape._asdict(),
        "dtype": str(dtype),
        "tokens": tokens,
        "ms": least,
        "times faster": faster,
        "errors": errors,
    }


def table(rows: list[dict[str, Any]]) -> Table:
    """A row for each shape and length."""
    made = Table(title="a prompt's attention")
    for name in (
        "heads", "KV heads", "head_dim", "dtype", "tokens", "torch, ms", "ours, ms", "times faster", "by the clock",
        "errors",
    ):  # fmt: skip
        made.add_column(name, justify="right")
    for row in rows:
        ms, faster, errors = row["ms"], row["times faster"], row["errors"]
        made.add_row(
            *(str(row[name]) for name in ("heads", "kv_heads", "head_dim", "dtype")), f"{row['tokens']:,}",
            f"{ms['torch']['processor']:.2f}", f"{ms['ours']['processor']:.2f}", f"{faster['processor']:.1f}",
            f"{faster['clock']:.1f}", f"{errors['torch']:.2e}, {errors['ours']:.2e}",
        )  # fmt: skip
    return made


@torch.no_grad()
def main() -> None:
    """Run, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", type=Shape.of, nargs="+", default=[Shape(9, 3, 64), Shape(32, 8, 128)],
                        help="heads,KV heads,head_dim")  # fmt: skip
    parser.add_argument("--tokens", type=int, nargs="+", default=[256, 1024, 4096])
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--chunk", type=int, default=None, help="queries, the last of the tokens; default: all")
    parser.add_argument("--window", type=int, default=None, help="tokens that a query of a chunk sees; default: all")
    parser.add_argument("--name", default="prompt-attention-cpu", help="of the results file")
    args = parser.parse_args()
    if args.window is not None and args.chunk is None:
        parser.error("--window needs --chunk")
    dtypes = [getattr(torch, name) for name in args.dtypes]
    if left := [str(dtype) for dtype in dtypes if dtype not in faster_dtypes()]:
        print(f"this processor leaves prompts in {', '.join(left)} to torch")
        return
    torch.set_num_threads(args.threads)
    args.device = "cpu"
    cases = [(shape, tokens, dtype) for shape in args.shapes for tokens in args.tokens for dtype in dtypes]
    rows = [measure(*case, args) for case in cases]
    Console(width=120).print(table(rows))
    write(args.name, {**where(args), "threads": args.threads, "rows": rows})


if __name__ == "__main__":
    main()
