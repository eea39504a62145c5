"""Why the positions of a step cannot follow what is stored: the codes that every kernel leaves.

One list for all: plain torch (``quantize_store.plain_torch.fault_code``), the C++ and the Triton kernels, which get
the members as constants, and the errors that people read.
"""

from __future__ import annotations

import enum
from typing import Any

from xquant_fx.kernels.layout import STEP_TOKENS


class Fault(enum.IntEnum):
    """One member per rule; of several broken rules the one checked last is told."""

    NOT_APPENDED = 1
    FULL = 2
    ROLLED_BACK_TOO_FAR = 3
    NOT_CONSECUTIVE = 4
    RESTARTED = 5


FAULTS = {
    Fault.NOT_APPENDED: "tokens must be appended: the first position was past the number of tokens stored",
    Fault.FULL: "positions must be below max_cache_len: the cache is full",
    Fault.ROLLED_BACK_TOO_FAR: f"at most {STEP_TOKENS} tokens can be rolled back (or all: position 0); more were",
    Fault.NOT_CONSECUTIVE: "the positions of one step must be consecutive",
    Fault.RESTARTED: "position 0 starts a sequence anew only after reset(), or zero_() on all buffers; without, "
    f"a prompt of more than {STEP_TOKENS} tokens may where the cache is not full (or is this a rotating buffer?)",
}


def may_wrap(length: Any, new: Any, max_len: int) -> Any:
    """Whether ``new`` tokens at position 0 may be those of a rotating buffer, which goes on seeing the old ones.

    A prompt may start over where the cache is not full, or fill it; a step only where it could be rolled back to 0.
    ``length`` is the number of tokens stored: an int, or a tensor of ints.
    """
    is_full = length == max_len
    if isinstance(new, int) and new <= STEP_TOKENS:
        return is_full | (length > STEP_TOKENS)
    return is_full & (new < max_len)
