"""Which bits of which ranks are where (``widths.py``), in Triton.

Widths fall with the rank, so that a few numbers tell all of them: ``COUNTS`` = (ranks of 1 bit or more, of 2 or more,
..., of 7 or more). A plane's ranks are then at most four runs, and no table has to be read.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def ranked_limit(past, RESIDUAL: tl.constexpr, GROUP: tl.constexpr):
    """Tokens whose keys are in codes when ``past`` are stored: ``quantized_limit`` of the scheme, 0 at least."""
    return tl.maximum(past - RESIDUAL + GROUP, 0) // GROUP * GROUP


@triton.jit
def width_of_rank(rank, COUNTS: tl.constexpr):
    """Bits of the codes of ``rank``."""
    width = rank * 0
    for b in tl.static_range(7):
        width += (rank < COUNTS[b]).to(tl.int32)
    return width


@triton.jit
def rank_of_field(place, WIDTH: tl.constexpr, COUNTS: tl.constexpr):
    """The rank that the field at ``place`` of the plane of WIDTH bits belongs to."""
    if WIDTH == 4:  # ranks of 4 to 7 bits
        return place
    elif WIDTH == 2:  # of 6 and 7, of 2 and 3
        return place + tl.where(place >= COUNTS[5], COUNTS[3] - COUNTS[5], 0)
    else:  # of 7, of 5, of 3, of 1
        five: tl.constexpr = COUNTS[6]
        three: tl.constexpr = five + COUNTS[4] - COUNTS[5]
        one: tl.constexpr = three + COUNTS[2] - COUNTS[3]
        rank = place + tl.where(place >= five, COUNTS[5] - COUNTS[6], 0)
        rank += tl.where(place >= three, COUNTS[3] - COUNTS[4], 0)
        return rank + tl.where(place >= one, COUNTS[1] - COUNTS[2], 0)


@triton.jit
def field_of_rank(rank, WIDTH: tl.constexpr, COUNTS: tl.constexpr):
    """The place of ``rank`` in the plane of WIDTH bits, if it is in it."""
    if WIDTH == 4:
        return rank
    elif WIDTH == 2:
        return rank - tl.where(rank >= COUNTS[3], COUNTS[3] - COUNTS[5], 0)
    else:
        place = rank - tl.where(rank >= COUNTS[5], COUNTS[5] - COUNTS[6], 0)
        place -= tl.where(rank >= COUNTS[3], COUNTS[3] - COUNTS[4], 0)
        return place - tl.where(rank >= COUNTS[1], COUNTS[1] - COUNTS[2], 0)
