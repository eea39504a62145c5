"""Loops that Inductor splits in C++ where an index is divided by a number, and loses the end of (torch 2.13).

Of 300 elements of which each reads what it finds at its number divided by 128, the loop becomes two of 128: nobody
computes the last 44, which are what the memory held. Masks read so: the blocks of a ``BlockMask``, chunks of attention.
Divisions are cheap beside what a step reads, so loops stay whole.

Private torch API: ``CppScheduling.try_loop_split``, an optimization that may leave nodes as they are. It is there
in torch 2.11, too.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def whole_loops() -> Iterator[None]:
    """Code that Inductor writes inside splits no loop by a division."""
    from torch._inductor.codegen.cpp import CppScheduling

    scheduling: Any = CppScheduling
    split = vars(CppScheduling).get("try_loop_split")
    if split is None:
        yield
        return
    scheduling.try_loop_split = lambda self, nodes: nodes
    try:
        yield
    finally:
        scheduling.try_loop_split = split
