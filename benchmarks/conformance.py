"""What becomes of Hugging Face's causal language models under the backend, and whether it is right.

Of every architecture of ``MODEL_FOR_CAUSAL_LM_MAPPING`` a tiny random model decodes with each of three caches: a prompt
in eager code, longer than its sliding windows, then steps, some of them in eager code, the others by rewritten graphs
that run op by op. Recorded are the attentions that read a cache, how many of them are quantized and fused, why the
others are left, and whether logits at 16 bits are those of eager code; of an ``XQuantCache`` also how far those of
``kivi-4`` are off, what a self-check of the quantized graphs says, and the bytes. A fourth record is of the program of
one line, ``model.compile(backend="xquant")``: prompt and steps are compiled at ``kivi-4``, with a ``DynamicCache``.

    make conformance                    # goes on where it stopped; writes docs/conformance.json and docs/conformance.md
    .venv/bin/python benchmarks/conformance.py --only llama gemma2      # renew two records
    .venv/bin/python benchmarks/conformance.py --fresh                  # all anew, after a change
"""

from __future__ import annotations

import argparse
import gc
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from conformance_report import EXACT, ONE_LINE, OTHERS, TAKEN_OVER, write
from forked import in_process, in_words
from tiny_models import NO_CACHE, OWN_CACHE, WHOLE_TEXT, WINDOW, build
from torch import Tensor
from torch._dynamo.utils import counters
from tqdm import tqdm
from transformers import DynamicCache, StaticCache
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from xquant_fx import XQuantCache, XQuantConfig, memory_report
from xquant_fx.compiler.backend import compile_graph
from xquant_fx.compiler.detection import detect_graph
from xquant_fx.compiler.options import parse
from xquant_fx.passes.records import Site

DOCS = Path(__file__).resolve().parents[1] / "docs"
PROMPT, STEPS, MAX_LEN = WINDOW + 8, 18, WINDOW + 48  # tokens
COMPILED = (0, STEPS - 1)  # steps; by the last one a window of quantized tokens has begun to overwrite its first ones
#: Sliding windows are longer than what stays in full precision, so that there is something to quantize.
SMALL: dict[str, Any] = dict(k_group_size=8, residual_length=8, rollback_tokens=8, sliding_windows=True)
FULL = XQuantConfig.preset("full").replace(**SMALL)
FOUR = XQuantConfig.preset("kivi-4").replace(**SMALL)
KINDS = ("XQuantCache", *OTHERS)


class Watching:
    """The backend, with rewritten graphs run op by op; keeps what it would do with the first step at 4 bits."""

    def __init__(self, **options: Any) -> None:
        self.request = parse(None, options or None)
        self.at_four_bits = parse(None, {**options, "config": FOUR} if "config" in options else options or None)
        self.sites: list[Site] = []
        self.looks = True
        self.later = 0
        """Graphs that came after the first step."""

    def __call__(self, gm: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        self.later += not self.looks
        if self.looks:
            self.sites += detect_graph(gm, inputs, self.at_four_bits).sites
        return compile_graph(gm, inputs, self.request, lambda graph, *_: graph.forward)


def decode(
    model: torch.nn.Module, cache: Any, backend: Watching | None = None, steps: int = STEPS, all_of_it: bool = False
) -> Tensor:
    """Logits [1, 1 + steps, V] of the prompt's last token and of the steps after it; ``backend`` gets some of them.

    Without a ``cache`` the model makes one. With ``all_of_it`` the backend gets all steps, and the prompt.
    """
    torch._dynamo.reset()
    dynamic = None if all_of_it else False
    compiled = model.forward if backend is None else torch.compile(model.forward, backend=backend, dynamic=dynamic)
    ids = torch.randint(3, 100, (1, PROMPT + steps), generator=torch.Generator().manual_seed(0))
    begin = compiled if all_of_it else model.forward
    prompt = begin(input_ids=ids[:, :PROMPT], past_key_values=cache, use_cache=True)
    if backend is not None:
        backend.sites = []  # a step's are wanted
    out = [prompt.logits[:, -1:]]
    cache = prompt.past_key_values if cache is None else cache
    whole_text = model.config.model_type in WHOLE_TEXT
    for step in range(steps):
        at = PROMPT + step
        call = compiled if all_of_it or step in COMPILED else model.forward
        new = ids[:, 0 if whole_text else at : at + 1]
        out.append(call(input_ids=new, past_key_values=cache, use_cache=True).logits[:, -1:])
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


def found_in(name: str, kind: str = "XQuantCache") -> dict[str, Any]:
    """Only what is found in the first decode step, for a test."""
    model = build(name)
    ours = kind == "XQuantCache"
    seen = Watching() if ours else Watching(config=FULL)
    decode(model, XQuantCache(model.config, MAX_LEN, FOUR) if ours else made(name, kind, model), seen, steps=1)
    return counted(seen.sites)


def examine(name: str) -> dict[str, Any]:
    """What is recorded of one architecture with an ``XQuantCache``."""
    model, record = build(name), dict[str, Any](eager="")
    right: dict[str, Tensor] = {}
    for kind in TAKEN_OVER:
        try:
            right[kind] = decode(model, made(name, kind, model))
        except Exception as error:  # whatever a model's code raises
            record[f"{kind} fails"] = in_words(error)
    try:
        mine = decode(model, XQuantCache(model.config, MAX_LEN, FULL))
    except Exception as error:
        if "StaticCache" in right:
            return record | {"error": in_words(error)}
        return {"eager": record["StaticCache fails"]}
    return record | _caught(lambda: _with_xquant_cache(model, mine, right))


def made(name: str, kind: str, model: torch.nn.Module) -> Any:
    """A new cache of transformers; none where a model takes only what it makes itself."""
    if kind == "StaticCache":
        return StaticCache(model.config, max_cache_len=MAX_LEN)
    return None if name in OWN_CACHE else DynamicCache(config=model.config)


def taken_over(name: str, kind: str) -> dict[str, Any]:
    """What is recorded of one architecture with a cache of transformers: what is found at 4 bits, and logits at 16."""
    model = build(name)
    try:
        right = decode(model, made(name, kind, model))
    except Exception as error:
        return {"eager": in_words(error)}
    seen = Watching(config=FULL)
    found = _caught(lambda: _compared(decode(model, made(name, kind, model), seen), right))
    return {"eager": "", **found, **counted(seen.sites)}


def one_line(name: str) -> dict[str, Any]:
    """What is recorded of the program of one line: rewritten graphs at 4 bits, each compared with the program's."""
    model = build(name)
    try:
        right = decode(model, made(name, "DynamicCache", model))
    except Exception as error:
        return {"eager": in_words(error)}
    counters.clear()
    seen = Watching(config=FOUR, self_check=True)
    cache = made(name, "DynamicCache", model)
    done = _caught(lambda: {"error at 4 bits": error_of(decode(model, cache, seen, all_of_it=True), right)})
    more = {"refused by self_check": counters["xquant"]["self_check refused"], "later graphs": seen.later}
    return {"eager": "", **done, **counted(seen.sites), **more}


def _with_xquant_cache(model: torch.nn.Module, mine: Tensor, right: dict[str, Tensor]) -> dict[str, Any]:
    """``mine`` and ``right`` are logits of eager code, at 16 bits and with other caches."""
    full = decode(model, XQuantCache(model.config, MAX_LEN, FULL), Watching())
    off = {kind: error_of(mine, logits) for kind, logits in right.items()}
    record: dict[str, Any] = {f"off with a {kind}": error for kind, error in off.items() if error > EXACT}
    # Some models take a buffer's length for that of the text, with a StaticCache or with any.
    expected = next((right[kind] for kind, error in off.items() if error <= EXACT), mine)
    record |= _compared(full, expected)
    counters.clear()
    cache = XQuantCache(model.config, MAX_LEN, FOUR)
    four = decode(model, cache, seen := Watching(self_check=True))
    record |= counted(seen.sites)
    record["error at 4 bits"] = error_of(four, expected)
    record["refused by self_check"] = counters["xquant"]["self_check refused"]
    if cache.states:
        report = memory_report(cache)
        record["bytes"], record["bytes in full precision"] = report.total_bytes, report.full_bytes
    return record


def _compared(mine: Tensor, right: Tensor) -> dict[str, Any]:
    same = bool((mine.argmax(-1) == right.argmax(-1)).all())
    return {"error at 16 bits": error_of(mine, right), "same tokens": same}


def _caught(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    try:
        return work()
    except Exception as error:
        return {"error": in_words(error)}


def recorded(name: str, kind: str = "XQuantCache") -> dict[str, Any]:
    """What is recorded of one architecture, also of a model that cannot be built."""
    if name in NO_CACHE:
        return {"eager": NO_CACHE[name]}
    try:
        with torch._dynamo.config.patch(recompile_limit=64):
            if kind in TAKEN_OVER:
                return taken_over(name, kind)
            return one_line(name) if kind == ONE_LINE else examine(name)
    except Exception as error:  # whatever a model's code raises
        return {"eager": f"it cannot be built: {in_words(error)}"}


def error_of(mine: Tensor, right: Tensor) -> float:
    """Relative error of logits, rounded to two digits."""
    return float(f"{((mine - right).norm() / right.norm()).item():.1e}")


def missing(records: dict[str, dict[str, Any]], kind: str) -> list[str]:
    """Architectures without a record of this kind of cache."""
    key = kind if kind in OTHERS else "eager"
    return [name for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if key not in records.get(name, {})]


def main() -> None:
    """Examine what is missing, one kind of cache after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", help="architectures to examine anew")
    parser.add_argument("--fresh", action="store_true", help="examine all of them anew")
    parser.add_argument("--caches", nargs="*", choices=KINDS, default=KINDS)
    parser.add_argument("--folder", type=Path, default=DOCS)
    parser.add_argument("--seconds", type=float, default=300, help="limit for one architecture and cache")
    args = parser.parse_args()
    path = args.folder / "conformance.json"
    records = json.loads(path.read_text()) if path.exists() and not args.fresh else {}
    torch.set_num_threads(1)
    with torch.no_grad():
        found_in("llama")  # what is imported here is not imported again in each process
    gc.freeze()
    for kind in args.caches:
        for name in tqdm(args.only or missing(records, kind), desc=kind, unit=" architectures"):
            found = in_process(recorded, args.seconds, name, kind)
            others = {other: each for other, each in records.get(name, {}).items() if other in OTHERS}
            records[name] = records.get(name, {}) | {kind: found} if kind in OTHERS else found | others
            write(records, args.folder)
    print((args.folder / "conformance.md").read_text())


if __name__ == "__main__":
    main()
