"""What the first compiled step costs: empty caches on disk, filled ones, and where the time goes.

    python benchmarks/first_step.py MODEL                    # a folder or a name on the Hugging Face hub
    python benchmarks/first_step.py MODEL --side static      # StaticCache under plain Inductor
    python benchmarks/first_step.py MODEL --side taken-over  # StaticCache, quantized by its first step
    python benchmarks/first_step.py MODEL --side growing     # DynamicCache
                                                             # "more room": two steps after its room is filled
    python benchmarks/first_step.py MODEL --chunk 512        # and the first two chunks of so many tokens
    python benchmarks/first_step.py MODEL --dynamic          # under dynamic=True
    python benchmarks/first_step.py MODEL --talk             # prompts, steps and turns of a chat, all compiled
    python benchmarks/first_step.py MODEL --talk --fullgraph # the same, where Dynamo traces prompts and turns, too
    python benchmarks/first_step.py MODEL --runs warm warm --cache-dir FOLDER

Each run is a process of its own: it loads the model, prefills 64 tokens uncompiled, and takes compiled steps, the last
two with other caches, of twice and three times the length. ``new`` has nothing on disk, ``cold`` has torch's
precompiled header, ``warm`` all that the runs before it left. Seconds of the processor, of the process and of the
compilers that it starts, do not depend on what else the machine does as much as the clock does, and are printed beside
it. JSON goes to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from compile_caches import WAYS, in_new_process
from rich.console import Console
from rich.table import Table

PROMPT = 64
#: Steps with each cache.
STEPS = (("first", "second", "third"), ("another length",), ("a third length",))
CHUNKS = ("first chunk", "second chunk")
#: What a process is asked for, in turn: name, tokens, and whether they begin a new cache.
TALK = (
    ("first prompt", 64, True), ("first step", 1, False), ("second step", 1, False), ("first turn", 20, False),
    ("step", 1, False), ("second turn", 33, False), ("second prompt", 100, True), ("its first step", 1, False),
    ("third prompt", 37, True), ("its first step, too", 1, False),
)  # fmt: skip
#: Phase to the name that ``torch._dynamo.utils.compile_times`` has for it; they do not overlap, but do not cover all.
PHASES = {
    "Dynamo traces": "bytecode_tracing", "guards": "build_guards", "detection": "xquant_detect",
    "passes": "xquant_passes", "AOT metadata": "aot_collect_metadata", "joint passes": "_recursive_joint_graph_passes",
    "post-grad passes": "_recursive_post_grad_passes", "lowering": "GraphLowering.run",
    "scheduling": "Scheduler.__init__", "code generation": "Scheduler.codegen", "C++ of kernels": "async_compile.wait",
    "C++ of one call": "xquant_one_call", "cached graph": "AOTAutogradCache.inductor_load",
}  # fmt: skip


def seconds() -> dict[str, float]:
    """Clock, and processor seconds of this process and of those it waited for."""
    own, others = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = {"self": own.ru_utime + own.ru_stime, "compilers": others.ru_utime + others.ru_stime}
    return {"clock": time.perf_counter(), **cpu}


def side_of(args: argparse.Namespace, config: Any) -> tuple[str, Callable[[int], Any]]:
    """The backend of ``args.side``, and what makes its caches, for so many tokens."""
    from transformers import DynamicCache, StaticCache

    from xquant_fx import XQuantCache

    fixed: Any = {"xquant": XQuantCache, "static": StaticCache, "taken-over": StaticCache}.get(args.side)
    backend = "inductor" if args.side == "static" else "xquant"
    return backend, lambda length: fixed(config, max_cache_len=length) if fixed else DynamicCache(config=config)


def first_step(args: argparse.Namespace) -> dict[str, Any]:
    """One run, in this process."""
    import torch
    from torch._dynamo.utils import compilation_time_metrics, counters
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=getattr(torch, args.dtype)).eval()
    backend, new_cache = side_of(args, model.config)
    ids, found = torch.arange(1, 1 + PROMPT)[None], dict[str, Any]()
    step = torch.compile(model.forward, backend=backend, dynamic=args.dynamic)
    with torch.no_grad():
        for times, names in enumerate(STEPS):
            cache = new_cache(args.max_cache_len * (1 + times))
            model(ids, past_key_values=cache)
            for name in names:
                before = seconds()
                step(ids[:, :1], past_key_values=cache)
                found[name] = {kind: value - before[kind] for kind, value in seconds().items()}
            if args.side == "growing" and times == 0:
                found["more room"] = more_room(model, step, ids, cache)
    times = {phase: sum(compilation_time_metrics.get(name, ())) for phase, name in PHASES.items()}
    hits = {name: counters[kind][f"{name}_hit"] for kind, name in (("aot_autograd", "autograd_cache"),)}
    found |= {"phases": times, "hits": hits, "compiled_files": len(compilation_time_metrics.get("compile_file", ()))}
    found["graphs"] = counters["stats"]["unique_graphs"]
    if args.chunk:
        found |= chunks(model, step, new_cache(args.max_cache_len * 2), args.chunk)
    return {**found, "load": os.getloadavg()[0]}


def talk(args: argparse.Namespace) -> dict[str, Any]:
    """What who talks to a compiled model waits for, in this process."""
    import torch
    from torch._dynamo.utils import counters
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=getattr(torch, args.dtype)).eval()
    backend, new_cache = side_of(args, model.config)
    call = torch.compile(model.forward, backend=backend, fullgraph=args.fullgraph)
    found, cache = dict[str, Any](), None
    with torch.no_grad():
        for name, tokens, begins in TALK:
            if begins:
                cache = new_cache(args.max_cache_len)
            ids = torch.tensor([[7919 * (1 + i) % model.config.vocab_size for i in range(tokens)]])
            before = seconds()
            call(ids, past_key_values=cache, logits_to_keep=1)
            found[name] = {kind: value - before[kind] for kind, value in seconds().items()}
    return {**found, "graphs": counters["stats"]["unique_graphs"], "load": os.getloadavg()[0]}


def table_of_talk(rows: list[dict[str, Any]], args: argparse.Namespace) -> Table:
    """A column for each run."""
    made = Table("seconds by the clock", *(row["way"] for row in rows), title=f"a chat, {args.model}, {args.side}")
    for name, tokens, _ in TALK:
        made.add_row(f"{name} ({tokens})", *(f"{row[name]['clock']:.3f}" for row in rows))
    made.add_row("graphs", *(str(row["graphs"]) for row in rows))
    return made


def chunks(model: Any, step: Any, cache: Any, tokens: int) -> dict[str, dict[str, float]]:
    """What compiled chunks of ``tokens`` tokens cost, behind an uncompiled prompt in a new ``cache``."""
    import torch

    ids, found = torch.arange(1, 1 + PROMPT + len(CHUNKS) * tokens)[None], dict[str, Any]()
    prompt, *pieces = ids.split([PROMPT, *[tokens] * len(CHUNKS)], 1)
    with torch.no_grad():
        model(prompt, past_key_values=cache)
        for name, piece in zip(CHUNKS, pieces, strict=True):
            before = seconds()
            step(piece, past_key_values=cache)
            found[name] = {kind: value - before[kind] for kind, value in seconds().items()}
    return found


def more_room(model: Any, step: Any, ids: Any, cache: Any) -> dict[str, float]:
    """What two steps cost after uncompiled code has filled the room that there was."""
    room = cache.layers[0].keys.live.spec.shape[2]
    model(ids[:, :1].expand(1, room - cache.get_seq_length()), past_key_values=cache)
    before = seconds()
    for _ in range(2):
        step(ids[:, :1], past_key_values=cache)
    assert cache.layers[0].keys.live.spec.shape[2] > room
    return {kind: value - before[kind] for kind, value in seconds().items()}


def table(rows: list[dict[str, Any]], args: argparse.Namespace) -> Table:
    """A column for each run."""
    made = Table("seconds", *(row["way"] for row in rows), title=f"first step, {args.model}, {args.side}")
    for kind in ("clock", "self", "compilers"):
        made.add_row(f"first step, {kind}", *(f"{row['first'][kind]:.2f}" for row in rows))
    more = (*(("more room",) if args.side == "growing" else ()), *(CHUNKS if args.chunk else ()))
    for name in (*STEPS[0][1:], *STEPS[1], *STEPS[2], *more):
        made.add_row(f"{name}, clock", *(f"{row[name]['clock']:.3f}" for row in rows))
    for phase in PHASES:
        made.add_row(phase, *(f"{row['phases'][phase]:.2f}" for row in rows))
    made.add_row("runs of the C++ compiler", *(str(row["compiled_files"]) for row in rows))
    made.add_row("load of the machine", *(f"{row['load']:.1f}" for row in rows))
    return made


def main() -> None:
    """Run, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--side", choices=["xquant", "static", "taken-over", "growing"], default="xquant")
    parser.add_argument("--runs", nargs="+", choices=list(WAYS), default=["new", "cold", "warm", "warm"])
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--max-cache-len", type=int, default=1024)
    parser.add_argument("--chunk", type=int, default=0, help="tokens of chunks that are compiled, too; 0: none")
    parser.add_argument(
        "--dynamic", action="store_const", const=True, help="dynamic=True: sizes are open from the start"
    )
    parser.add_argument("--talk", action="store_true", help="prompts and turns of a chat instead")
    parser.add_argument("--fullgraph", action="store_true", help="of --talk: everything is traced")
    parser.add_argument("--cache-dir", type=Path, help="kept; without it a folder that is thrown away")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(talk(args) if args.talk else first_step(args)))
        return
    from results import where, write

    with tempfile.TemporaryDirectory() as temporary:
        folder = args.cache_dir or Path(temporary)
        rows = [{"way": way, **in_new_process(way, [*sys.argv[1:], "--one"], folder)} for way in args.runs]
    Console(width=120).print(table_of_talk(rows, args) if args.talk else table(rows, args))
    args.device, args.cache_dir = "cpu", str(args.cache_dir)
    more = "".join(
        name for name, asked in (("-chunks", args.chunk), ("-traced", args.fullgraph), ("-open", args.dynamic)) if asked
    )
    write(f"{'first-words' if args.talk else 'first-step'}-cpu-{args.side}{more}", {**where(args), "rows": rows})


if __name__ == "__main__":
    main()
