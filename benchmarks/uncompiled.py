"""A decode step that runs uncompiled: DynamicCache, and XQuantCache in its first steps and by kernels later.

    python benchmarks/uncompiled.py MODEL                    # a folder or a name on the Hugging Face hub
    python benchmarks/uncompiled.py MODEL --contexts 1024 --threads 1

In the first steps plain torch appends and attends, and a kernel dequantizes where there is much. One run, the three
ways in turn, the least of several steps: milliseconds of processor time. JSON goes to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from results import where, write
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, DynamicCache

from xquant_fx import XQuantCache
from xquant_fx.cache import uncompiled

#: Way to the step from which on kernels run; None: a DynamicCache.
WAYS = {"dynamic": None, "first steps": 10**9, "kernels": 1}


@torch.no_grad()
def milliseconds(model: Any, context: int, warm: int | None, steps: int) -> float:
    """The least of ``steps`` after two that do not count."""
    uncompiled.WARM = warm or uncompiled.WARM
    ids = torch.arange(context + steps + 2)[None] * 7919 % model.config.vocab_size
    cache: Any = DynamicCache(config=model.config)
    if warm is not None:
        cache = XQuantCache(model.config, max_cache_len=ids.shape[1])
    model(ids[:, :context], past_key_values=cache)
    times = []
    for at in range(context, ids.shape[1]):
        begin = time.process_time()
        model(ids[:, at : at + 1], past_key_values=cache)
        times.append(time.process_time() - begin)
    return 1e3 * min(times[2:])


def main() -> None:
    """Run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--contexts", type=int, nargs="+", default=[1024, 4096])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--name", default="uncompiled-cpu", help="of the results file")
    parser.set_defaults(device="cpu")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=getattr(torch, args.dtype)).eval()
    columns = ("context", *WAYS, "times faster than the first steps")
    made = Table(*columns, title="an uncompiled step, ms of processor time")
    rows = []
    for context in args.contexts:
        ms = {way: milliseconds(model, context, warm, args.steps) for way, warm in WAYS.items()}
        rows.append({"context": context, **ms})
        made.add_row(f"{context:,}", *(f"{x:.0f}" for x in ms.values()), f"{ms['first steps'] / ms['kernels']:.1f}")
    write(args.name, {"rows": rows, **where(args)})
    Console().print(made)


if __name__ == "__main__":
    main()
