"""Which attentions of Hugging Face's causal language models can be quantized, and why others not.

Builds a tiny random model of every architecture in ``MODEL_FOR_CAUSAL_LM_MAPPING``. With a
``StaticCache`` and with an ``XQuantCache`` it runs an eager prefill and traces one warm decode step
with a backend that only looks. It prints one line an architecture (both verdicts; the reasons are
those for the ``StaticCache``) and writes a record of each as JSON. Each runs in a process of its
own; all of them take about half an hour on one core.

    python benchmarks/survey.py --out benchmarks/results/survey.json
    python benchmarks/survey.py --out benchmarks/results/survey.json --only llama deepseek_v3   # renew two records
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import transformers
from forked import in_process, in_words
from tiny_models import WINDOW, build
from torch.fx import GraphModule
from transformers import StaticCache
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from xquant_fx import XQuantCache
from xquant_fx.compiler.backend import detect_graph
from xquant_fx.compiler.options import parse

KINDS = {"static_cache": StaticCache, "xquant_cache": XQuantCache}
PROMPT, MAX_LEN = 16, 40  # tokens; the prompt is longer than a tiny model's window: sliding layers are full


def look(model: torch.nn.Module, cache: StaticCache) -> dict[str, Any]:
    """Trace one decode step on ``cache`` after an eager prefill and describe every attention in it."""
    graphs = []

    def backend(gm: GraphModule, inputs: list[Any]) -> Any:
        graphs.append(detect_graph(gm, inputs, parse(None, None)).sites)
        return gm.forward

    tokens = torch.randint(3, 100, (1, PROMPT))
    model(tokens, past_key_values=cache, use_cache=True)
    torch._dynamo.reset()
    torch.compile(model.forward, backend=backend, dynamic=False)(
        input_ids=tokens[:, :1], past_key_values=cache, use_cache=True
    )
    sites = [
        {
            "graph": number,
            "attention": site.attention.kind,
            "buffer": site.buffer_name,
            "has_cache": site.has_cache,
            "write": site.key_write.kind if site.key_write else "",
            "reason": site.reason,
            "read": [list(site.key.path), list(site.value.path)],
        }
        for number, found in enumerate(graphs)
        for site in found
    ]
    return {"verdict": verdict(sites), "graphs": len(graphs), "sites": sites}


def survey(name: str) -> dict[str, Any]:
    """What becomes of ``name`` with either kind of cache."""
    model = build(name)
    record: dict[str, Any] = {"architecture": name}
    for kind, make in KINDS.items():
        try:
            record[kind] = look(model, make(model.config, max_cache_len=MAX_LEN))
        except Exception as error:  # whatever a model's code raises becomes its record
            record[kind] = {"verdict": "error", "error": in_words(error)}
    return record


def verdict(sites: list[dict[str, Any]]) -> str:
    """``all``, ``some`` or ``none`` of the attentions with a cache, or ``no cache read``."""
    cached = [site for site in sites if site["has_cache"]]
    done = sum(not site["reason"] for site in cached)
    if not cached:
        return "no cache read"
    return "all" if done == len(cached) else "some" if done else "none"


def line(record: dict[str, Any]) -> str:
    """A record for people."""
    if "error" in record:
        return f"{record['architecture']:28} {'error':14} {record['error']}"
    verdicts = " ".join(f"{record[kind]['verdict']:14}" for kind in KINDS)
    part = record["static_cache"]
    reasons = Counter(site["reason"] for site in part.get("sites", []) if site["reason"])
    why = part.get("error") or "; ".join(f"{count}x {reason}" for reason, count in reasons.items())
    return f"{record['architecture']:28} {verdicts} {why}".rstrip()


def summary(rows: list[dict[str, Any]], kind: str) -> dict[str, Any]:
    """Counts for one kind of cache."""
    sites = [site for row in rows for site in row.get(kind, {}).get("sites", []) if site["has_cache"]]
    return {
        "verdicts": Counter(row[kind]["verdict"] if kind in row else "error" for row in rows),
        "sites": {"with a cache": len(sites), "quantized": sum(not site["reason"] for site in sites)},
        "reasons": Counter(site["reason"] for site in sites if site["reason"]).most_common(),
    }


def write(out: Path, records: dict[str, dict[str, Any]]) -> None:
    """Write all records, with the counts that sum them up."""
    rows = [records[name] for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if name in records]
    head = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "prompt": PROMPT,
        "max_cache_len": MAX_LEN,
        "sliding_window": WINDOW,
        "surveyed": f"{len(rows)} of {len(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)} architectures",
        **{kind: summary(rows, kind) for kind in KINDS},
    }
    out.write_text(json.dumps({**head, "architectures": rows}, indent=1) + "\n")


def main() -> None:
    """Run the survey."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", help="architectures; all by default")
    parser.add_argument("--out", type=Path, help="JSON file to write; records in it that are not run again are kept")
    parser.add_argument("--seconds", type=float, default=180, help="limit for one architecture")
    args = parser.parse_args()
    records, begin = {}, time.perf_counter()
    if args.out and args.out.exists():
        records = {row["architecture"]: row for row in json.loads(args.out.read_text())["architectures"]}
    for name in args.only or MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        records[name] = {"architecture": name, **in_process(survey, name, args.seconds)}
        print(line(records[name]), flush=True)
        if args.out:
            write(args.out, records)
    for kind in KINDS:
        print(kind, dict(summary(list(records.values()), kind)["verdicts"]))
    print(f"{time.perf_counter() - begin:.0f} s")


if __name__ == "__main__":
    main()
