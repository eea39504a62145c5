"""When ``interior_kernel`` runs, and its constants: the one place where that is decided.

It takes every width of a plan and head_dims up to 256. Left to ``decode_kernel`` are what reads scales or masks element
by element (several scales a token of values, masks of floats), and what no model of 16 bits has.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch

from xquant_fx.kernels.decode_attention.arguments import DecodeArguments
from xquant_fx.kernels.packing import codes_per_block, codes_per_word, plane_widths
from xquant_fx.kernels.triton_device import Device, splits_for
from xquant_fx.kernels.triton_host import power_of_two
from xquant_fx.kernels.widths import planes

#: Most tokens of a tile, which must lie in one group, and fewest.
TILE, LEAST_TILE = 128, 32
#: Tiles of codes in flight at a time.
STAGES = 3
#: Caches for fewer tokens have few whole tiles, which are not worth a launch of their own.
LEAST_LENGTH = 1024
#: Most channels of keys or values: a program of one warp has registers for no more. Above WIDE tiles are smaller.
MOST_CHANNELS, WIDE = 256, 128
#: Most splits of the tokens, each of which leaves a part for the last kernel to read.
MOST_SPLITS = 128
#: Bits of a plane of codes to the constant that says how many words of a token it is filled up to. Codes of 8 bits have
#: one plane, in the place of that of 4.
PLANES = {8: "FOUR_WORDS", 4: "FOUR_WORDS", 2: "TWO_WORDS", 1: "ONE_WORDS"}


#: Query rows of a program: columns of its matrix products, or, where there are more, rows of the left operand.
FEW_ROWS, MANY_ROWS = 8, 16


@dataclasses.dataclass(frozen=True)
class Format:
    """How keys and values are stored, as far as a program's registers go by it."""

    ranked: bool
    k_bits: float
    v_bits: int
    k_dim: int
    v_dim: int
    k_group: int

    @property
    def is_wide(self) -> bool:
        """Whether head_dims leave registers for smaller tiles and a few query rows only."""
        return max(self.k_dim, self.v_dim) > WIDE


def why_no_interior(a: DecodeArguments, hip: bool) -> str:
    """Why ``decode_kernel`` reads all codes itself, in words; "" if ``interior_kernel`` takes the whole groups."""
    v_dim = a.v_ring.shape[3]
    if hip:
        return "AMD's matrix units flush codes that are taken for float16 numbers to zero"
    if a.k_new is not None:
        return "the query rows of a chunk keep a GPU busy"
    if a.q.dtype == torch.float32:
        return "float32 products are not of the matrix unit's"
    if a.mask is not None and a.mask.dtype != torch.bool:
        return "a mask is added to the logits"
    if a.k_group % (least := fewest_tokens(int(a.v_bits))):
        return f"groups of {a.k_group} tokens are no multiple of {least}"
    if a.v_group != v_dim:
        return "a token's values have several scales"
    if not {a.k_scale.dtype, a.v_scale.dtype} <= {torch.uint8, torch.float16}:
        return "scales are neither bytes nor float16 numbers"
    if a.q.shape[3] % 16 or max(a.q.shape[3], v_dim) > MOST_CHANNELS:
        return f"head_dim is no multiple of 16 up to {MOST_CHANNELS}"
    if a.max_len < LEAST_LENGTH:
        return f"the cache is for fewer than {LEAST_LENGTH} tokens"
    return ""


def plane_words(width: int, words: int) -> int:
    """``words`` of a token filled up: at least so many that there are 32 fields, two steps of a matrix product."""
    return max(power_of_two(words), width)


def interior_planes(bits: float, dim: int, ranked: bool) -> dict[str, int]:
    """Constants of ``interior_kernel``: the words of each plane of keys, 0 for planes that are not there."""
    if ranked:
        words = {plane.width: plane.words for plane in planes(bits, dim)}
    else:
        words = {width: math.ceil(dim / codes_per_word(width)) for width in plane_widths(bits)}
    filled = {PLANES[width]: plane_words(width, count) for width, count in words.items()}
    return {**dict.fromkeys(PLANES.values(), 0), **filled}


def rows_of_program(a: Format, rows: int) -> int:
    """Query rows of a program, of ``rows`` of one KV head: codes are decoded once for them."""
    return MANY_ROWS if rows > FEW_ROWS and not a.is_wide else FEW_ROWS


def fewest_tokens(v_bits: int) -> int:
    """Fewest tokens of a tile: two words in the plane of its values' lowest bits, halves of which four threads take."""
    return max(2 * codes_per_block(v_bits), LEAST_TILE)


def tokens_of_tile(a: Format, rows: int) -> int:
    """Tokens of a tile: as many as registers have room for, and shared memory, so that programs are many enough.

    Ranked keys of 3 bits have three planes of queries, values of 3 bits two of codes; 8 bits are many bytes.
    """
    if max(a.k_bits, a.v_bits) == 8 or (a.ranked and a.is_wide):
        most = TILE // 4
    elif (a.ranked and a.k_bits > 2) or a.v_bits == 3 or a.is_wide or rows_of_program(a, rows) == MANY_ROWS:
        most = TILE // 2
    else:
        most = TILE
    return max(min(most, a.k_group & -a.k_group), fewest_tokens(a.v_bits))


def shared_bytes(a: Format, tile: int) -> int:
    """Shared memory of a program: words of keys and values, of as many tiles as are in flight.

    Triton takes up to 4 kB more for reductions where channels are few; registers limit the programs there.
    """
    words = sum(interior_planes(a.k_bits, a.k_dim, a.ranked).values())
    return STAGES * tile * (4 * words + math.ceil(a.v_dim * a.v_bits / 8))


def interior_settings(
    *, stored: Format, batch: int, kv_heads: int, rows: int, max_len: int, interpret: bool, device: Device, runs: bool
) -> dict[str, Any]:
    """Fields of ``Settings`` of ``interior_kernel``, if it ``runs``."""
    tile, of_program = tokens_of_tile(stored, rows), rows_of_program(stored, rows)
    blocks = math.ceil(rows / of_program)
    splits = 0
    if runs:
        slots = device.programs(warps=1, shared=shared_bytes(stored, tile))
        splits = splits_for(slots, batch * kv_heads * blocks, min(max_len // (2 * tile), MOST_SPLITS))
    return dict(
        INTERIOR_SPLITS=splits, INTERIOR_ROWS=of_program, INTERIOR_BLOCKS=blocks, INTERIOR_TILE=tile,
        INTERIOR_STAGES=STAGES, ASM=not interpret,
    )  # fmt: skip
