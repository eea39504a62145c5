"""How many programs of a Triton kernel a GPU runs at a time, and into how many splits its work is cut for that.

What a compiled kernel takes is known only after its constants are chosen, of which the splits are one; so a launcher
estimates registers and shared memory of its kernels from above, and tests hold the estimates to compiled kernels.
Triton is not imported.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

#: Registers of a thread, at most: those that two kernels of many tiles in registers have.
MOST_REGISTERS = 256
#: Bytes of shared memory that the system takes of each program's.
SYSTEM_SHARED = 1024
#: A split more costs a part that is written and read again: no more splits than bring a device this near to its best.
ENOUGH = 0.95


class Device(NamedTuple):
    """What limits how many programs run at a time; but for the first field of one multiprocessor."""

    multiprocessors: int
    registers: int = 65536
    shared: int = 228 * 1024
    """Bytes."""
    threads: int = 2048
    warp: int = 32
    """Threads of a warp."""

    def programs(self, *, warps: int, shared: int) -> int:
        """How many programs run at a time, of ``warps`` warps with MOST_REGISTERS and ``shared`` bytes each."""
        threads = warps * self.warp
        by_registers = self.registers // (MOST_REGISTERS * threads)
        of_one = min(by_registers, self.shared // (shared + SYSTEM_SHARED), self.threads // threads)
        return self.multiprocessors * max(of_one, 1)


#: An H100, which stands for devices that have no multiprocessors: those of meta tensors, and the interpreter's.
LARGE = Device(132)


def device_of(device: torch.device) -> Device:
    """The GPU that ``device`` is; LARGE where it is none. Nothing is read from it: fake tensors will do."""
    if device.type != "cuda":
        return LARGE
    found = torch.cuda.get_device_properties(device)
    return Device(
        found.multi_processor_count, getattr(found, "regs_per_multiprocessor", LARGE.registers),
        getattr(found, "shared_memory_per_multiprocessor", LARGE.shared), found.max_threads_per_multi_processor,
        found.warp_size,
    )  # fmt: skip


def splits_for(slots: int, programs: int, most: int) -> int:
    """Into how many splits, of equal work, each of ``programs`` programs is cut where ``slots`` run at a time.

    The least number, up to ``most``, by which the last round of programs is almost as full as by any other.
    """
    numbers = range(1, max(most, 1) + 1)
    full = {n: n * programs / slots / math.ceil(n * programs / slots) for n in numbers}
    return next(n for n in numbers if full[n] >= ENOUGH * max(full.values()))
