"""What the Triton decode kernels will do on GPUs that are not here, predicted from their machine code.

    python benchmarks/sass_model.py                           # the main configurations, three chips
    python benchmarks/sass_model.py --only "2/2 bits" --chips H100
    python benchmarks/sass_model.py --other                   # if the kernel of whole groups were not there

The kernel of each configuration is compiled for the chip; its loop over codes is counted and run by the model of a
multiprocessor in ``sass_machine.py``. "times faster" is against full-precision flash decoding at 90 percent of the
memory's bandwidth, and no more than reading fewer bytes at that share allows. Written to benchmarks/results/ as JSON.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import Any
from unittest import mock

from results import where, write
from rich.console import Console
from rich.table import Table
from sass_code import code_loop, count, disassemble
from sass_machine import CHIPS, FLASH_SHARE, Chip, Multiprocessor, bounds
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from test_triton_compile import decode_arguments
from triton_compiled import compiled, launches

from xquant_fx.kernels.decode_attention import triton_launch
from xquant_fx.kernels.decode_attention.arguments import DecodeArguments

#: Of a config: the pair of schemes that is the default, and the paper's.
DEFAULT: dict[str, Any] = dict(ranked=True, residual=384, v_residual=128)
PAPER: dict[str, Any] = dict(ranked=False, residual=128)
#: Name to what ``decode_arguments`` takes; a mask of bool, bfloat16, head_dim 128, four query heads on a KV head.
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "2/2 bits": dict(PAPER, k_bits=2, v_bits=2),
    "2/1 bits": dict(PAPER, k_bits=2, v_bits=1),
    "2/2 bits, no mask": dict(PAPER, k_bits=2, v_bits=2, mask=None),
    "2/2 bits, q = 8": dict(PAPER, k_bits=2, v_bits=2, query=8),
    "2/2 bits, head_dim 64": dict(PAPER, k_bits=2, v_bits=2, dim=64),
    "4/4 bits": dict(PAPER, k_bits=4, v_bits=4),
    "xquant-2.2": dict(DEFAULT, k_bits=2, v_bits=2),
    "xquant-2.2, no mask": dict(DEFAULT, k_bits=2, v_bits=2, mask=None),
    "xquant-2.2, q = 8": dict(DEFAULT, k_bits=2, v_bits=2, query=8),
    "xquant-2.2, head_dim 64": dict(DEFAULT, k_bits=2, v_bits=2, dim=64),
    "xquant-1.7": dict(DEFAULT, k_bits=2, v_bits=1),
    "xquant-1.4": dict(DEFAULT, k_bits=1.5, v_bits=1),
    "xquant-2.7": dict(DEFAULT, k_bits=3, v_bits=2),
    "3/3 bits": dict(PAPER, k_bits=3, v_bits=3),
    "8/8 bits": dict(PAPER, k_bits=8, v_bits=8),
    "2/2 bits, head_dim 256": dict(PAPER, k_bits=2, v_bits=2, dim=256),
    "2/2 bits, groups of 64": dict(PAPER, k_bits=2, v_bits=2, k_group=64),
    "2/2 bits, groups of 32": dict(PAPER, k_bits=2, v_bits=2, k_group=32),
    "2/1 bits, q = 8": dict(PAPER, k_bits=2, v_bits=1, query=8),
    "3/3 bits, q = 8": dict(PAPER, k_bits=3, v_bits=3, query=8),
    "8/8 bits, q = 8": dict(PAPER, k_bits=8, v_bits=8, query=8),
    "2/2 bits, groups of 32, q = 8": dict(PAPER, k_bits=2, v_bits=2, k_group=32, query=8),
    "xquant-2.7, q = 8": dict(DEFAULT, k_bits=3, v_bits=2, query=8),
    "xquant-1.7, q = 8": dict(DEFAULT, k_bits=2, v_bits=1, query=8),
    "xquant-1.4, q = 8": dict(DEFAULT, k_bits=1.5, v_bits=1, query=8),
    "ranked 2/3 bits, q = 8": dict(DEFAULT, k_bits=2, v_bits=3, query=8),
    "ranked 2/3 bits": dict(DEFAULT, k_bits=2, v_bits=3),
    "ranked 3/3 bits": dict(DEFAULT, k_bits=3, v_bits=3),
    "xquant-2.2, head_dim 256": dict(DEFAULT, k_bits=2, v_bits=2, dim=256),
    "xquant-2.2, groups of 64": dict(DEFAULT, k_bits=2, v_bits=2, k_group=64),
}
OTHER = "it is left out".format  # in the place of ``why_no_interior``
TILES = 12
"""Tiles that the simulation runs."""


def bytes_a_token(a: DecodeArguments) -> tuple[float, float]:
    """Bytes of one token of one KV head: in codes with their scales and the mask, and in 16 bits."""
    names = [f"{side}_{name}" for side in "kv" for name in ("codes", "scale", "zero")]
    stored = [t for t in (getattr(a, name) for name in names) if t is not None]
    total = sum(t.numel() * t.element_size() for t in stored) / a.k_codes.shape[1] / a.k_codes.shape[3]
    total += a.k_norm is not None  # a byte, which all KV heads read
    mask = 0 if a.mask is None else a.mask.element_size() * math.prod(a.mask.shape[1:3])
    return total + mask, 2 * (a.k_ring.shape[3] + a.v_ring.shape[3])


def loop_of(case: dict[str, Any], architecture: str, other: bool = False) -> dict[str, Any]:
    """The loop over codes of a configuration, compiled, and what a program needs; "bytes" are of a tile.

    Of the kernel of whole groups, where that runs; with ``other`` of the one that reads everything else.
    """
    arguments = decode_arguments(**case)
    with mock.patch.object(triton_launch, "why_no_interior", OTHER if other else triton_launch.why_no_interior):
        kernel = launches(triton_launch.launch, arguments, hip=False)[0]
    needs = compiled(kernel, architecture)
    # The kernel of whole groups names its constants so, where it runs.
    inner = "INTERIOR_" if "TILE" not in kernel.arguments else ""
    blocks = kernel.arguments["INTERIOR_BLOCKS" if inner else "ROW_BLOCKS"]
    tile = kernel.arguments[f"{inner}TILE"]
    own, full = bytes_a_token(arguments)
    return {
        "body": code_loop(disassemble(needs.asm["cubin"])), "warps": kernel.options["num_warps"], "tile": tile,
        "rows": kernel.arguments[f"{inner}ROWS"], "row_blocks": blocks,
        "registers": needs.registers, "spilled": needs.spilled, "shared": needs.shared,
        "bytes": own * tile, "full_bytes": full * tile,
    }  # fmt: skip


def instructions_a_code(made: dict[str, Any], case: dict[str, Any]) -> float:
    """Instructions that a lane executes for each code of keys and values, all row blocks together."""
    codes = 2 * made["tile"] * case.get("dim", 128)
    return len(made["body"]) * made["warps"] * 32 * made["row_blocks"] / codes


def predicted(made: dict[str, Any], chip: Chip) -> dict[str, Any]:
    """Cycles of a tile, bounds and simulated, and how many times faster than full precision that is."""
    programs = max(chip.programs(made["registers"], made["shared"], made["warps"]), 1)
    # Programs of several row blocks read the same codes, all but the first from the level-2 cache.
    bytes_a_tile = made["bytes"] / made["row_blocks"]
    low = bounds(made["body"], chip, made["warps"], bytes_a_tile)
    machine = Multiprocessor(made["body"], chip, programs, made["warps"], bytes_a_tile)
    simulated = machine.cycles_a_tile(TILES) * made["row_blocks"]
    flash = made["full_bytes"] / chip.bytes_a_cycle / FLASH_SHARE
    return {
        "programs": programs,
        "cycles": {name: cycles * made["row_blocks"] for name, cycles in low.items()} | {"simulated": simulated},
        "times_faster": min(flash / simulated, made["full_bytes"] / made["bytes"]),
        "byte_ratio": made["full_bytes"] / made["bytes"],
    }


def measure(name: str, chips: list[str], other: bool) -> list[dict[str, Any]]:
    """A row for each chip."""
    case, rows = CONFIGURATIONS[name], []
    made = {a: loop_of(case, a, other) for a in {CHIPS[chip].architecture for chip in chips}}
    for chip in chips:
        one = made[CHIPS[chip].architecture]
        facts = {key: value for key, value in one.items() if key != "body"}
        counts = {"instructions": len(one["body"]), "kinds": dict(count(one["body"], "kind").most_common())}
        a_code = {"instructions_a_code": instructions_a_code(one, case)}
        rows.append({"name": name, "chip": chip, **facts, **counts, **a_code, **predicted(one, CHIPS[chip])})
    return rows


def table(rows: list[dict[str, Any]]) -> Table:
    """One line for each row."""
    import triton

    made = Table(title=f"Decode attention as Triton {triton.__version__} compiles it, cycles of a tile")
    cycles = ("memory", "issue", "ALU", "tensor", "simulated")
    columns = ("tile", "warps", "rows", "registers", "programs", "instructions", "a code", *cycles)
    for column in ("chip", "configuration"):
        made.add_column(column)
    for column in (*columns, "bytes allow", "times faster"):
        made.add_column(column, justify="right")
    for row in rows:
        facts = [str(row[key]) for key in ("tile", "warps")]
        rows_of = f"{row['rows']} x{row['row_blocks']}"
        spilled = f"{row['registers']}" + (f" +{row['spilled']} B" if row["spilled"] else "")
        counts = [rows_of, spilled, str(row["programs"]), str(row["instructions"]), f"{row['instructions_a_code']:.2f}"]
        times = [f"{row['cycles'][key]:.0f}" for key in cycles]
        made.add_row(
            row["chip"], row["name"], *facts, *counts, *times, f"{row['byte_ratio']:.2f}", f"{row['times_faster']:.2f}"
        )
    return made


def main() -> None:
    """Compile, model, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(CONFIGURATIONS), default=list(CONFIGURATIONS))
    parser.add_argument("--chips", nargs="+", choices=list(CHIPS), default=list(CHIPS))
    parser.add_argument("--other", action="store_true", help="the kernel that reads whole groups where none is faster")
    parser.add_argument("--name", default="sass-model", help="of the results file")
    parser.set_defaults(device="cpu")
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for name in tqdm(args.only, disable=None):
        rows += measure(name, args.chips, args.other)
        write(args.name, {"rows": rows, **where(args)})
    rows.sort(key=lambda row: args.chips.index(row["chip"]))
    Console(width=170).print(table(rows))
    print(f"written to benchmarks/results/{args.name}.json")


if __name__ == "__main__":
    main()
