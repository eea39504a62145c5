"""A small model of one multiprocessor: how many cycles a loop of machine code takes.

Four schedulers issue from warps that run in order; stall counts and scoreboards are those of the machine code.
Barriers, ``cp.async`` groups, ``wgmma`` groups and the memory's bandwidth are modelled, latencies and rates assumed.
Not in it: bank conflicts, the instruction cache, DRAM refresh, the tail of a grid. Take it for 25 percent either way.
"""

from __future__ import annotations

import dataclasses
import re
from collections import defaultdict

from sass_code import NO_BARRIER, Instruction, count

#: A full-precision decode attention is held to reach this share of the memory's bandwidth.
FLASH_SHARE = 0.9
SCHEDULERS = 4
SHARED_OF_PROGRAM = 1024
"""Bytes of shared memory that the system takes of each program's."""


@dataclasses.dataclass(frozen=True)
class Chip:
    """One GPU; rates are cycles that an instruction holds its pipe, latencies cycles until a result is there."""

    architecture: str
    multiprocessors: int
    hertz: float
    bytes_a_second: float
    memory_latency: int
    shared: int
    rates: dict[str, float]
    registers: int = 65536
    warps: int = 64

    @property
    def bytes_a_cycle(self) -> float:
        """Of memory, for one multiprocessor."""
        return self.bytes_a_second / self.multiprocessors / self.hertz

    def programs(self, registers: int, shared: int, warps: int) -> int:
        """How many programs a multiprocessor holds, of ``registers`` a thread and ``shared`` bytes each."""
        per_warp = -(-registers * 32 // 256) * 256
        by_registers = self.registers // (per_warp * warps)
        return min(by_registers, self.shared // (shared + SHARED_OF_PROGRAM), self.warps // warps, 32)


# HMMA on Hopper is assumed at 62 percent of the chip's rate, HGMMA at 10 cycles for 64 x 8 x 16.
_HOPPER = {"alu": 2, "fma": 1, "imad": 2, "half": 1, "xu": 8, "uniform": 2, "other": 1, "HMMA": 6.5, "HGMMA": 10}
_AMPERE = {**_HOPPER, "fma": 2, "HMMA": 8}
CHIPS = {
    "H100": Chip("sm_90", 132, 1.75e9, 3.35e12, 650, 228 * 1024, _HOPPER),
    "H200": Chip("sm_90", 132, 1.75e9, 4.3e12, 650, 228 * 1024, _HOPPER),  # 4.3e12: what a copy reaches
    "A100": Chip("sm_80", 108, 1.41e9, 2.0e12, 560, 164 * 1024, _AMPERE),
}
LATENCY = {"LDS": 29, "SHFL": 25, "STS": 10, "xu": 22, "HMMA": 33, "HGMMA": 18, "barrier": 20, "LDGSTS": 20}
READ_LATENCY, LEAST_LATENCY, QUEUE = 12, 5, 8


@dataclasses.dataclass
class Warp:
    """Where a warp is, and what it waits for."""

    program: int
    scheduler: int
    next_issue: float
    place: int = 0
    tile: int = 0
    at_barrier: bool = False
    copies: float = 0.0
    """When the copies of the open ``cp.async`` group arrive."""
    groups: list[float] = dataclasses.field(default_factory=list)
    matrix: float = 0.0
    """When the last wgmma is done."""
    boards: list[float] = dataclasses.field(default_factory=lambda: [0.0] * 6)


def lane_cycles(one: Instruction) -> float:
    """Cycles of the load and store unit, which all schedulers share."""
    if one.kind in ("LDS", "STS") and "M88.4" in one.name:
        return 4
    return 1 if one.kind == "SHFL" else max(1, one.width // 4)


class Multiprocessor:
    """Runs ``body`` again and again in every warp of ``programs`` programs of ``warps`` warps."""

    def __init__(self, body: list[Instruction], chip: Chip, programs: int, warps: int, bytes_a_tile: float) -> None:
        self.body, self.chip, self.warps_of = body, chip, warps
        self.kinds, self.pipes = [one.kind for one in body], [one.pipe for one in body]
        loads = [one.width if one.kind in ("LDGSTS", "LDG") else 0 for one in body]
        self.bytes = [n / (sum(loads) or 1) * bytes_a_tile / warps for n in loads]
        self.groups = [_groups_left(one) for one in body]
        self.free: list[dict[str, float]] = [defaultdict(float) for _ in range(SCHEDULERS)]
        self.lsu = self.memory = 0.0
        self.waiting: dict[int, list[Warp]] = defaultdict(list)
        # Programs start at different times, as on a device that is busy.
        self.warps = [Warp(w // warps, w % SCHEDULERS, w // warps * 137 % 400) for w in range(programs * warps)]

    def pipe_of(self, i: int) -> str:
        """The pipe that instruction ``i`` has to find free."""
        pipe, hopper = self.pipes[i], self.chip.architecture == "sm_90"
        return {"tensor": self.kinds[i], "imad": "imad" if hopper else "fma", "half": "fma" if hopper else "half"}.get(
            pipe, pipe
        )

    def ready(self, warp: Warp, cycle: int) -> bool:
        """Whether a warp can issue its next instruction."""
        if warp.at_barrier or warp.next_issue > cycle:
            return False
        one = self.body[warp.place]
        if one.waits and any(one.waits >> b & 1 and warp.boards[b] > cycle for b in range(6)):
            return False
        if (left := self.groups[warp.place]) is not None and sum(at > cycle for at in warp.groups) > left:
            return False
        if one.name.startswith("WARPGROUP.DEPBAR") and warp.matrix > cycle:
            return False
        pipe = self.pipe_of(warp.place)
        if pipe == "lsu":
            return self.lsu <= cycle + QUEUE
        slack = 2 * self.chip.rates["HGMMA"] if pipe == "HGMMA" else 0
        return self.free[warp.scheduler][pipe] <= cycle + slack

    def executed(self, warp: Warp, cycle: int) -> float:
        """Hold the pipe of the warp's next instruction; when its result is there."""
        i = warp.place
        kind, pipe = self.kinds[i], self.pipe_of(i)
        if pipe == "lsu":
            return self.moved(warp, cycle)
        rate = self.chip.rates.get(self.pipes[i] if self.pipes[i] != "tensor" else kind, 1)
        free = self.free[warp.scheduler]
        free[pipe] = max(free[pipe], cycle) + rate
        if kind == "HGMMA":
            warp.matrix = free[pipe] + LATENCY["HGMMA"]
            return warp.matrix
        if self.body[i].name.startswith("LDGDEPBAR"):
            warp.groups = [*warp.groups, max(warp.copies, cycle + 1)][-8:]
            warp.copies = 0.0
        return cycle + LATENCY.get(kind, LATENCY["xu"] if pipe == "xu" else LEAST_LATENCY)

    def moved(self, warp: Warp, cycle: int) -> float:
        """The same of a load or store."""
        i = warp.place
        kind = self.kinds[i]
        self.lsu = max(self.lsu, cycle) + lane_cycles(self.body[i])
        if kind not in ("LDGSTS", "LDG"):
            return self.lsu + LATENCY.get(kind, LATENCY["STS"])
        self.memory = max(self.memory, cycle) + self.bytes[i] / self.chip.bytes_a_cycle
        arrived = max(cycle + self.chip.memory_latency, self.memory)
        if kind == "LDG":
            return arrived
        warp.copies = max(warp.copies, arrived)
        return cycle + LATENCY["LDGSTS"]

    def issue(self, warp: Warp, cycle: int) -> bool:
        """Issue the next instruction of ``warp``; whether that was the last one of a tile."""
        one = self.body[warp.place]
        done = self.executed(warp, cycle)
        if one.on_write != NO_BARRIER:
            warp.boards[one.on_write] = max(warp.boards[one.on_write], done)
        if one.on_read != NO_BARRIER:
            warp.boards[one.on_read] = max(warp.boards[one.on_read], min(done, cycle + READ_LATENCY))
        warp.next_issue = cycle + max(1, one.stall)
        if one.name.startswith("BAR.SYNC") and self.warps_of > 1:
            self.arrive(warp, cycle)
        warp.place = (warp.place + 1) % len(self.body)
        warp.tile += warp.place == 0
        return warp.place == 0

    def arrive(self, warp: Warp, cycle: int) -> None:
        """Let ``warp`` wait for the others of its program."""
        group = self.waiting[warp.program]
        group.append(warp)
        warp.at_barrier = True
        if len(group) == self.warps_of:
            for other in group:
                other.at_barrier, other.next_issue = False, max(other.next_issue, cycle + LATENCY["barrier"])
            group.clear()

    def cycles_a_tile(self, tiles: int) -> float:
        """Cycles of a tile of one program, in the steady state, while each program does ``tiles``."""
        of = [[w for w in self.warps if w.scheduler == s] for s in range(SCHEDULERS)]
        current = [0] * SCHEDULERS
        ends: list[int] = []
        cycle = 0
        while max(warp.tile for warp in self.warps) < tiles:
            for s, mine in enumerate(of):
                for step in range(len(mine)):
                    k = (current[s] + step) % len(mine)  # greedy: stay with a warp while it is ready
                    if self.ready(mine[k], cycle):
                        current[s] = k
                        if self.issue(mine[k], cycle):
                            ends.append(cycle)
                        break
            cycle += 1
        begin = 0.3 * cycle
        return (cycle - begin) * self.warps_of / max(sum(end > begin for end in ends), 1)


def _groups_left(one: Instruction) -> int | None:
    """How many ``cp.async`` groups may be on their way when ``one`` goes on; None if it does not wait for any."""
    found = re.search(r"SB0, 0x([0-9a-f]+)", one.text) if one.name.startswith("DEPBAR") else None
    return int(found[1], 16) if found else None


def bounds(body: list[Instruction], chip: Chip, warps: int, bytes_a_tile: float) -> dict[str, float]:
    """Cycles that a tile takes at least, by what could hold it up."""
    pipes, kinds, share = count(body, "pipe"), count(body, "kind"), warps / SCHEDULERS
    products = sum(kinds[kind] * chip.rates[kind] for kind in ("HMMA", "HGMMA"))
    return {
        "memory": bytes_a_tile / chip.bytes_a_cycle,
        "issue": len(body) * share,
        "ALU": pipes["alu"] * chip.rates["alu"] * share,
        "tensor": products * share,
    }
