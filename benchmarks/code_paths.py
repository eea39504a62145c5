"""What reading other codes would cost on a CPU, beside what the product reads: the loops alone, one thread.

    python benchmarks/code_paths.py
    python benchmarks/code_paths.py --isa avx2

One KV head of ``xquant-1.7`` at head_dim 128 with 4 query heads, 32,768 tokens. *Values*: vectors of 8 at 1 bit per
element, by a table in memory and, where a processor has AVX-512 VBMI, by tables in registers; a trellis of 256 states
at 1 and 2 bits. *Keys*: dequantized and turned by RoPE as they are read. The other ways are in code_paths.h; the
product's are its own headers. All are compared with numpy first, then timed in turn; ratios of minima. Written to
benchmarks/results/ as JSON.
"""

from __future__ import annotations

import argparse
import ctypes
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from results import ROOT, where, write
from rich.console import Console
from rich.table import Table
from trial_codes import gaussian_codebook

from xquant_fx.kernels.cpu.isa import ISAS
from xquant_fx.kernels.decode_attention.cpu_source import Problem, source
from xquant_fx.kernels.packing import pack_words

DIM, ROWS, GROUP, SPAN = 128, 4, 128, 1024
#: Name to the headers' instruction set and the compiler's flags.
MACHINES = {
    "avx512": ("avx512", "-mavx512f -mavx512dq -mavx512vl -mavx512bw -mavx512vnni -mavx512vbmi -mfma -mf16c"),
    "avx2": ("avx2", "-mavx2 -mfma -mf16c"),
    "avx2, VNNI": ("avx2", "-mavx2 -mfma -mf16c -mavx512vl -mavx512vnni"),
}
FLAGS = (
    "-O3 -std=c++17 -ffast-math -fno-finite-math-only -fno-unsafe-math-optimizations -ffp-contract=off -shared -fPIC"
)
#: Name to (function of code_paths.h, way).
WAYS = {
    "values: product, 1 bit": ("values", 0), "values: vectors of 8, table in memory": ("values", 1),
    "values: vectors of 8, tables in registers": ("values", 2), "values: trellis, 1 bit": ("values", 3),
    "values: trellis, 2 bits": ("values", 4), "keys: product, 2 bits": ("keys", 0),
    "keys: turned as they are read": ("keys", 1), "decode: product": ("decode", 0),
    "decode: vectors of 8, table in memory": ("decode", 1), "decode: vectors of 8, tables in registers": ("decode", 2),
    "decode: trellis, 1 bit": ("decode", 3), "decode: keys turned as they are read": ("decode", 8),
}  # fmt: skip


def problem() -> Problem:
    """``xquant-1.7`` at head_dim 128: what the product's loops are compiled for.

    In float16, where weights have two digits: all other loops have.
    """
    return Problem(
        dtype=torch.float16, scale_dtype=torch.uint8, heads=8, query_heads=8 * ROWS, queries=1, k_dim=DIM,
        v_dim=DIM, long_spans=True, k_scheme="per_channel_ranked", k_bits=2, k_group=GROUP,
        k_residual=384, k_ring=404, v_scheme="per_token_rotated", v_bits=1, v_group=DIM,
        v_residual=128, v_ring=148, sinks=4, scale=1.0, softcap=0.0, window=0, mask_dtype=None,
        mask_heads=False, mask_queries=False, sink_logits_dtype=None, k_norms=False, chunk=False, by_row=False,
    )  # fmt: skip


def compiled(machine: str, folder: str) -> ctypes.CDLL:
    """The function ``run`` of code_paths.h behind the product's own source."""
    isa, flags = MACHINES[machine]
    _, product = source(problem(), ISAS[isa])
    file = Path(folder) / f"{isa}.cpp"
    file.write_text(product + (ROOT / "benchmarks" / "code_paths.h").read_text())
    library = file.with_suffix(f".{len(flags)}.so")
    subprocess.run(["g++", *FLAGS.split(), *flags.split(), str(file), "-o", str(library)], check=True)
    return ctypes.CDLL(str(library))


def inputs(tokens: int, bias: int) -> dict[str, np.ndarray]:
    """Random codes in every layout; ``bias`` is what stands for zero in the book's bytes."""
    rng = np.random.default_rng(0)
    byte = (gaussian_codebook().numpy() / 4 * (bias - 1)).round().clip(1 - bias, bias - 1).astype(int) + bias
    entry = np.zeros((256, 64), np.uint8)
    entry[:, 4:36:4] = byte
    bits = rng.integers(0, 2, (tokens, DIM))
    angle = np.arange(tokens) * 10000.0 ** (-np.arange(DIM // 2)[:, None] / (DIM // 2))
    return {
        "bits": bits, "codes": pack_words(torch.from_numpy(bits), 1, 0).numpy(),
        "scales": rng.integers(0x60, 0x70, tokens, np.uint8),
        "bytes": rng.integers(0, 256, (DIM // 8, tokens), np.uint8),
        "planes": rng.integers(0, 2**63, (2 * DIM, tokens // 64), np.uint64),
        "book": np.concatenate([byte.T.astype(np.uint8).ravel(), entry.ravel()]), "byte": byte,
        "weights": rng.random((ROWS, SPAN), np.float32) ** 4,
        "k_codes": rng.integers(-(2**31), 2**31, (DIM // 16, tokens), np.int32),
        "k_scale": rng.integers(0x60, 0x70, (tokens // GROUP, DIM), np.uint8),
        "k_zero": rng.integers(0, 0x60, (tokens // GROUP, DIM), np.uint8),
        "cos": np.cos(angle).astype(np.float32), "sin": np.sin(angle).astype(np.float32),
        "order": rng.permutation(DIM).astype(np.int32),
    }  # fmt: skip


#: Members of ``Data`` in code_paths.h.
POINTERS = (
    "codes", "scales", "bytes", "planes", "book", "weights", "k_codes", "k_scale", "k_zero", "cos", "sin", "order",
)  # fmt: skip
Run = Callable[[str], np.ndarray | None]


def caller(library: ctypes.CDLL, data: dict[str, np.ndarray], tokens: int) -> Run:
    """A function that runs one of ``WAYS``: its output; None where this machine has none."""
    book = np.zeros(len(data["book"]) + 64, np.uint8)
    begin = -book.ctypes.data % 64  # of a cache line
    book = book[begin : begin + len(data["book"])]
    book[:] = data["book"]
    given = {**data, "book": book}
    pointers = (ctypes.c_void_p * len(POINTERS))(*(given[name].ctypes.data for name in POINTERS))
    out = np.zeros((ROWS, DIM), np.float32)
    target, count = ctypes.c_void_p(out.ctypes.data), ctypes.c_int64(tokens)

    def run(name: str) -> np.ndarray | None:
        function, way = WAYS[name]
        failed = getattr(library, function)(way, pointers, target, count)
        return None if failed else out

    run.keep = given  # type: ignore[attr-defined]  # what the pointers point to
    return run


def small_scales(code: np.ndarray) -> np.ndarray:
    """What 8-bit scales stand for (kernels/small_floats.py)."""
    return (code.astype(np.uint16) << 7).view(np.float16).astype(np.float64) / 32


def expected(way: int, data: dict[str, np.ndarray], bias: int) -> np.ndarray:
    """What a way of reading values gives: [ROWS, DIM]."""
    if way == 0:
        value = data["bits"] - 0.5
    elif way in (1, 2):
        value = data["byte"][data["bytes"]].transpose(1, 0, 2).reshape(-1, DIM) - bias
    else:
        k = way - 2
        bits = np.unpackbits(data["planes"][: k * DIM].view(np.uint8), axis=1, bitorder="little").astype(int)
        ring = np.concatenate([bits[-8:], bits])
        state = [sum(ring[8 + k * d + k - 1 - j] << j for j in range(8)) for d in range(DIM)]
        value = data["byte"][:, 0][np.stack(state, 1)] - bias
    weights = np.tile(data["weights"], (1, len(value) // SPAN))
    return (weights * small_scales(data["scales"])) @ value


def expected_scores(data: dict[str, np.ndarray]) -> np.ndarray:
    """Sums over every 64th token of the scores of turned keys: [ROWS]."""
    shift = np.array([8 * (i % 4) + 2 * (i // 4) for i in range(16)])
    code = (data["k_codes"][:, None] >> shift[:, None] & 3).reshape(DIM, -1).T[::64]
    group = np.arange(0, data["k_codes"].shape[1], 64) // GROUP
    mid = (data["k_zero"].astype(np.uint16) << 7).view(np.float16).astype(np.float64) * 256
    ranked = small_scales(data["k_scale"])[group] * (code - 1.5 + mid[group])
    key = np.zeros_like(ranked)
    key[:, data["order"]] = ranked
    a, b = key[:, : DIM // 2], key[:, DIM // 2 :]
    c, s = data["cos"].T[::64], data["sin"].T[::64]
    return data["weights"][:, :DIM] @ np.concatenate([a * c - b * s, b * c + a * s], 1).sum(0)


def check(run: Run, data: dict[str, np.ndarray], bias: int) -> list[str]:
    """The ways that this machine has; values and turned keys compared with numpy (the product has tests)."""
    there = []
    for name, (function, way) in WAYS.items():
        found = run(name)
        if found is None:
            continue
        there.append(name)
        if function == "decode" or (function, way) == ("keys", 0):
            continue
        wanted = expected_scores(data) if function == "keys" else expected(way, data, bias)
        off = np.abs(found.ravel()[: wanted.size].reshape(wanted.shape) - wanted).max() / np.abs(wanted).max()
        if not off < 1e-3:
            raise SystemExit(f"{name}: off by {off:.2e} of the largest")
    return there


def measure(machine: str, args: argparse.Namespace) -> dict[str, Any]:
    """Microseconds of each way, and how many times the product's that is."""
    bias = 32 if machine == "avx2" else 128
    data = inputs(args.tokens, bias)
    times: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        run = caller(compiled(machine, folder), data, args.tokens)
        there = check(run, data, bias)
        for _ in range(args.rounds):
            for name in there:
                begin = time.perf_counter()
                run(name)
                times.setdefault(name, []).append(time.perf_counter() - begin)
    product = {name.split(":")[0]: name for name in there if "product" in name}
    rows = {}
    for name in there:
        base = times[product[name.split(":")[0]]]
        rows[name] = {"us": 1e6 * min(times[name]), "times": min(times[name]) / min(base)}
    return rows


def main() -> None:
    """Run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--isa", nargs="+", choices=MACHINES, default=list(MACHINES))
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--rounds", type=int, default=200)
    args = parser.parse_args()
    torch.set_num_threads(1)
    result = {machine: measure(machine, args) for machine in args.isa}
    made = Table(title=f"one KV head, {ROWS} query heads, head_dim {DIM}, {args.tokens:,} tokens, one thread")
    for column in ("", "microseconds", "times the product's"):
        made.add_column(column, justify="left" if not column else "right")
    for machine, rows in result.items():
        made.add_row(machine)
        for name, row in rows.items():
            made.add_row(f"  {name}", f"{row['us']:.0f}", f"{row['times']:.2f}")
    Console(width=120).print(made)
    args.device = "cpu"
    write("code-paths-cpu", {"rows": result, **where(args)})
    print("written to benchmarks/results/code-paths-cpu.json")


if __name__ == "__main__":
    main()
