"""What every benchmark writes beside its numbers: machine, versions, commit and settings."""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import platform
import subprocess
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.profiler import ProfilerActivity, profile

from xquant_fx import __version__

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def synchronize(device: str) -> None:
    """Wait for the device, so that the clock sees the work."""
    if device != "cpu":
        torch.accelerator.synchronize()


def peak_bytes(run: Callable[[], Any], device: str) -> int:
    """Most bytes that torch's allocator holds during ``run()`` beyond what it held before."""
    if device != "cpu":
        synchronize(device)
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        synchronize(device)
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        run()
    changes = [event.nbytes() for event in found.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(itertools.accumulate(changes, initial=0))


def cpu_name() -> str:
    """The processor as Linux names it, and what vectors torch uses on it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}"


def where(args: argparse.Namespace) -> dict[str, Any]:
    """Machine, versions, commit and settings of this run."""
    try:
        git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
        commit = git.stdout.strip() or "unknown: not a git checkout"
    except OSError:
        commit = "unknown: no git"
    device = torch.cuda.get_device_name() if args.device.startswith("cuda") else cpu_name()
    versions = {"torch": torch.__version__, "transformers": transformers.__version__, "xquant_fx": __version__}
    versions |= {name: metadata.version(name) for name in ("triton",) if importlib.util.find_spec(name)}
    return {"device": device, "threads": torch.get_num_threads(), "commit": commit, **versions, "settings": vars(args)}


def write(name: str, result: dict[str, Any]) -> None:
    """Write ``result`` to benchmarks/results/NAME.json; after every row, so that a run cut short leaves something."""
    out = RESULTS / f"{name}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=2) + "\n")
