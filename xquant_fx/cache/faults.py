"""Positions that do not follow what is stored: found on the device, raised on the host.

A compiled step cannot raise by itself. It leaves a ``Fault`` in one int32 tensor per cache, which is read
right after the step on the CPU, and on an accelerator copied without waiting and read at the next
step or whenever the host waits anyway (``check(wait=True)``).
"""

from __future__ import annotations

import torch
from torch import Tensor

from xquant_fx.errors import CacheStateError
from xquant_fx.kernels.faults import FAULTS, Fault


class FaultMonitor:
    """Owns the fault tensor of one cache: one fault, or one for each of ``rows`` that have lengths of their own."""

    def __init__(self, device: torch.device, rows: int = 1) -> None:
        self.tensor = torch.zeros(rows, dtype=torch.int32, device=device)
        self._seen: Tensor | None = None
        self._event: torch.Event | None = None

    def check(self, wait: bool = False) -> None:
        """Raise CacheStateError if a step left a fault; without ``wait`` never waits for a device."""
        if self.tensor.device.type == "cpu" or wait:
            self._raise_if(self.tensor.tolist())
            return
        if self._seen is None or self._event is None:
            self._begin()
        elif not self._event.query():
            return
        else:
            self._raise_if(self._seen.tolist())
        assert self._seen is not None and self._event is not None
        self._seen.copy_(self.tensor, non_blocking=True)
        self._event.record(torch.accelerator.current_stream(self.tensor.device))  # where the copy is queued

    def _begin(self) -> None:
        """Make what the host sees: an ordinary tensor in its own memory, whatever the step runs under."""
        with torch.inference_mode(False):
            self._seen = torch.zeros(self.tensor.shape, dtype=torch.int32, device="cpu", pin_memory=True)
        self._event = torch.Event(self.tensor.device)

    def clear(self) -> None:
        """Forget a fault (the cache was reset)."""
        self.tensor.zero_()
        self._seen = self._event = None  # a copy of the fault may be on its way

    def _raise_if(self, codes: list[int]) -> None:
        for row, code in enumerate(codes):
            if not code:
                continue
            where = f"row {row}: " if len(codes) > 1 else ""
            raise CacheStateError(
                f"quantized KV cache: {where}{FAULTS[Fault(code)]}. Its contents are no longer right: "
                "reset() it, or append tokens at the position the cache is at"
            )

    def __deepcopy__(self, memo: dict[int, object]) -> FaultMonitor:
        new = FaultMonitor(self.tensor.device, self.tensor.shape[0])
        new.tensor.copy_(self.tensor)
        return new

    def __getstate__(self) -> dict[str, object]:
        return {"tensor": self.tensor, "_seen": None, "_event": None}
