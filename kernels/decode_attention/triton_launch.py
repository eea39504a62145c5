"""Decode attention on CUDA: one op, ``xquant::triton_decode_attention``, over the kernels of ``triton_kernels``.

The op is a ``triton_op``: Inductor takes it apart and puts the two kernels into the code it generates.
All launch parameters come from shapes, so they are fixed for a graph; how far the tokens go is read on
the device. Importing this module does not need Triton.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from xquant_fx.kernels.decode_attention.arguments import DecodeArguments
from xquant_fx.kernels.packing import codes_per_word
from xquant_fx.kernels.rotation import rotated_size
from xquant_fx.kernels.triton_host import power_of_two, rank_counts
from xquant_fx.kernels.widths import planes

PLANES = {"FOUR": 4, "TWO": 2, "ONE": 1}
#: Programs that keep a large GPU busy: some for each of 132 multiprocessors.
PROGRAMS = 528
#: Most query rows (query heads of one KV head, times query tokens) of a program: with twice as many registers run
#: out, and on NVIDIA's chips with 16 already where operands are float32, scales are applied element by element or
#: channels are ranked (which takes a query per plane).
MOST_ROWS = 16
#: Fewest tokens of a tile that lies in one group: one word of values at 1 bit.
LEAST_TILE = 32


def why_not(a: DecodeArguments) -> str:
    """Why the kernels do not take these arguments, in words; "" if they do."""
    if a.k_order is not None and a.k_group % LEAST_TILE:
        return f"ranked keys in groups of {a.k_group} tokens, which is no multiple of {LEAST_TILE}"
    return ""


def tile_tokens(dim: int, row_tile: int, k_group: int, fold_v: bool, crowded: bool) -> tuple[int, bool]:
    """Tokens of a tile, and whether each tile lies in one group of tokens (then scales go to the query).

    As many as registers have room for: the operands of a tile are in registers, and without folded scales
    the scales of every element, too. ``crowded`` says that there is room for half as many.
    """
    most = (128 if row_tile <= 8 and fold_v else 64) // (1 if dim <= 128 else 2)
    most = max(most // 2, LEAST_TILE) if crowded else most
    aligned = min(k_group & -k_group, most)
    return (aligned, True) if aligned >= LEAST_TILE else (min(most, 64), False)


@dataclasses.dataclass(frozen=True)
class Settings:
    """Constants of ``decode_kernel`` that are chosen, not given, under the names that they have there."""

    #: Query rows of a program: columns of its matrix products.
    ROWS: int
    #: Programs that share the query rows of one KV head.
    ROW_BLOCKS: int
    #: Programs that the tokens whose keys and values are in codes are divided over.
    SPLITS: int
    #: The program that takes the tokens whose keys are in codes and whose values are not.
    MIXED_SPLIT: int
    #: All programs of one KV head and block of rows; each leaves a part, and the last one takes the windows.
    PARTS: int
    #: Tokens of a tile of codes.
    TILE: int
    #: Tokens of a tile with values, or keys and values, in full precision.
    FULL_TILE: int
    #: Tokens of a tile of which only the mask is read.
    TAIL: int
    #: Tiles of codes in flight at a time.
    STAGES: int
    #: The same of tiles in full precision.
    FULL_STAGES: int
    #: Channels of keys in codes, filled up to whole words (ranked: to K_CHANNELS) and to what a matrix product sums over
    #: at least.
    CODE_CHANNELS: int
    #: Channels of keys in full precision, filled up likewise.
    K_CHANNELS: int
    #: Channels of values, filled up likewise.
    V_CHANNELS: int
    #: Words of keys that are unpacked as neighbours.
    K_LANES: int
    #: Words of values that are unpacked as neighbours.
    V_LANES: int
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
    *, batch: int, kv_heads: int, rows: int, k_dim: int, v_dim: int, max_len: int, k_bits: int, k_group: int,
    v_bits: int, v_group: int, dtype: torch.dtype, ranked: bool = False, chunk: bool = False,
    interpret: bool = False, hip: bool = False,
) -> Settings:  # fmt: skip
    """What ``decode_kernel`` is compiled with for a problem of this shape."""
    # The query rows are the short side of the products: 8 columns are the least of NVIDIA's matrix units.
    dim, fold_v = max(k_dim, v_dim), v_group == v_dim
    folded = fold_v and tile_tokens(dim, MOST_ROWS, k_group, fold_v, False)[1]
    most_rows = MOST_ROWS if hip or (folded and dtype != torch.float32 and not ranked) else MOST_ROWS // 2
    row_tile = min(max(power_of_two(rows), 16 if hip else 8), most_rows)
    row_blocks = math.ceil(rows / row_tile)
    tile, fold_k = tile_tokens(dim, row_tile, k_group, fold_v, ranked and dtype == torch.float32)
    k_words = power_of_two(math.ceil(k_dim / codes_per_word(k_bits)))
    k_words = max(k_words, 16 // codes_per_word(k_bits))  # a product sums over at least 16
    full_tile = (64 if dim <= 128 else 32) if hip else 16 if dtype == torch.float32 else 32
    k_channels = max(power_of_two(k_dim), 16)
    splits = max(1, min(PROGRAMS // (batch * kv_heads * row_blocks), math.ceil(max_len / (2 * tile)), 128))
    return Settings(
        ROWS=row_tile, ROW_BLOCKS=row_blocks,
        SPLITS=splits, MIXED_SPLIT=splits - 1 if chunk else splits, PARTS=splits if chunk else splits + 2,
        TILE=tile, FULL_TILE=min(full_tile, tile) if fold_k else full_tile,  # a tile of codes lies in one group
        TAIL=256, STAGES=3, FULL_STAGES=1 if hip else 2, CODE_CHANNELS=k_channels if ranked else k_words * codes_per_word(k_bits),
        K_CHANNELS=k_channels, V_CHANNELS=max(power_of_two(v_dim), 16),
        K_LANES=min(k_words, 4), V_LANES=min(tile // codes_per_word(v_bits), 4), FOLD_K=fold_k, FOLD_V=fold_v,
        BITCAST=not hip, MODEL=model_dtype(dtype, interpret),
    )  # fmt: skip


def ranks(k_bits: float, k_dim: int, ranked: bool) -> dict[str, Any]:
    """Constants of ``decode_kernel`` for keys with ranked channels, zeros for others."""
    counts = rank_counts(k_bits, k_dim) if ranked else {f"RANKS_{least}": 0 for least in range(1, 8)}
    words = {plane.width: power_of_two(plane.words) for plane in planes(k_bits, k_dim)} if ranked else {}
    # A product sums over 16 at least.
    fields = {f"K_{name}S": max(words[b], 4) * codes_per_word(b) if b in words else 0 for name, b in PLANES.items()}
    return {"RANKED": ranked, **counts, **fields}


def dense_mask(mask: Tensor) -> Tensor:
    """``mask`` with one row for each that differs, contiguous."""
    for dim in range(3):
        if mask.shape[dim] > 1 and mask.stride(dim) == 0:
            mask = mask.narrow(dim, 0, 1)
    return mask.contiguous()


def launch(
    a: DecodeArguments,
    *,
    wrap: Callable[[Any], Any],
    interpret: bool = False,
    hip: bool = torch.version.hip is not None,
) -> Tensor:
    """Run both kernels; ``wrap`` is ``wrap_triton``, or nothing in the interpreter."""
    from xquant_fx.kernels.decode_attention.triton_kernels import combine_kernel, decode_kernel

    batch, heads, query, k_dim = a.q.shape
    kv_heads, v_dim = a.k_ring.shape[1], a.v_ring.shape[3]
    rows = heads // kv_heads * query
    chosen = settings(
        batch=batch,
        kv_heads=kv_heads,
        rows=rows,
        k_dim=k_dim,
        v_dim=v_dim,
        max_len=a.max_len,
        k_bits=int(a.k_bits),
        k_group=a.k_group,
        v_bits=int(a.v_bits),
        v_group=a.v_group,
        ranked=a.k_order is not None,
        dtype=a.q.dtype,
        interpret=interpret,
        chunk=a.k_new is not None,
        hip=hip,
    )
    a = a.mapped(Tensor.contiguous, ("q", "k_new", "v_new")).mapped(dense_mask, ("mask",))
    mask_shape = (1, 1, 1) if a.mask is None else a.mask.shape[:3]
    parts = chosen.PARTS
    part = torch.empty((batch * heads * query, parts, v_dim), dtype=torch.float32, device=a.q.device)
    stats = torch.empty((batch * heads * query, parts, 2), dtype=torch.float32, device=a.q.device)
    out = torch.empty((batch, heads, query, v_dim), dtype=a.q.dtype, device=a.q.device)
    wrap(decode_kernel)[(parts, kv_heads * chosen.ROW_BLOCKS, batch)](
        *a.positional(without=("sink_logits",)),
        part,
        stats,
        KV_HEADS=kv_heads,
        HEADS_PER_KV=heads // kv_heads,
        QUERY=query,
        NEW_TOKENS=a.new_tokens,
        MAX_LEN=a.max_len,
        K_DIM=k_dim,
        K_BITS=int(a.k_bits),
        K_WORDS=a.k_codes.shape[2],
        K_GROUP=a.k_group,
        K_TOKENS=a.k_codes.shape[3],
        K_GROUPS=a.k_scale.shape[2],
        V_DIM=v_dim,
        V_BITS=int(a.v_bits),
        V_GROUP=a.v_group,
        V_TOKENS=a.v_codes.shape[2] * codes_per_word(a.v_bits),
        V_STRIDE=a.v_scale.shape[3],
        RING=a.k_ring.shape[2],
        RESIDUAL=a.residual_length,
        SINK_TOKENS=0 if a.k_sink is None else a.k_sink.shape[2] - 1,
        SCALE=a.scale,
        SOFTCAP=a.softcap,
        WINDOW=a.window,
        MASK_KIND="none" if a.mask is None else "bool" if a.mask.dtype == torch.bool else "float",
        MASK_BATCH=mask_shape[0],
        MASK_HEADS=mask_shape[1],
        MASK_QUERY=mask_shape[2],
        HAS_NEW=a.k_new is not None,
        ROTATION=rotated_size(v_dim).bit_length() - 1 if a.v_zero is None else -1,
        num_warps=4,
        **ranks(a.k_bits, k_dim, a.k_order is not None),
        **dataclasses.asdict(chosen),
    )
    wrap(combine_kernel)[(batch * heads * query,)](
        part,
        stats,
        a.sink_logits,
        out,
        HEADS=heads,
        QUERY=query,
        V_DIM=v_dim,
        PARTS=parts,
        PARTS_TILE=power_of_two(parts),
        PARTS_STEP=min(power_of_two(parts), 8),
        V_CHANNELS=power_of_two(v_dim),
        HAS_LOGITS=a.sink_logits is not None,
        num_warps=4,
    )
    return out


def _attend(*args: Any, **kwargs: Any) -> Tensor:
    return launch(DecodeArguments(*args, **kwargs), wrap=torch.library.wrap_triton)


# triton_op ignores its parameter ``schema`` (torch 2.11 to 2.13; 2.14 heeds it) and infers one from the signature.
_attend.__signature__ = DecodeArguments.signature(returns=Tensor)  # type: ignore[attr-defined]

#: Attention of ``q`` [B, heads, q, D] over a quantized cache: [B, heads, q, v_dim]. Rows that see nothing are 0.
decode_attention = torch.library.triton_op("xquant::triton_decode_attention", _attend, mutates_args=())
