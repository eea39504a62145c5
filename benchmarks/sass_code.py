"""Machine code (SASS) of compiled Triton kernels: instructions, what they wait for, loops, and which pipe takes them.

``cuobjdump`` comes with Triton, so no GPU is needed. The control bits of an instruction are those of Volta and later
chips: bits 105 and up of its 128 bits hold a stall count, the scoreboards that it sets, and those that it waits for.
"""

from __future__ import annotations

import dataclasses
import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path

CONTROL_BITS = 105 - 64
NO_BARRIER = 7

#: Kind of instruction to the beginnings of names, in the order in which they are tried.
KINDS = {
    "LDGSTS": r"LDGSTS",
    "LDG": r"LDG(?!DEPBAR)",
    "STG": r"STG|ATOM|RED\b",
    "LDS": r"LDS",
    "STS": r"STS",
    "HGMMA": r"HGMMA|QGMMA|IGMMA",
    "HMMA": r"HMMA|IMMA",
    "MUFU": r"MUFU",
    "SHFL": r"SHFL|MOVM",
    "barrier": r"BAR|WARPSYNC|DEPBAR|LDGDEPBAR|WARPGROUP|SYNCS|FENCE",
    "convert": r"I2F|F2F(?!P)|F2I|I2I",
    "F2FP": r"F2FP",
    "half": r"HFMA2|HADD2|HMUL2|HSET|HMNMX",
    "FFMA": r"FFMA|FMUL|FADD",
    "compare": r"FMNMX|FSEL|FSET|FCHK|ISETP|SEL|P2R|R2P",
    "logic": r"LOP3|PLOP3|SHF|PRMT|LOP",
    "IMAD": r"IMAD",
    "integer": r"IADD3|LEA|IABS|IMNMX|VIMNMX|VIADD",
    "move": r"MOV|CS2R",
    "branch": r"BRA|EXIT|BSSY|BSYNC|CALL|RET|NOP|YIELD|BREAK",
}
#: Kind to the pipe that executes it, as the profiler's guide for A100 and H100 names them.
PIPES = {
    **dict.fromkeys(("compare", "logic", "integer", "F2FP"), "alu"),
    "FFMA": "fma", "IMAD": "imad", "half": "half", "MUFU": "xu", "convert": "xu", "HMMA": "tensor", "HGMMA": "tensor",
    **dict.fromkeys(("LDGSTS", "LDG", "STG", "LDS", "STS", "SHFL"), "lsu"), "uniform": "uniform",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction; scoreboards are numbers from 0 to 5, ``NO_BARRIER`` where there is none."""

    address: int
    name: str
    text: str
    stall: int
    """Cycles until the warp's next instruction may be issued."""
    on_write: int
    """The scoreboard that is released when the result is there."""
    on_read: int
    """The one that is released when the operands have been read."""
    waits: int
    """Bit mask of the scoreboards that it waits for."""
    target: int | None
    """Where a branch goes."""

    @property
    def kind(self) -> str:
        """A key of ``KINDS``, or "uniform" or "other"."""
        base = self.name.split(".")[0]
        if re.match(r"(U[A-Z0-9]+|R2UR|S2UR|VOTEU)$", base):
            return "uniform"
        return next((kind for kind, names in KINDS.items() if re.match(names, base)), "other")

    @property
    def pipe(self) -> str:
        """The pipe that executes it, "other" where it hardly matters."""
        return "alu" if self.name == "MOV" else PIPES.get(self.kind, "other")

    @property
    def width(self) -> int:
        """Bytes that each lane of a load or store moves."""
        sizes = {".128": 16, ".64": 8, ".U16": 2, ".S16": 2, ".U8": 1, ".S8": 1}
        return next((n for suffix, n in sizes.items() if suffix in self.name), 4)


def tool(name: str) -> Path:
    """A program of the CUDA toolkit that Triton brings."""
    import triton

    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name


def disassemble(cubin: bytes) -> list[Instruction]:
    """All instructions of ``cubin``, in order."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(cubin)
        text = subprocess.run([tool("cuobjdump"), "-sass", file.name], capture_output=True, text=True, check=True)
    words = r"\s+/\* (0x[0-9a-f]{16}) \*/"
    found = re.findall(rf"/\*([0-9a-f]{{4,6}})\*/\s+(.*?);{words}\s*\n{words}", text.stdout)
    return [_instruction(int(at, 16), line.strip(), int(high, 16) >> CONTROL_BITS) for at, line, _, high in found]


def _instruction(address: int, text: str, control: int) -> Instruction:
    body = re.sub(r"^@!?U?P\w+\s+", "", text)
    # A branch of lanes that diverged (BRA.DIV) is never taken here.
    target = re.search(r"0x([0-9a-f]+)\s*$", body) if re.match(r"BRA(?!\.DIV)", body) else None
    return Instruction(
        address, body.split()[0], text, control & 15, control >> 5 & 7, control >> 8 & 7, control >> 11 & 63,
        int(target[1], 16) if target else None,
    )  # fmt: skip


def loops(code: list[Instruction]) -> list[list[Instruction]]:
    """Bodies of backward branches, by address; a branch to itself ends a kernel and is none."""
    place = {one.address: i for i, one in enumerate(code)}
    ends = [(i, one.target) for i, one in enumerate(code) if one.target is not None and one.target < one.address]
    return [code[place[target] : i + 1] for i, target in ends if target in place]


def usual_path(body: list[Instruction]) -> list[Instruction]:
    """``body`` without what its forward branches skip: what is seldom, such as a mask that hides something."""
    path: list[Instruction] = []
    resume = 0
    for one in body:
        if one.address >= resume:
            path.append(one)
            resume = one.target if one.target is not None and one.target > one.address else resume
    return path


def code_loop(code: list[Instruction]) -> list[Instruction]:
    """The first loop with matrix products, that over tiles of codes, as it usually goes."""
    return usual_path(next(body for body in loops(code) if any(one.kind in ("HMMA", "HGMMA") for one in body)))


def count(body: list[Instruction], what: str) -> Counter[str]:
    """How many instructions of each ``what``, "kind", "pipe" or "name"."""
    return Counter(getattr(one, what) for one in body)
