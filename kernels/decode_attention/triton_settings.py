"""Constants of the Triton decode kernel: what is chosen for a problem's shape, and where ranked keys are.

Nothing is tried out: they come from registers and shared memory, as the compiler counts them for three chips.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch

from xquant_fx.kernels.decode_attention.triton_interior_settings import MOST_SPLITS, Format, interior_settings
from xquant_fx.kernels.packing import codes_per_word, high_and_low
from xquant_fx.kernels.triton_device import LARGE, Device, splits_for
from xquant_fx.kernels.triton_host import power_of_two, rank_counts
from xquant_fx.kernels.widths import planes

#: Bits of a plane of ranked keys to the constant that says how many fields it is filled up to.
PLANES = {4: "K_FOURS", 2: "K_TWOS", 1: "K_ONES"}
#: Tiles of codes in flight at a time.
STAGES = 3
#: Most query rows (query heads of one KV head, times query tokens) of a program: with twice as many registers run
#: out, and on NVIDIA's chips with 16 already where operands are float32, scales are applied element by element,
#: channels are ranked (which takes a query per plane) or codes have two planes.
MOST_ROWS = 16
#: Fewest tokens of a tile that lies in one group: one word of values at 1 bit.
LEAST_TILE = 32


def tile_tokens(dim: int, row_tile: int, k_group: int, fold_v: bool) -> tuple[int, bool]:
    """Tokens of a tile, and whether each tile lies in one group of tokens (then scales go to the query).

    As many as registers have room for: the operands of a tile are in registers, and without folded scales
    the scales of every element, too.
    """
    most = (128 if row_tile <= 8 and fold_v else 64) // (1 if dim <= 128 else 2)
    aligned = min(k_group & -k_group, most)
    return (aligned, True) if aligned >= LEAST_TILE else (min(most, 64), False)


def key_words(dim: int, width: int) -> int:
    """Words of a key of ``dim`` channels with fields of ``width`` bits, filled up: a product sums over at least 16."""
    return max(power_of_two(math.ceil(dim / codes_per_word(width))), 16 // codes_per_word(width))


def shared_bytes(
    k_dim: int, v_dim: int, k_bits: float, v_bits: float, dtype: torch.dtype, tile: int, full_tile: int, stages: int
) -> int:
    """Shared memory of a program of ``decode_kernel``, at most: of the tiles in flight of that zone which takes more.

    ``stages`` tiles of ``full_tile`` tokens in full precision are. A tile of codes goes through it decoded, but where
    the matrix units are Hopper's.
    """
    codes = STAGES * tile * math.ceil((k_dim * k_bits + v_dim * v_bits) / 8)
    codes += tile * max(k_dim, v_dim) * dtype.itemsize
    return max(codes, stages * full_tile * (k_dim + v_dim) * dtype.itemsize)


@dataclasses.dataclass(frozen=True)
class Settings:
    """Constants of ``decode_kernel`` that are chosen, not given, under the names that they have there."""

    #: Query rows of a program: columns of its matrix products.
    ROWS: int
    #: Programs that share the query rows of one KV head.
    ROW_BLOCKS: int
    #: Programs that the tokens whose keys and values are in codes are divided over.
    SPLITS: int
    #: The program that takes the tokens of which only the keys, or only the values, are in codes.
    MIXED_SPLIT: int
    #: All programs of one KV head and block of rows; each leaves a part, and the last one takes the windows.
    PARTS: int
    #: Of these, programs of ``interior_kernel``; 0: it does not run, and SPLITS are for all tokens in codes, not for
    #: those before and after its tiles.
    INTERIOR_SPLITS: int
    #: Query rows of a program of ``interior_kernel``.
    INTERIOR_ROWS: int
    #: Programs of ``interior_kernel`` that share the query rows of one KV head.
    INTERIOR_BLOCKS: int
    #: Tokens of its tiles.
    INTERIOR_TILE: int
    #: Its tiles of codes in flight at a time.
    INTERIOR_STAGES: int
    #: Whether it may be given an instruction by name, which the interpreter does not know.
    ASM: bool
    #: Tokens of a tile of codes.
    TILE: int
    #: Tokens of a tile with values, or keys and values, in full precision.
    FULL_TILE: int
    #: Tokens of a tile with keys in full precision and values in codes, of which it has whole words.
    LATE_TILE: int
    #: Tokens of a tile of which only the mask is read.
    TAIL: int
    #: Tiles of codes in flight at a time.
    STAGES: int
    #: The same of tiles in full precision.
    FULL_STAGES: int
    #: Channels of keys in codes, filled up to whole words and to what a matrix product sums over at least; of ranked
    #: keys K_CHANNELS.
    CODE_CHANNELS: int
    #: Channels of keys in full precision, filled up likewise.
    K_CHANNELS: int
    #: Channels of values, filled up likewise.
    V_CHANNELS: int
    #: Words of keys that are unpacked as neighbours.
    K_LANES: int
    #: Words of values that are unpacked as neighbours.
    V_LANES: int
    #: CODE_CHANNELS, K_LANES and V_LANES of the planes of lower fields, if codes have two.
    LOW_CHANNELS: int
    K_LOW_LANES: int
    V_LOW_LANES: int
    #: Whether each tile of keys lies in one group of tokens: then scales go to the query, not to the codes.
    FOLD_K: bool
    #: Whether a token of values has one scale: then scales go to the probabilities.
    FOLD_V: bool
    #: Whether codes are taken for float16 numbers as they are, which AMD's matrix units would flush to zero.
    BITCAST: bool
    #: What keys and values in full precision are multiplied in: "fp16", "bf16" or "fp32".
    MODEL: str


def model_dtype(dtype: torch.dtype, interpret: bool) -> str:
    """Name of the dtype of products in full precision; the interpreter gets bfloat16 wrong."""
    name = {torch.float16: "fp16", torch.bfloat16: "bf16"}.get(dtype, "fp32")
    return "fp32" if interpret and name == "bf16" else name


def settings(
    *, batch: int, kv_heads: int, rows: int, k_dim: int, v_dim: int, max_len: int, k_bits: float, k_group: int,
    v_bits: int, v_group: int, dtype: torch.dtype, ranked: bool = False, chunk: bool = False,
    interpret: bool = False, hip: bool = False, edges: int = 0, tails: int = 0, warps: int = 4, device: Device = LARGE,
) -> Settings:  # fmt: skip
    """What ``decode_kernel`` is compiled with for a problem of this shape, ``warps`` warps a program, on ``device``.

    With ``edges``, ``interior_kernel`` takes the whole groups and so many splits what lies before and after them; then
    ``tails`` programs, if these are more, share the mask of tokens that are not written yet.
    """
    # The query rows are the short side of the products: 8 columns are the least of NVIDIA's matrix units.
    dim, fold_v = max(k_dim, v_dim), v_group == v_dim
    (k_high, k_low), (v_high, v_low) = high_and_low(int(k_bits)), high_and_low(v_bits)
    folded = fold_v and tile_tokens(dim, MOST_ROWS, k_group, fold_v)[1]
    plain = folded and dtype != torch.float32 and not ranked and not k_low and not v_low
    most_rows = MOST_ROWS if hip or plain else MOST_ROWS // 2
    row_tile = min(max(power_of_two(rows), 16 if hip else 8), most_rows)
    row_blocks = math.ceil(rows / row_tile)
    tile, fold_k = tile_tokens(dim, row_tile, k_group, fold_v)
    if k_low and not ranked and not fold_k:  # scales of both planes' elements are in registers, too
        tile = LEAST_TILE
    k_words, k_low_words = key_words(k_dim, k_high), key_words(k_dim, k_low or k_high)
    full_tile = (64 if dim <= 128 else 32) if hip else 16 if dtype == torch.float32 else 32
    k_channels = max(power_of_two(k_dim), 16)
    least_full = min(full_tile, tile) if fold_k else full_tile  # a tile of codes lies in one group
    wide_ranked = ranked and dim > 128
    # Tiles ahead that are left out where registers run out: of the windows, and on AMD's chips of codes.
    full_stages = 1 if hip or (wide_ranked and warps > 4) else 2
    stages = 1 if hip and wide_ranked and dtype == torch.float32 else STAGES
    interior = interior_settings(
        stored=Format(ranked, k_bits, v_bits, k_dim, v_dim, k_group), batch=batch, kv_heads=kv_heads, rows=rows,
        max_len=max_len, interpret=interpret, device=device, runs=edges > 0,
    )  # fmt: skip
    shared = shared_bytes(k_dim, v_dim, k_bits, v_bits, dtype, tile, least_full, full_stages)
    most_splits = min(math.ceil(max_len / (2 * tile)), MOST_SPLITS)
    slots = device.programs(warps=warps, shared=shared)
    splits = edges or splits_for(slots, batch * kv_heads * row_blocks, most_splits)
    parts = splits if chunk else max(splits + 2, tails)
    return Settings(
        ROWS=row_tile, ROW_BLOCKS=row_blocks,
        SPLITS=splits, MIXED_SPLIT=splits - 1 if chunk else splits, PARTS=parts + interior["INTERIOR_SPLITS"],
        **interior,
        TILE=tile, FULL_TILE=least_full, LATE_TILE=max(least_full, LEAST_TILE),
        TAIL=256, STAGES=stages, FULL_STAGES=full_stages,
        CODE_CHANNELS=k_channels if ranked else k_words * codes_per_word(k_high), K_CHANNELS=k_channels,
        V_CHANNELS=max(power_of_two(v_dim), 16),
        K_LANES=min(k_words, 4), V_LANES=min(tile // codes_per_word(v_high), 4),
        LOW_CHANNELS=k_low_words * codes_per_word(k_low or k_high), K_LOW_LANES=min(k_low_words, 4),
        V_LOW_LANES=min(tile // codes_per_word(v_low or v_high), 4), FOLD_K=fold_k, FOLD_V=fold_v,
        BITCAST=not hip, MODEL=model_dtype(dtype, interpret),
    )  # fmt: skip


def ranks(k_bits: float, k_dim: int, ranked: bool) -> dict[str, Any]:
    """Constants of ``decode_kernel`` for keys with ranked channels, zeros for others: places in each plane, counts."""
    if not ranked:
        return {"RANKED": False, **dict.fromkeys((*PLANES.values(), *rank_counts(2, k_dim)), 0)}
    places = dict.fromkeys(PLANES.values(), 0)
    for plane in planes(k_bits, k_dim):
        # Fewer than 4 words would take the codes through shared memory: 4 threads share a row of matrix operands.
        words = max(power_of_two(plane.words), 4)
        places[PLANES[plane.width]] = words * codes_per_word(plane.width)
    return {"RANKED": True, **places, **rank_counts(k_bits, k_dim)}
