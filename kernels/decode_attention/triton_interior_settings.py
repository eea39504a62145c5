"""When ``interior_kernel`` runs, and its constants: the one place where that is decided."""

from __future__ import annotations

import math
from typing import Any

import torch

from xquant_fx.kernels.decode_attention.arguments import DecodeArguments
from xquant_fx.kernels.packing import codes_per_word
from xquant_fx.kernels.triton_device import Device, splits_for
from xquant_fx.kernels.triton_host import power_of_two
from xquant_fx.kernels.widths import planes

#: Most tokens of a tile, which must lie in one group.
TILE = 128
#: Tiles of codes in flight at a time.
STAGES = 3
#: Caches for fewer tokens have few whole tiles, which are not worth a launch of their own.
LEAST_LENGTH = 1024
#: Most channels of keys or values: a program of one warp has registers for no more.
MOST_CHANNELS = 128
#: Most splits of the tokens, each of which leaves a part for the last kernel to read.
MOST_SPLITS = 128
#: Bits of a plane of codes to the constant that says how many words of a token it is filled up to.
PLANES = {4: "FOUR_WORDS", 2: "TWO_WORDS", 1: "ONE_WORDS"}


def why_no_interior(a: DecodeArguments, hip: bool) -> str:
    """Why ``decode_kernel`` reads all codes itself, in words; "" if ``interior_kernel`` takes the whole groups."""
    ranked, v_dim = a.k_order is not None, a.v_ring.shape[3]
    if hip:
        return "AMD's matrix units flush codes that are taken for float16 numbers to zero"
    if a.k_new is not None:
        return "the query rows of a chunk keep a GPU busy"
    if a.q.dtype == torch.float32:
        return "float32 products are not of the matrix unit's"
    if a.mask is not None and a.mask.dtype != torch.bool:
        return "a mask is added to the logits"
    if a.k_group % TILE:
        return f"groups of {a.k_group} tokens are no multiple of {TILE}"
    if a.v_group != v_dim:
        return "a token's values have several scales"
    if a.v_bits not in PLANES or not (ranked or a.k_bits in PLANES):
        return "a code is not one field of 1, 2 or 4 bits"
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
        words = {int(bits): math.ceil(dim / codes_per_word(bits))}
    return {name: plane_words(width, words[width]) if width in words else 0 for width, name in PLANES.items()}


#: Query rows of a program: columns of its matrix products, or, where there are more, rows of the left operand.
FEW_ROWS, MANY_ROWS = 8, 16


def rows_of_program(rows: int, ranked: bool) -> int:
    """Query rows of a program, of ``rows`` of one KV head: codes are decoded once for them.

    Queries of several planes, of ``ranked`` keys, have no room in registers for more than a few rows.
    """
    return FEW_ROWS if ranked or rows <= FEW_ROWS else MANY_ROWS


def tokens_of_tile(ranked: bool, k_bits: float, v_bits: float, rows: int) -> int:
    """Tokens of a tile: half a group for ranked keys of 3 bits, whose three planes of queries leave fewer registers.

    And for more ``rows``. Of values of 1 bit half a group would be fewer words than four threads share.
    """
    narrow = k_bits > 2 if ranked else rows > FEW_ROWS
    return TILE // 2 if narrow and v_bits > 1 else TILE


def shared_bytes(k_bits: float, v_bits: float, k_dim: int, v_dim: int, ranked: bool, tile: int) -> int:
    """Shared memory of a program: words of keys and values, of as many tiles as are in flight.

    Triton takes up to 4 kB more for reductions where channels are few; registers limit the programs there.
    """
    words = sum(interior_planes(k_bits, k_dim, ranked).values())
    return STAGES * tile * (4 * words + math.ceil(v_dim * v_bits / 8))


def interior_settings(
    *, batch: int, kv_heads: int, rows: int, k_bits: float, v_bits: float, k_dim: int, v_dim: int, ranked: bool,
    max_len: int, interpret: bool, device: Device, runs: bool,
) -> dict[str, Any]:  # fmt: skip
    """Fields of ``Settings`` of ``interior_kernel``, if it ``runs``."""
    tile, of_program = tokens_of_tile(ranked, k_bits, v_bits, rows), rows_of_program(rows, ranked)
    blocks = math.ceil(rows / of_program)
    splits = 0
    if runs:
        slots = device.programs(warps=1, shared=shared_bytes(k_bits, v_bits, k_dim, v_dim, ranked, tile))
        splits = splits_for(slots, batch * kv_heads * blocks, min(max_len // (2 * tile), MOST_SPLITS))
    return dict(
        INTERIOR_SPLITS=splits, INTERIOR_ROWS=of_program, INTERIOR_BLOCKS=blocks, INTERIOR_TILE=tile,
        INTERIOR_STAGES=STAGES, ASM=not interpret,
    )  # fmt: skip
