"""The Triton kernel that appends one decode step: one side of a layer, or keys and values in one launch.

Both sides get tokens at the same positions, with RAGGED each row of the batch at its own. Nothing that one of them
writes is read by the other, so their programs stand side by side: first those of the side that is called 0, then those
of side 1, if there is one.
"""

from __future__ import annotations

import triton
import triton.language as tl

from xquant_fx.kernels.quantize_store.triton_kernels import append_blocks, append_tokens
from xquant_fx.kernels.quantize_store.triton_ranked import append_ranked
from xquant_fx.kernels.quantize_store.triton_rotated import append_rotated


@triton.jit
def append_side(
    program, x, pos, codes, scale, zero, ring, sink, order, center, energy, norm, start, length, fault,
    APPEND: tl.constexpr, STEP: tl.constexpr, BITS: tl.constexpr, LOW: tl.constexpr, ETA: tl.constexpr,
    FIT: tl.constexpr, ABOUT_ZERO: tl.constexpr, LEVELS: tl.constexpr, TOKENS: tl.constexpr, GROUPS: tl.constexpr,
    WORDS: tl.constexpr, CHANNELS: tl.constexpr, TILE: tl.constexpr, COUNTS: tl.constexpr,
):  # fmt: skip
    """One program of one side, as ``APPEND`` of its scheme says; ``STEP`` is what all of them want to know."""
    HEADS: tl.constexpr = STEP[0]
    NEW_TOKENS: tl.constexpr = STEP[1]
    NEW_TILE: tl.constexpr = STEP[2]
    DIM: tl.constexpr = STEP[3]
    RING: tl.constexpr = STEP[4]
    SINKS: tl.constexpr = STEP[5]
    RESIDUAL: tl.constexpr = STEP[6]
    GROUP: tl.constexpr = STEP[7]
    MAX_LEN: tl.constexpr = STEP[8]
    WRAP: tl.constexpr = STEP[9]
    RAGGED: tl.constexpr = STEP[10]
    if APPEND == "blocks":
        append_blocks(
            program, x, pos, codes, scale, zero, ring, sink, start, length, fault,
            HEADS, NEW_TOKENS, NEW_TILE, DIM, RING, SINKS, RESIDUAL, GROUP, MAX_LEN, WRAP, RAGGED,
            BITS, LOW, ETA, FIT, TOKENS, GROUPS, CHANNELS, TILE,
        )  # fmt: skip
    elif APPEND == "tokens":
        append_tokens(
            program, x, pos, codes, scale, zero, ring, sink, start, length, fault,
            HEADS, NEW_TOKENS, NEW_TILE, DIM, RING, SINKS, RESIDUAL, GROUP, MAX_LEN, WRAP, RAGGED,
            BITS, LOW, ETA, FIT, WORDS, TOKENS, CHANNELS,
        )  # fmt: skip
    elif APPEND == "ranked":
        append_ranked(
            program, x, pos, codes, scale, zero, ring, sink, order, center, energy, norm, start, length, fault,
            HEADS, NEW_TOKENS, NEW_TILE, DIM, RING, SINKS, RESIDUAL, GROUP, MAX_LEN, WRAP, RAGGED,
            TOKENS, GROUPS, WORDS, CHANNELS, TILE, COUNTS,
        )  # fmt: skip
    else:
        append_rotated(
            program, x, pos, codes, scale, ring, sink, start, length, fault,
            HEADS, NEW_TOKENS, NEW_TILE, DIM, RING, SINKS, RESIDUAL, GROUP, MAX_LEN, WRAP, RAGGED,
            BITS, LOW, ABOUT_ZERO, LEVELS, WORDS, TOKENS, CHANNELS,
        )  # fmt: skip


@triton.jit
def append_kernel(
    pos, start, fault,
    x_0, codes_0, scale_0, zero_0, ring_0, sink_0, order_0, center_0, energy_0, norm_0, length_0,
    x_1, codes_1, scale_1, zero_1, ring_1, sink_1, order_1, center_1, energy_1, norm_1, length_1,
    NEW_TOKENS: tl.constexpr, NEW_TILE: tl.constexpr, RAGGED: tl.constexpr, PROGRAMS_0: tl.constexpr,
    APPEND_0: tl.constexpr, HEADS_0: tl.constexpr, DIM_0: tl.constexpr, RING_0: tl.constexpr, SINKS_0: tl.constexpr,
    RESIDUAL_0: tl.constexpr, GROUP_0: tl.constexpr, MAX_LEN_0: tl.constexpr, WRAP_0: tl.constexpr,
    BITS_0: tl.constexpr,
    LOW_0: tl.constexpr, ETA_0: tl.constexpr, FIT_0: tl.constexpr, ABOUT_ZERO_0: tl.constexpr, LEVELS_0: tl.constexpr,
    TOKENS_0: tl.constexpr, GROUPS_0: tl.constexpr, WORDS_0: tl.constexpr, CHANNELS_0: tl.constexpr,
    TILE_0: tl.constexpr, RANKS_1_0: tl.constexpr, RANKS_2_0: tl.constexpr, RANKS_3_0: tl.constexpr,
    RANKS_4_0: tl.constexpr, RANKS_5_0: tl.constexpr, RANKS_6_0: tl.constexpr, RANKS_7_0: tl.constexpr,
    APPEND_1: tl.constexpr, HEADS_1: tl.constexpr, DIM_1: tl.constexpr, RING_1: tl.constexpr, SINKS_1: tl.constexpr,
    RESIDUAL_1: tl.constexpr, GROUP_1: tl.constexpr, MAX_LEN_1: tl.constexpr, WRAP_1: tl.constexpr,
    BITS_1: tl.constexpr,
    LOW_1: tl.constexpr, ETA_1: tl.constexpr, FIT_1: tl.constexpr, ABOUT_ZERO_1: tl.constexpr, LEVELS_1: tl.constexpr,
    TOKENS_1: tl.constexpr, GROUPS_1: tl.constexpr, WORDS_1: tl.constexpr, CHANNELS_1: tl.constexpr,
    TILE_1: tl.constexpr, RANKS_1_1: tl.constexpr, RANKS_2_1: tl.constexpr, RANKS_3_1: tl.constexpr,
    RANKS_4_1: tl.constexpr, RANKS_5_1: tl.constexpr, RANKS_6_1: tl.constexpr, RANKS_7_1: tl.constexpr,
):  # fmt: skip
    """PROGRAMS_0 programs of side 0, then those of side 1; APPEND_1 is "" where there is none."""
    STEP_0: tl.constexpr = (
        HEADS_0, NEW_TOKENS, NEW_TILE, DIM_0, RING_0, SINKS_0, RESIDUAL_0, GROUP_0, MAX_LEN_0, WRAP_0, RAGGED,
    )  # fmt: skip
    COUNTS_0: tl.constexpr = (RANKS_1_0, RANKS_2_0, RANKS_3_0, RANKS_4_0, RANKS_5_0, RANKS_6_0, RANKS_7_0)
    STEP_1: tl.constexpr = (
        HEADS_1, NEW_TOKENS, NEW_TILE, DIM_1, RING_1, SINKS_1, RESIDUAL_1, GROUP_1, MAX_LEN_1, WRAP_1, RAGGED,
    )  # fmt: skip
    COUNTS_1: tl.constexpr = (RANKS_1_1, RANKS_2_1, RANKS_3_1, RANKS_4_1, RANKS_5_1, RANKS_6_1, RANKS_7_1)
    program = tl.program_id(0)
    if program < PROGRAMS_0:
        append_side(
            program, x_0, pos, codes_0, scale_0, zero_0, ring_0, sink_0, order_0, center_0, energy_0, norm_0, start,
            length_0, fault, APPEND_0, STEP_0, BITS_0, LOW_0, ETA_0, FIT_0, ABOUT_ZERO_0, LEVELS_0, TOKENS_0, GROUPS_0,
            WORDS_0, CHANNELS_0, TILE_0, COUNTS_0,
        )  # fmt: skip
    elif APPEND_1 != "":
        append_side(
            program - PROGRAMS_0, x_1, pos, codes_1, scale_1, zero_1, ring_1, sink_1, order_1, center_1, energy_1,
            norm_1, start, length_1, fault, APPEND_1, STEP_1, BITS_1, LOW_1, ETA_1, FIT_1, ABOUT_ZERO_1, LEVELS_1,
            TOKENS_1, GROUPS_1, WORDS_1, CHANNELS_1, TILE_1, COUNTS_1,
        )  # fmt: skip
