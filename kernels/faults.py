"""Why the positions of a step cannot follow what is stored: the codes that every kernel leaves.

One list for all: plain torch (``quantize_store.plain_torch.fault_code``), the C++ and the Triton kernels, which get
the members as constants, and the errors that people read.
"""

from __future__ import annotations

import enum


class Fault(enum.IntEnum):
    """One member per rule; of several broken rules the one checked last is told."""

    NOT_APPENDED = 1
    FULL = 2
    ROLLED_BACK_TOO_FAR = 3
    NOT_CONSECUTIVE = 4
    FULL_RESTARTED = 5


FAULTS = {
    Fault.NOT_APPENDED: "tokens must be appended: the first position was past the number of tokens stored",
    Fault.FULL: "positions must be below max_cache_len: the cache is full",
    Fault.ROLLED_BACK_TOO_FAR: "more tokens were rolled back than rollback_tokens of the config (or all: position 0)",
    Fault.NOT_CONSECUTIVE: "the positions of one step must be consecutive",
    Fault.FULL_RESTARTED: "the cache is full: position 0 starts a sequence anew only after reset() "
    "(or is this a ring buffer?)",
}
