"""Positions that cannot follow what is stored: at least one case per member of ``Fault``, for every kernel."""

from __future__ import annotations

from typing import NamedTuple

from xquant_fx.kernels.faults import Fault
from xquant_fx.kernels.layout import STEP_TOKENS

MAX_LEN = 60  # of store_reference.Case
STORED = 20


class Bad(NamedTuple):
    """A step at ``positions`` when ``stored`` tokens of 60 are there."""

    stored: int
    positions: list[int]
    fault: Fault


BAD = {
    "below zero": Bad(STORED, [-3], Fault.NOT_APPENDED),
    "a step from below zero": Bad(STORED, [-1, 0], Fault.NOT_APPENDED),
    "gap": Bad(STORED, [21], Fault.NOT_APPENDED),
    "gap in front of a chunk": Bad(STORED, list(range(30, 42)), Fault.NOT_APPENDED),
    "one past the end": Bad(53, [60], Fault.FULL),
    "far past the end": Bad(53, [200], Fault.FULL),
    "a step across the end": Bad(53, list(range(53, 61)), Fault.FULL),
    "a chunk across the end": Bad(53, list(range(53, 83)), Fault.FULL),
    "rolled back by 9": Bad(STORED, [STORED - 9], Fault.ROLLED_BACK_TOO_FAR),
    "rolled back to 1": Bad(STORED, list(range(1, 20)), Fault.ROLLED_BACK_TOO_FAR),
    "swapped": Bad(STORED, [20, 22, 21, 23], Fault.NOT_CONSECUTIVE),
    "repeated": Bad(STORED, [20, 20], Fault.NOT_CONSECUTIVE),
    "backwards": Bad(STORED, [20, 19], Fault.NOT_CONSECUTIVE),
    "hole": Bad(STORED, [20, 22], Fault.NOT_CONSECUTIVE),
    "a full cache starts anew": Bad(MAX_LEN, [0], Fault.RESTARTED),
    "a full cache starts anew, 2 tokens": Bad(MAX_LEN, [0, 1], Fault.RESTARTED),
    "a full cache starts anew, a chunk": Bad(MAX_LEN, list(range(12)), Fault.RESTARTED),
    "a cache that is not full starts anew": Bad(STORED, [0], Fault.RESTARTED),
    "a cache that is not full starts anew, 2 tokens": Bad(STEP_TOKENS + 1, [0, 1], Fault.RESTARTED),
}
#: Those that a kernel for single steps gets.
STEPS = {name: bad for name, bad in BAD.items() if len(bad.positions) <= STEP_TOKENS}
for _cases in (BAD, STEPS):
    assert {bad.fault for bad in _cases.values()} == set(Fault), "each rule has a case"
