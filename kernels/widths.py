"""Mixed widths of key channels: more bits for the channels that move the logits most.

Channels are ranked once per sequence, layer and KV head (``schemes/per_channel_ranked.py``); here is how many bits
each *rank* gets, which depends on head_dim and the average width alone, so that kernels can be compiled for it. A
code of b bits is stored as planes whose widths are the binary digits of b (5 = 4 + 1, 3 = 2 + 1), each packed as
``packing.py`` does it: all fields of 4 bits, then all of 2, then all of 1. A token takes whole int32 words, and the
widths are chosen so that no bit of them is wasted: what minimizes

    sum over ranks r of importance(r) * D(bits of r)          D(b): error of b bits on a unit Gaussian

where importance falls by IMPORTANCE_RANGE from the first rank to the last, fast at first: by the square root of the
rank, as the mean over the heads of real models does (docs/quality.md). Four ranks at a time, a QUAD, get the same
width: so their fields lie in the four bytes of a word in every plane, and a kernel puts their codes together with a
shift per plane and multiplies them once. It costs less than a hundredth of the error.
"""

from __future__ import annotations

import functools
import itertools
import math
from typing import NamedTuple

from xquant_fx.kernels.packing import FIELD_WIDTHS, WORD_BITS, codes_per_word

#: Widths of planes, widest first.
PLANE_WIDTHS = FIELD_WIDTHS[1:]
#: Mean squared error of a uniform quantizer of 0, 1, 2 ... 7 bits on a unit Gaussian.
DISTORTION = (1.0, 0.3634, 0.1188, 0.03744, 0.01154, 0.00349, 0.00104, 0.0003)
#: How many times more the first channel matters than the last, typically.
IMPORTANCE_RANGE = 250.0
#: Fields of a token per channel, at most: they are what the time of a kernel goes by that multiplies each field.
MOST_FIELDS = 1.125
#: Ranks with the same bits.
QUAD = 4


class Plane(NamedTuple):
    """One field of the codes of some ranks: ``width`` bits of each, ``shift`` bits from the lowest."""

    width: int
    ranks: tuple[int, ...]
    shifts: tuple[int, ...]

    @property
    def words(self) -> int:
        """int32 words of a token."""
        return -(-len(self.ranks) * self.width // WORD_BITS)


def words_of(bits: float, dim: int) -> int:
    """int32 words of a token of ``dim`` channels at ``bits`` bits on average: at least one."""
    return max(1, round(bits * dim / WORD_BITS))


@functools.cache
def rank_widths(bits: float, dim: int) -> tuple[int, ...]:
    """Bits of each rank, 0 to 7, falling; together they fill ``words_of(bits, dim)`` words."""
    words = words_of(bits, dim)
    splits = [s for s in itertools.product(range(words + 1), repeat=len(PLANE_WIDTHS)) if sum(s) == words]
    affordable = [s for s in splits if _fields(s) <= MOST_FIELDS * dim]
    return min((_widths(split, dim) for split in affordable or splits), key=_error)


def _fields(split: tuple[int, ...]) -> int:
    return sum(words * codes_per_word(width) for width, words in zip(PLANE_WIDTHS, split, strict=True))


def _widths(split: tuple[int, ...], dim: int) -> tuple[int, ...]:
    """The best widths with ``split`` words of each plane width: each quad's fields in turn to whom they help most."""
    importance = [sum(_importance(dim)[r : r + QUAD]) for r in range(0, dim, QUAD)]
    widths = [0] * len(importance)
    for width, words in zip(PLANE_WIDTHS, split, strict=True):
        gains = [i * (DISTORTION[b] - DISTORTION[b + width]) for i, b in zip(importance, widths, strict=True)]
        best = sorted(range(len(gains)), key=lambda quad: -gains[quad])[: words * codes_per_word(width) // QUAD]
        for quad in best:
            widths[quad] += width
    return tuple(width for width in sorted(widths, reverse=True) for _ in range(QUAD))[:dim]


def _importance(dim: int) -> list[float]:
    return [float(IMPORTANCE_RANGE ** -math.sqrt(rank / max(dim - 1, 1))) for rank in range(dim)]


def _error(widths: tuple[int, ...]) -> float:
    return sum(i * DISTORTION[b] for i, b in zip(_importance(len(widths)), widths, strict=True))


@functools.cache
def planes(bits: float, dim: int) -> tuple[Plane, ...]:
    """How the codes of all ranks are stored: the planes that are there, widest first."""
    widths = rank_widths(bits, dim)
    found = []
    for width in PLANE_WIDTHS:
        ranks = tuple(r for r, b in enumerate(widths) if b & width)
        # What lies below this field in the code: the narrower fields.
        shifts = tuple(widths[r] & (width - 1) for r in ranks)
        if ranks:
            found.append(Plane(width, ranks, shifts))
    return tuple(found)


class Piece(NamedTuple):
    """The fields of one plane in the codes of a quad: ``word >> shift & mask`` (``<<`` where negative)."""

    word: int
    shift: int
    mask: int
    """Of all four bytes."""


def quads_of(stored: tuple[Plane, ...]) -> list[tuple[Piece, ...]]:
    """The pieces of each quad that has bits, in order of rank; they add up to its four codes, a byte each."""
    quads: dict[int, list[Piece]] = {}
    begin = 0
    for plane in stored:
        per = codes_per_word(plane.width)
        for place in range(0, len(plane.ranks), QUAD):
            low = plane.shifts[place]
            bit = plane.width * (place % per // QUAD)
            mask = 0x01010101 * ((1 << plane.width) - 1 << low)
            quads.setdefault(plane.ranks[place], []).append(Piece(begin + place // per, bit - low, mask))
        begin += plane.words
    return [tuple(quads[rank]) for rank in sorted(quads)]


class Plain(NamedTuple):
    """Neighbouring words of one plane whose fields are whole codes, of neighbouring quads."""

    width: int
    word: int
    words: int
    rank: int


def plain_words(stored: tuple[Plane, ...]) -> list[Plain]:
    """The words of a token that a kernel need not put together with others."""
    pieces: dict[int, list[tuple[int, int]]] = {word: [] for word in range(sum(plane.words for plane in stored))}
    for number, quad in enumerate(quads_of(stored)):
        for piece in quad:
            pieces[piece.word].append((number, len(quad)))
    found: list[Plain] = []
    word = 0
    for plane in stored:
        for _ in range(plane.words):
            numbers, alone = [number for number, _ in pieces[word]], all(count == 1 for _, count in pieces[word])
            per = codes_per_word(plane.width) // QUAD
            if alone and numbers == list(range(numbers[0], numbers[0] + per)):
                last = found[-1] if found else None
                if last is not None and (last.width, last.word + last.words) == (plane.width, word):
                    found[-1] = last._replace(words=last.words + 1)
                else:
                    found.append(Plain(plane.width, word, 1, QUAD * numbers[0]))
            word += 1
    return found


class Field(NamedTuple):
    """Where one field of one rank's code is in a token's words."""

    word: int
    rank: int
    shift: int
    """Bits of the code below it."""
    mask: int
    """2**width - 1."""
    bit: int
    """Its lowest bit in the word."""
    first: bool
    """Whether it is the first field of the word."""


def fields_of(stored: tuple[Plane, ...]) -> list[Field]:
    """All fields of ``stored``, word by word."""
    fields, begin = [], 0
    for plane in stored:
        per = codes_per_word(plane.width)
        for place, (rank, shift) in enumerate(zip(plane.ranks, plane.shifts, strict=True)):
            r = place % per
            bit = 8 * (r % 4) + plane.width * (r // 4)
            fields.append(Field(begin + place // per, rank, shift, 2**plane.width - 1, bit, r == 0))
        begin += plane.words
    return fields
