"""What vectors of 8 for values would cost on NVIDIA chips, by a count of what is compiled: no GPU needed.

    python benchmarks/code_paths_gpu.py

Two Triton loops over tiles of 128 tokens of values at head_dim 128, compiled for a chip: one unpacks words of 1-bit
codes as the product does, the other reads a byte per 8 channels and looks its 8 float16 numbers up. Printed per warp
and tile: instructions, and where a look-up goes. Below: bytes of all look-ups of a tile, and the cycles that they take
if a multiprocessor gets 64 bytes a cycle from the level-2 cache, in whole sectors of 32 bytes.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from triton_compiled import Launch, compiled

from xquant_fx.kernels.decode_attention.triton_unpack import unpack

TILE, DIM, ROWS, WARPS = 128, 128, 8, 4
#: ``VALUES`` of triton_unpack.py for 1-bit values that are rotated.
VALUES = (DIM, DIM, 1, 4, 4096, DIM, 4096, True, True, "bf16", 7)
CHIPS = ("sm_80", "sm_90")
SECTOR, BYTES_A_CYCLE = 32, 64


@triton.jit
def unpacked(codes, weights, out, tiles, VALUES: tl.constexpr, TILE: tl.constexpr, DIM: tl.constexpr,
             ROWS: tl.constexpr):  # fmt: skip
    """Sums of values from words of 1-bit codes."""
    d, r, t, w = tl.arange(0, DIM), tl.arange(0, ROWS), tl.arange(0, TILE), tl.arange(0, TILE // 32)
    total = tl.zeros((DIM, ROWS), tl.float32)
    for i in range(tiles):
        words = tl.load(codes + (i * (TILE // 32) + w)[None, :] * DIM + d[:, None])
        p = tl.load(weights + (i * TILE + t)[:, None] * ROWS + r[None, :])
        total = tl.dot(unpack(words, VALUES), p, total)
    tl.store(out + d[:, None] * ROWS + r[None, :], total)


@triton.jit
def looked_up(codes, weights, out, tiles, book, TILE: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr):
    """Sums of values from bytes and a book of 256 vectors."""
    d, r, t = tl.arange(0, DIM), tl.arange(0, ROWS), tl.arange(0, TILE)
    piece, j = tl.arange(0, DIM // 8), tl.arange(0, 8)
    total = tl.zeros((DIM, ROWS), tl.float32)
    for i in range(tiles):
        index = tl.load(codes + (i * TILE + t)[:, None] * (DIM // 8) + piece[None, :]).to(tl.int32)
        value = tl.reshape(tl.load(book + index[:, :, None] * 8 + j[None, None, :]), (TILE, DIM))
        p = tl.load(weights + (i * TILE + t)[:, None] * ROWS + r[None, :])
        total = tl.dot(tl.trans(value), p, total)
    tl.store(out + d[:, None] * ROWS + r[None, :], total)


def loop(cubin: bytes) -> Counter[str]:
    """Instructions of the longest loop, by name."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(cubin)
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        text = subprocess.run([tool, "-sass", file.name], capture_output=True, text=True, check=True).stdout
    code = [(int(place, 16), line.strip()) for place, line in re.findall(r"/\*([0-9a-f]{4,6})\*/\s+(.*?);", text)]
    longest: list[str] = []
    for i, (place, line) in enumerate(code):
        target = re.search(r"BRA.*0x([0-9a-f]+)\s*$", line)
        if target and int(target[1], 16) < place:
            body = [line for at, line in code[: i + 1] if at >= int(target[1], 16)]
            longest = max(longest, body, key=len)
    return Counter(re.sub(r"^@!?U?P\w+\s+", "", line).split()[0] for line in longest)


def counted(chip: str) -> dict[str, Counter[str]]:
    """Both loops."""

    def meta(dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(4096, dtype=dtype, device="meta")

    shared: dict[str, Any] = dict(
        weights=meta(torch.float16), out=meta(torch.float32), tiles=17, TILE=TILE, DIM=DIM, ROWS=ROWS
    )
    launches = {
        "words of 1-bit codes": Launch(unpacked, dict(shared, codes=meta(torch.int32), VALUES=VALUES), {}),
        "vectors of 8": Launch(looked_up, dict(shared, codes=meta(torch.uint8), book=meta(torch.float16)), {}),
    }
    for launch in launches.values():
        launch.options.update(num_warps=WARPS, num_stages=2)
    return {name: loop(compiled(launch, chip).asm["cubin"]) for name, launch in launches.items()}


def main() -> None:
    """Compile and print."""
    for chip in CHIPS:
        for name, ops in counted(chip).items():
            loads = {op: n for op, n in ops.items() if op.startswith(("LDG", "LDS", "STS"))}
            print(f"{chip}, {name}: {sum(ops.values())} instructions of a warp; {loads}")
    lookups = TILE * DIM // 8
    print(f"look-ups of a tile: {lookups:,}, {16 * lookups // 1024} KiB in {SECTOR * lookups // 1024} KiB of sectors")
    print(f"cycles of a multiprocessor for them: {SECTOR * lookups // BYTES_A_CYCLE}")


if __name__ == "__main__":
    main()
