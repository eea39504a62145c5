"""Bit layout of the codes: int32 words along the axis that attention sums over.

A word holds ``32 / bits`` codes (``codes_per_word``). Code ``r`` of a word sits in byte ``r % 4``, at bit
``bits * (r // 4)`` of that byte, so one shift and one mask of 0x03030303 (2 bits) turn a word into
four codes in four bytes: what integer dot products on CPUs and small-integer matrix products on
GPUs take as they are. Keys are packed along channels and values along tokens, in both cases the
axis of the sum, and the other axis is contiguous.

    keys    codes [B, H, ceil(D / per), tokens]    per = 32 / bits
    values  codes [B, H, tokens / per, D]
"""

from __future__ import annotations

import torch
from torch import Tensor

#: Widths that can be stored, in bits per element; 16 is unquantized. Below 16 they divide 8.
BITS = (1, 2, 4, 8, 16)


WORD_BITS = 32


def codes_per_word(bits: float) -> int:
    """Codes in one int32 word; ``bits``, a whole number, divides 8, so no code crosses a byte."""
    return WORD_BITS // int(bits)


def shifts(bits: float, device: torch.device) -> Tensor:
    """Left shift, in bits, of each of the ``32 / bits`` codes of a word: int32 [per]."""
    r = torch.arange(codes_per_word(bits), device=device, dtype=torch.int32)
    return 8 * (r % 4) + int(bits) * (r // 4)


def pack_words(codes: Tensor, bits: float, dim: int) -> Tensor:
    """Pack integer ``codes`` (any integer dtype, values below 2**bits) along ``dim`` into int32.

    A length that is no multiple of ``32 / bits`` is padded with code 0.
    """
    dim = dim % codes.dim()
    per = codes_per_word(bits)
    length = codes.shape[dim]
    words = (length + per - 1) // per
    if isinstance(length, int) and length % per:
        pad = [0, 0] * (codes.dim() - 1 - dim) + [0, words * per - length]
        codes = torch.nn.functional.pad(codes, pad)
    grouped = codes.to(torch.int32).unflatten(dim, (words, per))
    shift = shifts(bits, codes.device).view(per, *([1] * (codes.dim() - 1 - dim)))
    return torch.bitwise_left_shift(grouped, shift).sum(dim + 1, dtype=torch.int32)


def unpack_words(words: Tensor, bits: float, dim: int, length: int) -> Tensor:
    """Undo :func:`pack_words`: int32 codes, ``length`` of them along ``dim``."""
    dim = dim % words.dim()
    per = codes_per_word(bits)
    shift = shifts(bits, words.device).view(per, *([1] * (words.dim() - 1 - dim)))
    codes = torch.bitwise_right_shift(words.unsqueeze(dim + 1), shift) & (2 ** int(bits) - 1)
    return codes.flatten(dim, dim + 1).narrow(dim, 0, length)
