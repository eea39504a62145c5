"""What rounding queries and weights to a byte costs in quality: compiled steps on a CPU, one, two and three bytes.

    python benchmarks/digits.py MODEL TEXT                  # a folder or a name on the Hugging Face hub; a text file
    python benchmarks/digits.py MODEL TEXT --presets xquant-2.7 xquant-1.7 --windows 6

Real steps in bfloat16, the text given token by token behind a prompt, on the same windows for all. Two and three bytes
differ by the luck of bfloat16's roundings elsewhere in the model alone: what one byte does is to be seen beside that.
JSON goes to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"  # compiled steps are kept by our sources, which stay the same
import torch
from results import where, write
from rich.console import Console
from rich.table import Table
from torch import Tensor
from tqdm import tqdm

from xquant_fx import XQuantCache, XQuantConfig
from xquant_fx.evaluate.models import cache_argument, load
from xquant_fx.evaluate.windows import cut_windows
from xquant_fx.kernels.decode_attention import cpu_source

COLUMNS = ("KL of one byte", "of two", "difference", "between one and two", "between two and three")


@torch.no_grad()
def steps(model: Any, step: Any, ids: Tensor, prompt: int, preset: str) -> Tensor:
    """Log probabilities [steps, V] of the tokens behind ``prompt`` of ``ids`` [1, T]."""
    cache = XQuantCache(model.config, max_cache_len=ids.shape[1], config=XQuantConfig.preset(preset))
    model(ids[:, :prompt], **cache_argument(model, cache))
    rows = [step(ids[:, at : at + 1], **cache_argument(model, cache)).logits[0] for at in range(prompt, ids.shape[1])]
    return torch.cat(rows).float().log_softmax(-1)


def divergence(p: Tensor, q: Tensor) -> float:
    """Mean KL, in nats per token, of log probabilities [steps, V]."""
    return (p.exp() * (p - q)).sum(-1).double().mean().item()


def by_digits(model: Any, windows: Tensor, prompt: int, preset: str) -> dict[int, list[Tensor]]:
    """Number of bytes to log probabilities of each window."""
    found, as_it_is = {}, cpu_source.digits
    try:
        for count in (1, 2, 3):
            torch._dynamo.reset()
            cpu_source.source.cache_clear()
            cpu_source.digits = lambda dtype, bits, count=count: count
            step, title = torch.compile(model, backend="xquant"), f"{preset}, {count}"
            found[count] = [steps(model, step, ids[None], prompt, preset) for ids in tqdm(windows, title, disable=None)]
    finally:
        cpu_source.digits = as_it_is
        cpu_source.source.cache_clear()
    return found


def compare(full: list[Tensor], found: dict[int, list[Tensor]]) -> dict[str, Any]:
    """Mean KL from full precision of each number of bytes, and what numbers of bytes do to each other."""
    kl = {n: torch.tensor([*map(divergence, full, of)]) for n, of in found.items()}
    more = kl[1] - kl[2]
    between = {
        f"{n} and {n + 1}": sum(map(divergence, found[n + 1], found[n])) / len(full)
        for n in (1, 2)
    }  # fmt: skip
    return {
        "kl": {n: x.mean().item() for n, x in kl.items()}, "difference": more.mean().item(),
        "standard_error": (more.std() / len(full) ** 0.5).item(), "between": between,
    }  # fmt: skip


def cells(row: dict[str, Any]) -> list[str]:
    """A row of the table, as ``COLUMNS`` says."""
    between = (f"{x:.5f}" for x in row["between"].values())
    difference = f"{row['difference']:.5f} ± {row['standard_error']:.5f}"
    return [f"{row['kl'][1]:.5f}", f"{row['kl'][2]:.5f}", difference, *between]


def main() -> None:
    """Run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("text")
    parser.add_argument("--presets", nargs="+", default=["xquant-2.7", "xquant-2.2", "xquant-1.7"])
    parser.add_argument("--windows", type=int, default=20)
    parser.add_argument("--prompt", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=256)
    parser.add_argument("--name", default="digits-cpu", help="of the results file")
    parser.set_defaults(device="cpu", dtype="bfloat16")
    args = parser.parse_args()
    text, args.text = Path(args.text).read_text(), Path(args.text).name
    model, tokenizer = load(args.model, torch.bfloat16)
    windows = cut_windows(tokenizer, text, args.prompt + args.steps, args.windows)
    with torch.no_grad():
        full = [model(ids[None]).logits[0, args.prompt :].float().log_softmax(-1) for ids in windows]
    made, rows = Table("preset", *COLUMNS, title="nats per token, mean over windows and its standard error"), []
    for preset in args.presets:
        rows.append({"preset": preset, **compare(full, by_digits(model, windows, args.prompt, preset))})
        made.add_row(preset, *cells(rows[-1]))
        write(args.name, {"rows": rows, **where(args)})
    Console(width=140).print(made)


if __name__ == "__main__":
    main()
