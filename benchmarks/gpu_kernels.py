"""Decode kernels on a GPU: time in CUDA graphs, registers, clocks, and a sweep; one JSON line for each result.

    python benchmarks/gpu_kernels.py facts bar --out gpu.jsonl        # what machine this is, and the bar
    python benchmarks/gpu_kernels.py compile rows all profile sweep --out gpu.jsonl
    python benchmarks/gpu_kernels.py facts bar compile rows all profile sweep --dry-run   # no GPU: what is launched

Times are of the device: a graph of some calls is replayed between two events, so that no launch is waited for. A line
says what share of the bandwidth of a copy, measured in the same process, a step reached. What fails is a line, too; if
the device is of no more use to the process after that, it exits with 75, to be run again with ``--resume``.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import functools
import json
import os
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from gpu_cases import BAR, Case, bytes_read, cases, copies, full_precision, row_cases, step
from results import where
from triton_compiled import launches

from xquant_fx import ops
from xquant_fx.kernels.decode_attention import plain_torch, triton_interior_settings, triton_launch
from xquant_fx.kernels.rows import row_of
from xquant_fx.kernels.triton_device import Device

CALLS, REPLAYS = 4, 5
COMPILERS = max(min((os.cpu_count() or 1) - 2, 14), 1)
"""Processes that compile at a time."""
AGAIN = 75
"""Exit status of a process that cannot go on, but another may."""
MOST_ERROR = 0.02
"""Of a bfloat16 step beside another, by the largest number."""


class Run:
    """Where results go, and whether there is a GPU."""

    def __init__(self, out: str, dry: bool, resume: bool = False) -> None:
        self.out, self.dry, self.device = Path(out), dry, "meta" if dry else "cuda"
        lines = self.out.read_text().splitlines() if resume and self.out.exists() else []
        self.done = [json.loads(line).items() for line in lines]
        """Lines of what is not attempted again."""

    @functools.cached_property
    def bandwidth(self) -> float | None:
        """Bytes per second of a copy on the GPU, if there is one."""
        return None if self.dry else self.attempt("copy", copy_bandwidth, again=True).get("bytes_a_second")

    def note(self, what: str, **result: Any) -> None:
        """Append a line."""
        line = json.dumps({"what": what, "at": round(time.time(), 1), **result}, default=str)
        with self.out.open("a") as file:
            file.write(line + "\n")
        print(line[:240], flush=True)

    def attempt(
        self, what: str, body: Callable[[], dict[str, Any] | None], again: bool = False, **about: Any
    ) -> dict[str, Any]:
        """Note what ``body`` gives, or why it failed; nothing if there is a line already, unless ``again``."""
        line = json.loads(json.dumps({"what": what, **about}, default=str)).items()
        if not again and any(all(item in known for item in line) for known in self.done):
            return {}
        try:
            result = body() or {}
        except Exception as error:
            result = {"error": f"{type(error).__name__}: {str(error)[:400]}"}
        self.note(what, **about, **result)
        if "error" in result and not self.dry and is_lost():
            raise SystemExit(AGAIN)
        return result


def is_lost() -> bool:
    """Whether nothing more can be run: what a kernel did to the device, or a capture that failed, stays."""
    if not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except Exception:
        return True
    return False


def smi(*fields: str) -> dict[str, str]:
    """What nvidia-smi says of the first GPU."""
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader", "--id=0"]
    try:
        text = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError) as error:
        return {"nvidia-smi": str(error)}
    return dict(zip(fields, (part.strip() for part in text.strip().split(",")), strict=False))


def microseconds(calls: list[Callable[[], Any]]) -> float:
    """Median time on the device of one of ``calls``, which are captured in one graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()  # compiles, and warms up
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS):
            for call in calls:
                call()
    times = []
    for _ in range(REPLAYS + 1):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(1e3 * begin.elapsed_time(end) / CALLS / len(calls))
    return statistics.median(times[1:])


def copy_bandwidth() -> dict[str, float]:
    """Of a copy of 2 GB, reads and writes together."""
    x = torch.zeros(2**29, dtype=torch.float32, device="cuda")
    y = torch.empty_like(x)
    return {"bytes_a_second": 2 * x.numel() * 4 / (microseconds([lambda: y.copy_(x)]) * 1e-6)}


def facts(run: Run, args: argparse.Namespace) -> None:
    """Machine, versions, clocks."""
    of_gpu = "name", "clocks.max.sm", "clocks.sm", "clocks.mem", "power.limit"
    run.attempt("facts", lambda: {**where(args), **smi(*of_gpu)})


def needs() -> list[dict[str, Any]]:
    """Registers, spills and shared memory of the kernels that this process has loaded."""
    from xquant_fx.kernels.decode_attention.triton_interior import interior_kernel
    from xquant_fx.kernels.decode_attention.triton_kernels import combine_kernel, decode_kernel

    return [
        {"kernel": kernel.fn.__name__, "registers": one.n_regs, "spilled": one.n_spills, "shared": one.metadata.shared}
        for kernel in (interior_kernel, decode_kernel, combine_kernel)
        for cached in kernel.device_caches.values()
        for one in cached[0].values()
    ]


def time_case(run: Run, case: Case) -> dict[str, Any]:
    """Microseconds of a step, and the share of the bandwidth of a copy."""
    own, full = bytes_read(case)
    if run.dry:
        return {"bytes": own, "full_bytes": full, "kernels": launched(case)}
    sets = [step(case, "cuda")._asdict() for _ in range(copies(case))]
    us = microseconds([lambda given=given: ops.DECODE(**given) for given in sets])
    share = own / (us * 1e-6) / run.bandwidth if run.bandwidth else None
    ideal = full / (0.9 * run.bandwidth) * 1e6 if run.bandwidth else None  # full precision at 90 percent of a copy
    clocks = smi("clocks.sm", "temperature.gpu", "power.draw")
    return {"us": us, "bytes": own, "of_copy": share, "times_faster_than_ideal": ideal and ideal / us, **clocks}


def launched(case: Case) -> list[str]:
    """Names of the kernels of a step."""
    return [one.kernel.fn.__name__ for one in launches(triton_launch.launch, step(case, "meta"), hip=False)]


def by_kernel(call: Callable[[], Any]) -> dict[str, float]:
    """Microseconds of each kernel of a call, by the profiler."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as found:
        for _ in range(3):
            call()
        torch.cuda.synchronize()
    return {event.key[:40]: event.device_time_total / 3 for event in found.key_averages() if event.device_time_total}


def profile(run: Run, args: argparse.Namespace) -> None:
    """Microseconds of each kernel of a step. After what is timed: the profiler may stay attached."""
    for case in [*cases()[:2], *(dict(BAR, setting=name, length=8192) for name in ("2/2 bits", "xquant-2.2"))]:

        def of(case: Case = case) -> dict[str, Any]:
            if run.dry:
                return {"kernels": launched(case)}
            given = step(case, "cuda")._asdict()
            ops.DECODE(**given)
            return {"by_kernel": by_kernel(lambda: ops.DECODE(**given))}

        run.attempt("profile", of, **case)


def time_full(run: Run, case: Case) -> None:
    """Microseconds of each full-precision way."""
    about = {key: case[key] for key in ("length", "batch", "group", "query", "dim") if key in case}
    ways: dict[str, Callable[[], Any]] = {}
    run.attempt("ways", lambda: ways.update(full_precision(case, "meta" if run.dry else "cuda")), again=True, **about)
    for name, call in ways.items():
        body = (lambda: {}) if run.dry else lambda call=call: {"us": microseconds([call])}
        run.attempt("full precision", body, way=name, **about)


def bar(run: Run, args: argparse.Namespace) -> None:
    """The step that the project is measured by: default and paper's settings, beside full precision."""
    for case in cases()[:2]:
        run.attempt("step", lambda case=case: time_case(run, case), **case)
    time_full(run, BAR)
    if not run.dry:
        run.attempt("needs", lambda: {"kernels": needs()})


def row_error(case: Case, device: str) -> float:
    """Largest error of a step of rows of lengths of their own beside plain torch, by the largest number."""
    torch.manual_seed(1)
    a = step(case, device).mapped(torch.randn_like, ("q",))
    a = a.mapped(lambda ring: 0.03 * torch.randn_like(ring), ("k_ring", "v_ring"))  # about as large as codes
    plain = torch.cat([plain_torch.attend(row_of(a, row)) for row in range(len(case["pasts"]))]).float()
    return float((ops.DECODE(**a._asdict()).float() - plain).abs().max() / plain.abs().max())


def rows(run: Run, args: argparse.Namespace) -> None:
    """Whether rows of lengths of their own give what each gives alone; no times."""

    def check(case: Case) -> dict[str, Any]:
        if run.dry:
            return {"kernels": launched(case)}
        error = row_error(case, "cuda")
        if not error < MOST_ERROR:
            raise ArithmeticError(f"{error:.3g} of the largest number")
        return {"of_largest": error}

    for case in row_cases():
        run.attempt("rows", lambda case=case: check(case), **case)


Variant = tuple[float, int]
"""How many programs, by those that are estimated to run at a time, and how many tiles in flight."""


@contextlib.contextmanager
def other_settings(variant: Variant | None) -> Iterator[None]:
    """Launches as ``variant`` has it; None: as they are."""
    if variant is None:
        yield
        return
    share, stages = variant
    chosen, device_of = triton_interior_settings.interior_settings, triton_launch.device_of

    def other(**given: Any) -> dict[str, Any]:
        return chosen(**given) | {"INTERIOR_STAGES": stages}

    def larger(device: torch.device) -> Device:
        found = device_of(device)
        return found._replace(multiprocessors=int(share * found.multiprocessors))

    with (
        mock.patch.object(triton_launch, "device_of", larger),
        mock.patch("xquant_fx.kernels.decode_attention.triton_settings.interior_settings", other),
    ):
        yield


def swept() -> list[tuple[Case, Variant]]:
    """The bar with half and twice as many programs as are estimated to run at a time, and other numbers of tiles."""
    return [(case, (share, stages)) for share in (0.5, 1.0, 2.0) for stages in (2, 3, 4) for case in cases()[:2]]


def compile_one(case: Case, variant: Variant | None) -> str:
    """Fill Triton's cache with the kernels of ``case``; "" or what went wrong."""
    try:
        with other_settings(variant):
            ops.DECODE(**step(case, "cuda")._asdict())
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:200]}"
    return ""


def compile_all(run: Run, args: argparse.Namespace) -> None:
    """Compile the kernels of all cases, in several processes."""
    begin = time.time()
    todo: list[tuple[Case, Variant | None]] = [(case, None) for case in [*cases(), *row_cases()]] + [*swept()]
    if run.dry:
        run.note("compiled", cases=len(todo))
        return
    import multiprocessing

    fresh = multiprocessing.get_context("spawn")  # a process that has used CUDA cannot be forked
    with concurrent.futures.ProcessPoolExecutor(COMPILERS, mp_context=fresh) as pool:
        for (case, variant), wrong in zip(todo, pool.map(compile_one, *zip(*todo, strict=True)), strict=True):
            if wrong:
                run.note("compile", **case, variant=variant, error=wrong)
    run.note("compiled", seconds=time.time() - begin)


def every(run: Run, args: argparse.Namespace) -> None:
    """All cases; full precision once for each shape."""
    seen = set()
    for case in cases():
        run.attempt("step", lambda case=case: time_case(run, case), **case)
        shape = tuple(case.get(key) for key in ("length", "batch", "group", "query", "dim"))
        if shape not in seen and case.get("max_len") is None:
            time_full(run, case)
        seen.add(shape)
        if not run.dry:
            torch.cuda.empty_cache()


def sweep(run: Run, args: argparse.Namespace) -> None:
    """The bar in other settings."""
    for case, variant in swept():
        with other_settings(variant):
            run.attempt("sweep", lambda case=case: time_case(run, case), programs=variant[0], stages=variant[1], **case)


JOBS = {
    "facts": facts, "bar": bar, "compile": compile_all, "rows": rows, "all": every, "profile": profile, "sweep": sweep,
}  # fmt: skip


def main() -> None:
    """Do the jobs that are asked for, in order."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("jobs", nargs="+", choices=list(JOBS))
    parser.add_argument("--out", default="benchmarks/results/gpu.jsonl", help="file of results, appended to")
    parser.add_argument("--dry-run", action="store_true", help="no GPU: say what would be launched")
    parser.add_argument("--resume", action="store_true", help="attempt nothing that has a line in the file")
    args = parser.parse_args()
    args.device = "cpu" if args.dry_run else "cuda"
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    run = Run(args.out, args.dry_run, args.resume)
    for job in args.jobs:
        run.attempt("done", lambda job=job: JOBS[job](run, args), job=job)


if __name__ == "__main__":
    main()
