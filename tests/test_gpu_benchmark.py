"""benchmarks/gpu_kernels.py and gpu.sh as far as they go without a GPU."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import gpu_cases
import gpu_kernels

from xquant_fx import ops

ROOT = Path(__file__).resolve().parents[1]


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_dry_run_of_all_jobs(tmp_path: Path) -> None:
    """Nothing fails; the bar comes first, by both settings, and beside full precision."""
    out = tmp_path / "gpu.jsonl"
    run = gpu_kernels.Run(str(out), dry=True)
    for job in gpu_kernels.JOBS.values():
        job(run, argparse.Namespace(device="cpu"))
    lines = lines_of(out)
    assert not [line for line in lines if "error" in line]
    steps = [line for line in lines if line["what"] == "step"]
    assert [line["setting"] for line in steps[:2]] == ["2/2 bits", "xquant-2.2"]
    assert all(line["kernels"][0] == "interior_kernel" and line["length"] == 131072 for line in steps[:2])
    assert {line["way"] for line in lines if line["what"] == "full precision"} >= {"flash", "cudnn", "matmul"}
    assert sum(line["what"] == "sweep" for line in lines) == 18
    assert [line["kernels"][0] for line in lines if line["what"] == "rows"] == ["interior_kernel"] * 2


def test_what_fails_is_a_line(tmp_path: Path) -> None:
    out = tmp_path / "gpu.jsonl"
    run = gpu_kernels.Run(str(out), dry=False)

    def fails() -> dict[str, Any]:
        raise RuntimeError("no kernel image")

    run.attempt("step", fails, length=7)
    run.attempt("step", lambda: {"us": 1.0}, length=8)
    first, second = lines_of(out)
    assert first["error"] == "RuntimeError: no kernel image" and first["length"] == 7
    assert second["us"] == 1.0 and "error" not in second


@pytest.mark.parametrize("setting", ["2/2 bits", "xquant-2.2"])
def test_steps_are_such_as_ops_take(setting: str) -> None:
    """On a CPU: numbers of the right shape, of codes, scales and norms that are finite."""
    given = gpu_cases.step(dict(setting=setting, length=1024, batch=1, group=2, dim=64), "cpu")
    out = ops.DECODE(**given._asdict())
    assert out.shape == (1, 16, 1, 64) and out.isfinite().all() and out.abs().max() > 0


@pytest.mark.parametrize("setting", ["2/2 bits", "xquant-2.2"])
def test_rows_are_checked_beside_plain_torch(setting: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a wrong length of one row would do is far more than what is allowed."""
    case = dict(setting=setting, length=512, batch=1, group=1, dim=32, pasts=(500, 0, 127), k_group=32)
    monkeypatch.setitem(ops.DECODE_KERNELS, "cpu", ops.DECODE_KERNELS["cpu"]._replace(why_not=lambda a: "slow"))
    assert gpu_kernels.row_error(case, "cpu") == 0
    attend = ops.decode_attention
    monkeypatch.setattr(ops, "DECODE", lambda past, **given: attend(past=past[[0, 0, 2]], **given))
    assert gpu_kernels.row_error(case, "cpu") > 10 * gpu_kernels.MOST_ERROR


def test_bytes_of_a_step() -> None:
    """2 bits of 128 channels of keys and values, scales and zero points in float16, a mask of a byte."""
    own, full = gpu_cases.bytes_read(dict(setting="2/2 bits", length=4096, batch=1, group=4))
    assert full == 4096 * 8 * 512
    assert own == pytest.approx(4096 * 8 * (64 + 8 + 1), rel=0.03)  # and what there is room for beyond max_len
    assert gpu_cases.copies(dict(setting="2/2 bits", length=4096, batch=1, group=4), least=10 * own) == 10
    less, _ = gpu_cases.bytes_read(dict(setting="2/2 bits", length=4096, max_len=8192, batch=1, group=4))
    assert less == pytest.approx(own, rel=0.01)


def test_the_script_is_a_script() -> None:
    """It parses, its jobs exist, and their limits leave some of 9 minutes for the last one, which has the rest."""
    text = (ROOT / "benchmarks" / "gpu.sh").read_text()
    subprocess.run(["bash", "-n", ROOT / "benchmarks" / "gpu.sh"], check=True)
    jobs = [line.split() for line in text.splitlines() if line.strip().startswith(("job ", "kernels "))]
    assert jobs[-1][2] == '"$rest"' and sum(int(words[2]) for words in jobs[:-1]) <= 500
    for words in jobs:
        if words[0] == "kernels":
            assert set(words[3:]) <= set(gpu_kernels.JOBS)


def test_full_precision_ways_agree() -> None:
    """Those that a CPU has."""
    torch.manual_seed(0)
    ways = gpu_cases.full_precision(dict(length=64, batch=1, group=4, dim=64), "cpu")
    grouped = ways["flash, grouped"]().float()
    torch.testing.assert_close(grouped, ways["matmul"]().float(), rtol=0.05, atol=0.02)
    torch.testing.assert_close(grouped.flatten(1, 2), ways["flash"]().flatten(1, 2).float(), rtol=0.05, atol=0.02)


def test_what_has_a_line_is_not_attempted_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a kernel broke the device for its process, another goes on behind it."""
    out, ran = tmp_path / "gpu.jsonl", []

    def body(fails: bool, length: int) -> dict[str, Any]:
        ran.append(length)
        if fails:
            raise RuntimeError("an illegal memory access")
        return {"us": 1.0}

    monkeypatch.setattr(gpu_kernels, "is_lost", lambda: True)
    first = gpu_kernels.Run(str(out), dry=False)
    first.attempt("step", lambda: body(False, 7), length=7, pasts=(1, 2))
    with pytest.raises(SystemExit) as left:
        first.attempt("done", lambda: first.attempt("step", lambda: body(True, 8), length=8), job="all")
    assert left.value.code == gpu_kernels.AGAIN
    second = gpu_kernels.Run(str(out), dry=False, resume=True)
    for length in (7, 8, 9):
        about = {"length": length, **({"pasts": (1, 2)} if length == 7 else {})}
        second.attempt("step", lambda length=length: body(False, length), **about)
    assert ran == [7, 8, 9]
    assert [("error" in line, line["length"]) for line in lines_of(out)] == [(False, 7), (True, 8), (False, 9)]
