"""Source of the CPU decode attention: constants of one problem in front of ``cpu.cpp``.

One kernel serves caches of all lengths, and batches of nearly all sizes: it is told these.

The C++ is compiled by Inductor's own builder, as part of its generated module or, for eager calls,
by :mod:`xquant_fx.kernels.cpu.build`.
"""

from __future__ import annotations

import dataclasses
import functools

import torch

from xquant_fx.kernels.arguments import Overload
from xquant_fx.kernels.cpu.isa import Isa
from xquant_fx.kernels.cpu.source import array, assemble, definitions, namespace, pointers, sign_table
from xquant_fx.kernels.decode_attention.arguments import DecodeArguments
from xquant_fx.kernels.packing import codes_per_word, high_and_low, plane_widths
from xquant_fx.kernels.rotation import rotated_size
from xquant_fx.kernels.widths import QUAD, plain_words, planes, quads_of, rank_widths

RANKED, ROTATED = "per_channel_ranked", "per_token_rotated"
#: What stores values on levels that lie about zero, without zero points.
ABOUT_ZERO = (ROTATED, "per_token_folded")
MOST_ROWS = 64  # of a block: their scores of a span stay in the cache
#: What the kernel is told besides tensors, in order: sequences, their longest length, tokens that the codes of keys and
#: of values have room for, sequences that have rows of the mask of their own (1: all share them), tokens of the step.
SIZES = ("batch", "max_len", "k_tokens", "v_tokens", "mask_batch", "queries")
#: Query rows of a KV head that are worked on at a time where their number is not fixed.
ROWS_OF_ANY = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
    """What is fixed when the kernel is compiled; see ``xquant::decode_attention``."""

    dtype: torch.dtype
    scale_dtype: torch.dtype
    heads: int
    query_heads: int
    queries: int
    """Tokens of the step; 0: the kernel is told (``any_queries``)."""
    k_dim: int
    v_dim: int
    long_spans: bool
    """Whether tokens are taken 1,024 at a time, not 256: costs less for each, leaves fewer pieces for threads."""
    k_scheme: str
    k_bits: float
    k_group: int
    k_residual: int
    k_ring: int
    v_scheme: str
    v_bits: float
    v_group: int
    k_wrap: int = 0
    """After how many tokens the codes of keys start over, and those of values; 0: they do not."""
    v_wrap: int = 0
    v_residual: int
    v_ring: int
    sinks: int
    scale: float
    softcap: float
    window: int
    mask_dtype: torch.dtype | None
    mask_heads: bool
    """Whether query heads have rows of the mask of their own, and then query tokens."""
    mask_queries: bool
    sink_logits_dtype: torch.dtype | None
    k_norms: bool
    """Whether keys were divided by the norms of their tokens."""
    chunk: bool
    """Whether the step's own tokens are passed, rather than found in the ring."""
    by_row: bool
    """Whether the rows of a batch have lengths of their own: each is a batch of one."""

    @property
    def row_block(self) -> int:
        """Query rows of a KV head (heads times tokens) that are worked on at a time."""
        return row_block(self.query_heads // self.heads * self.queries) if self.queries else ROWS_OF_ANY

    def any_queries(self) -> Problem:
        """The same for steps of any number of tokens."""
        return dataclasses.replace(self, queries=0, long_spans=False)


@functools.cache  # an eager step asks, too
def row_block(rows: int) -> int:
    """How many of a KV head's query rows are worked on at a time."""
    return max(n for n in range(1, min(rows, MOST_ROWS) + 1) if rows % n == 0)


def key_sizes(p: Problem) -> dict[str, int]:
    """Words of a key in planes of each width, and how many ranks have codes."""
    ranks = 0
    if p.k_scheme == RANKED:
        words = {plane.width: plane.words for plane in planes(p.k_bits, p.k_dim)}
        ranks = QUAD * len(quads_of(planes(p.k_bits, p.k_dim)))
    else:
        words = {width: -(-p.k_dim // codes_per_word(width)) for width in plane_widths(p.k_bits)}
    return {**{f"K_WORDS_{width}": words.get(width, 0) for width in (8, 4, 2, 1)}, "K_RANKS": ranks}


#: Up to this width (the mean one of ranked keys) codes are multiplied with numbers of one digit, where a model computes
#: in bfloat16. Among ranked keys of 3 bits are codes of 6, which would lose a fifth of what was lost before.
ONE_DIGIT_BITS = 2.5


def digits(dtype: torch.dtype, bits: float) -> int:
    """Bytes of the numbers, queries and weights times scales, that codes of ``bits`` bits are multiplied with.

    One byte rounds to steps of 1/127 of the largest among the channels, or among 128 tokens. That loses a tenth of what
    such codes have lost, or less, and little beside what bfloat16 loses in a model (benchmarks/digits.py).
    """
    if dtype == torch.float32:
        return 3
    return 1 if dtype == torch.bfloat16 and bits <= ONE_DIGIT_BITS else 2


def constants(p: Problem) -> str:
    """The constants that the C++ relies on."""
    v_high, v_low = high_and_low(p.v_bits)
    numbers = {
        "H": p.heads, "HQ": p.query_heads, "Q": p.queries, "DK": p.k_dim, "DV": p.v_dim,
        **key_sizes(p), "K_GROUP": p.k_group, "K_RESIDUAL": p.k_residual, "K_RING": p.k_ring,
        "ROTATED": rotated_size(p.v_dim) if p.v_scheme == ROTATED else 0,
        "V_HIGH": v_high, "V_LOW": v_low, "V_GROUP": p.v_group,
        "K_WRAP": p.k_wrap, "V_WRAP": p.v_wrap,
        "V_RESIDUAL": p.v_residual, "V_RING": p.v_ring, "SINKS": p.sinks, "WINDOW": p.window,
        "ROWS": p.row_block, "K_DIGITS": digits(p.dtype, p.k_bits), "V_DIGITS": digits(p.dtype, p.v_bits),
    }  # fmt: skip
    flags = {
        "RANKED": p.k_scheme == RANKED, "NORMS": p.k_norms, "ABOUT_ZERO": p.v_scheme in ABOUT_ZERO, "HAS_NEW": p.chunk,
        "LONG_SPANS": p.long_spans,
        "HAS_MASK": p.mask_dtype is not None, "MASK_HEADS": p.mask_heads, "MASK_QUERIES": p.mask_queries,
        "HAS_SINK_LOGITS": p.sink_logits_dtype is not None,
    }  # fmt: skip
    types = {
        "T": p.dtype, "S": p.scale_dtype, "MASK": p.mask_dtype or torch.bool,
        "SINK": p.sink_logits_dtype or torch.float32,
    }  # fmt: skip
    return definitions(numbers, {"SCALE": p.scale, "SOFTCAP": p.softcap}, flags, types) + tables(p)


def tables(p: Problem) -> str:
    """Constants of ranked keys and of rotated values: where codes of ranks are, middles of codes, signs."""
    middles = [(2**width - 1) / 2 for width in rank_widths(p.k_bits, p.k_dim)] if p.k_scheme == RANKED else [0.0]
    plain, pieces = _codes(p) if p.k_scheme == RANKED else ([], [])
    return namespace(
        "// Words of a key whose fields, of `width` bits, are the codes from `element` on.\n"
        "struct Plain {\n    int width;\n    int64_t word, words, element;\n};\n"
        "// The four codes from `element` on, a byte each, are the sum of (word >> shift) & mask up to the `last`.\n"
        "struct Piece {\n    int64_t word, element;\n    int shift;\n    uint32_t mask;\n    bool last;\n};\n"
        + array("Plain", "PLAIN", plain or ["{1, 0, 0, 0}"])
        + array("Piece", "PIECES", pieces or ["{0, 0, 0, 0, 0}"])
        + array("float", "RANK_MIDDLES", [f"{middle}f" for middle in middles])
        + sign_table(p.v_dim if p.v_scheme == ROTATED else 1)
    )


def _codes(p: Problem) -> tuple[list[str], list[str]]:
    """Rows of PLAIN and of PIECES: each of a ranked key's codes is in one of them."""
    stored = planes(p.k_bits, p.k_dim)
    plain = plain_words(stored)
    taken = {word for each in plain for word in range(each.word, each.word + each.words)}
    pieces = [
        f"{{{piece.word}, {QUAD * number}, {piece.shift}, {piece.mask:#x}, {int(piece is quad[-1])}}}"
        for number, quad in enumerate(quads_of(stored))
        for piece in quad
        if piece.word not in taken
    ]
    return [f"{{{w.width}, {w.word}, {w.words}, {w.rank}}}" for w in plain], pieces


@functools.cache
def source(p: Problem, isa: Isa) -> tuple[tuple[str, ...], str]:
    """(argument types, C++ source of ``kernel``) for the vectors of ``isa``.

    The arguments are the tensors that are present, in the order of the op, the output, and what
    ``cpu_call.sizes_given`` says.
    """
    absent = set()
    if not p.sinks:
        absent |= {"k_sink", "v_sink"}
    if not p.chunk:
        absent |= {"k_new", "v_new"}
    if p.k_scheme != RANKED:
        absent |= {"k_order", "k_center"}
    if not p.k_norms:
        absent.add("k_norm")
    if p.v_scheme in ABOUT_ZERO:
        absent.add("v_zero")
    if p.mask_dtype is None:
        absent.add("mask")
    if p.sink_logits_dtype is None:
        absent.add("sink_logits")
    tensors, outputs = pointers(DecodeArguments, Overload()), {"out": "xq::T*"}
    file = "decode_attention/cpu.cpp"
    return assemble(isa, constants(p), file, "attend", tensors, absent, outputs, SIZES, by_row=p.by_row)
