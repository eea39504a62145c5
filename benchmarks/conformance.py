"""What becomes of Hugging Face's causal language models under the backend, and whether it is right.

Of every architecture of ``MODEL_FOR_CAUSAL_LM_MAPPING`` a tiny random model decodes with an ``XQuantCache``: a prompt
in eager code, then steps whose rewritten graphs run op by op. Recorded are the attentions that read a cache, how many
of them are quantized and fused, why the others are left, whether logits at 16 bits are those of a ``StaticCache`` in
eager code, how far those of ``kivi-4`` are off, what a self-check of the quantized graphs says, and the bytes.

    make conformance                    # goes on where it stopped; writes docs/conformance.json and docs/conformance.md
    .venv/bin/python benchmarks/conformance.py --only llama gemma2      # renew two records
    .venv/bin/python benchmarks/conformance.py --fresh                  # all anew, after a change
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from conformance_report import page
from forked import in_process, in_words
from tiny_models import build
from torch import Tensor
from torch._dynamo.utils import counters
from tqdm import tqdm
from transformers import StaticCache
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from xquant_fx import XQuantCache, XQuantConfig, memory_report
from xquant_fx.compiler.backend import compile_graph, detect_graph
from xquant_fx.compiler.options import parse
from xquant_fx.passes.records import Site

DOCS = Path(__file__).resolve().parents[1] / "docs"
PROMPT, STEPS, MAX_LEN = 16, 3, 40  # tokens; the prompt is longer than a tiny model's window: sliding layers are full
FULL = XQuantConfig.preset("full")
FOUR = XQuantConfig.preset("kivi-4").replace(k_group_size=8, residual_length=8)
EXACT = 1e-4


class Watching:
    """The backend, with rewritten graphs run op by op; keeps what was found in each graph."""

    def __init__(self, **options: Any) -> None:
        self.request = parse(None, options or None)
        self.sites: list[Site] = []
        self.looks = True

    def __call__(self, gm: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        if self.looks:
            self.sites += detect_graph(gm, inputs, self.request).sites
        return compile_graph(gm, inputs, self.request, lambda graph, *_: graph.forward)


def decode(model: torch.nn.Module, cache: StaticCache, backend: Watching | None = None, steps: int = STEPS) -> Tensor:
    """Logits [1, 1 + steps, V] of the prompt's last token and of the steps after it, of which ``backend`` sees one."""
    torch._dynamo.reset()
    step = model.forward if backend is None else torch.compile(model.forward, backend=backend, dynamic=False)
    ids = torch.randint(3, 100, (1, PROMPT + steps), generator=torch.Generator().manual_seed(0))
    out = [model(ids[:, :PROMPT], past_key_values=cache, use_cache=True).logits[:, -1:]]
    for at in range(PROMPT, PROMPT + steps):
        out.append(step(input_ids=ids[:, at : at + 1], past_key_values=cache, use_cache=True).logits)
        if backend is not None:
            backend.looks = False
    return torch.cat(out, 1).double()


def counted(sites: list[Site]) -> dict[str, Any]:
    """How many attentions read a cache, and what becomes of them."""
    cached = [site for site in sites if site.has_cache]
    done = [site for site in cached if site.rewritable]
    return {
        "sites": len(cached),
        "quantized": len(done),
        "fused": sum(site.form is not None for site in done),
        "left": dict(Counter(site.reason for site in cached if site.reason)),
        "read dequantized": dict(Counter(site.dequantized for site in done if site.dequantized)),
    }


def found_in(name: str) -> dict[str, Any]:
    """Only what is found in the first decode step, for a test."""
    model, seen = build(name), Watching()
    decode(model, XQuantCache(model.config, MAX_LEN, FOUR), seen, steps=1)
    return counted(seen.sites)


def examine(name: str) -> dict[str, Any]:
    """All that is recorded of one architecture."""
    model = build(name)
    try:
        right = decode(model, StaticCache(model.config, max_cache_len=MAX_LEN))
    except Exception as error:  # whatever a model's code raises
        return {"eager": in_words(error)}
    record: dict[str, Any] = {"eager": ""}
    try:
        full = decode(model, XQuantCache(model.config, MAX_LEN, FULL), Watching())
        if (error := error_of(full, right)) > EXACT:  # some models take the buffer's length for that of the text
            record["off with a StaticCache"] = error
            right = decode(model, XQuantCache(model.config, MAX_LEN, FULL))
        record["error at 16 bits"] = error_of(full, right)
        record["same tokens"] = bool((full.argmax(-1) == right.argmax(-1)).all())
        counters.clear()
        cache = XQuantCache(model.config, MAX_LEN, FOUR)
        four = decode(model, cache, seen := Watching(self_check=True))
        record.update(counted(seen.sites))
        record["error at 4 bits"] = error_of(four, right)
        record["refused by self_check"] = counters["xquant"]["self_check refused"]
        if cache.states:
            report = memory_report(cache)
            record["bytes"], record["bytes in full precision"] = report.total_bytes, report.full_bytes
    except Exception as error:
        record["error"] = in_words(error)
    return record


def recorded(name: str) -> dict[str, Any]:
    """``examine``, with a record of a model that cannot be built, too."""
    try:
        with torch._dynamo.config.patch(recompile_limit=64):
            return examine(name)
    except Exception as error:  # whatever a model's code raises
        return {"eager": f"it cannot be built: {in_words(error)}"}


def error_of(mine: Tensor, right: Tensor) -> float:
    """Relative error of logits, rounded to two digits."""
    return float(f"{((mine - right).norm() / right.norm()).item():.1e}")


def write(records: dict[str, dict[str, Any]], folder: Path) -> None:
    """Both files, in the order of the mapping."""
    rows = {name: records[name] for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if name in records}
    (folder / "conformance.json").write_text(json.dumps(rows, indent=1) + "\n")
    (folder / "conformance.md").write_text(page(rows, len(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)))


def main() -> None:
    """Examine what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", help="architectures to examine anew")
    parser.add_argument("--fresh", action="store_true", help="examine all of them anew")
    parser.add_argument("--folder", type=Path, default=DOCS)
    parser.add_argument("--seconds", type=float, default=300, help="limit for one architecture")
    args = parser.parse_args()
    path = args.folder / "conformance.json"
    records = json.loads(path.read_text()) if path.exists() and not args.fresh else {}
    missing = [name for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if name not in records]
    for name in tqdm(args.only or missing, unit=" architectures"):
        records[name] = in_process(recorded, name, args.seconds)
        write(records, args.folder)
    print((args.folder / "conformance.md").read_text())


if __name__ == "__main__":
    main()
