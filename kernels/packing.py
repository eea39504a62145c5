"""Bit layout of the codes: int32 words along the axis that attention sums over.

A code of 1, 2, 4 or 8 bits is one field, and a word holds ``32 / bits`` of them (``codes_per_word``). Field ``r`` of a
word sits in byte ``r % 4``, at bit ``bits * (r // 4)`` of that byte, so one shift and one mask of 0x03030303 (2 bits)
turn a word into four codes in four bytes: what integer dot products on CPUs and small-integer matrix products on
GPUs take as they are. A code of another width is several fields, one per binary digit of the width (3 = 2 + 1), and
each plane of them is packed like codes of its width: the upper 2 bits of all codes, then the lowest bit of all. So a
sum over codes is one over each plane, and nothing has to be put together before it (``code_planes``).

Keys are packed along channels and values along tokens, in both cases the axis of the sum, and the other axis is
contiguous. Planes follow each other along the packed axis.

    keys    codes [B, H, word_count(bits, D), tokens]
    values  codes [B, H, tokens * bits / 32, D]        tokens: a multiple of ``codes_per_block``
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

#: Widths that can be stored, in bits per element; 16 is unquantized.
BITS = (1, 2, 3, 4, 8, 16)
#: Widths of fields, widest first: they divide 8, so that no field crosses a byte.
FIELD_WIDTHS = (8, 4, 2, 1)
WORD_BITS = 32


class CodePlane(NamedTuple):
    """One field of each code: ``width`` bits, with ``shift`` bits of the code below it."""

    width: int
    shift: int
    first: int
    """Its first word."""
    words: int


def plane_widths(bits: float) -> tuple[int, ...]:
    """Widths of the fields of a code of ``bits`` bits, a whole number, from its highest bits down."""
    return tuple(width for width in FIELD_WIDTHS if int(bits) & width)


def high_and_low(bits: float) -> tuple[int, int]:
    """The same as two numbers, for kernels, which know two planes at most: 0 where there is no second one."""
    high, *rest = plane_widths(bits)
    (low,) = rest or (0,)
    return high, low


def codes_per_word(width: float) -> int:
    """Fields of ``width`` bits, one of ``FIELD_WIDTHS``, in one int32 word."""
    return WORD_BITS // int(width)


def codes_per_block(bits: float) -> int:
    """The fewest codes that fill whole words in every plane."""
    return codes_per_word(plane_widths(bits)[-1])


def word_count(bits: float, length: int) -> int:
    """Words that ``length`` codes take."""
    return sum((length + per - 1) // per for per in map(codes_per_word, plane_widths(bits)))


def code_planes(bits: float, words: int) -> tuple[CodePlane, ...]:
    """Where each plane is among ``words`` words that ``word_count`` gave for some length."""
    found, first, shift = [], 0, int(bits)
    for width in plane_widths(bits):
        shift -= width
        # The last plane has at most one word more than its share, the one before as many fewer.
        count = words * width // int(bits) if shift else words - first
        found.append(CodePlane(width, shift, first, count))
        first += count
    return tuple(found)


def planes_of_both(bits: float, first: Tensor, second: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Views of each plane of two tensors of words, packed along dimension 2 for different lengths."""
    pairs = zip(code_planes(bits, first.shape[2]), code_planes(bits, second.shape[2]), strict=True)
    return [(first.narrow(2, p.first, p.words), second.narrow(2, q.first, q.words)) for p, q in pairs]


def shifts(width: float, device: torch.device) -> Tensor:
    """Left shift, in bits, of each of the ``32 / width`` fields of a word: int32 [per]."""
    r = torch.arange(codes_per_word(width), device=device, dtype=torch.int32)
    return 8 * (r % 4) + int(width) * (r // 4)


def pack_words(codes: Tensor, bits: float, dim: int) -> Tensor:
    """Pack integer ``codes`` (any integer dtype, values below 2**bits) along ``dim`` into int32.

    In each plane a length that is no multiple of ``codes_per_word`` is padded with 0.
    """
    dim = dim % codes.dim()
    codes = codes.to(torch.int32)
    packed, shift = [], int(bits)
    for width in plane_widths(bits):
        shift -= width
        fields = codes if width == int(bits) else codes >> shift & (2**width - 1)
        packed.append(_pack_fields(fields, width, dim))
    return packed[0] if len(packed) == 1 else torch.cat(packed, dim)


def _pack_fields(fields: Tensor, width: int, dim: int) -> Tensor:
    per = codes_per_word(width)
    length = fields.shape[dim]
    words = (length + per - 1) // per
    if isinstance(length, int) and length % per:
        pad = [0, 0] * (fields.dim() - 1 - dim) + [0, words * per - length]
        fields = torch.nn.functional.pad(fields, pad)
    grouped = fields.unflatten(dim, (words, per))
    shift = shifts(width, fields.device).view(per, *([1] * (fields.dim() - 1 - dim)))
    return torch.bitwise_left_shift(grouped, shift).sum(dim + 1, dtype=torch.int32)


def unpack_words(words: Tensor, bits: float, dim: int, length: int) -> Tensor:
    """Undo :func:`pack_words`: int32 codes, ``length`` of them along ``dim``."""
    dim = dim % words.dim()
    if len(plane_widths(bits)) == 1:
        return _unpack_fields(words, int(bits), dim, length)
    parts = [
        _unpack_fields(words.narrow(dim, p.first, p.words), p.width, dim, length) << p.shift
        for p in code_planes(bits, words.shape[dim])
    ]
    return sum(parts[1:], parts[0])


def _unpack_fields(words: Tensor, width: int, dim: int, length: int) -> Tensor:
    per = codes_per_word(width)
    shift = shifts(width, words.device).view(per, *([1] * (words.dim() - 1 - dim)))
    fields = torch.bitwise_right_shift(words.unsqueeze(dim + 1), shift) & (2**width - 1)
    return fields.flatten(dim, dim + 1).narrow(dim, 0, length)
