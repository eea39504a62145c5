"""Source of the CPU decode attention: constants of one problem in front of ``cpu.cpp``.

The C++ is compiled by Inductor's own builder, as part of its generated module or, for eager calls,
by :mod:`xquant_fx.kernels.cpu.build`.
"""

from __future__ import annotations

import dataclasses
import functools

import torch

from xquant_fx.kernels.arguments import Overload
from xquant_fx.kernels.cpu.isa import Isa
from xquant_fx.kernels.cpu.source import assemble, definitions, pointers
from xquant_fx.kernels.decode_attention.arguments import DecodeArguments

MOST_ROWS = 64  # of a block: their scores of a span stay in the cache


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
    """What is fixed when the kernel is compiled; see ``xquant::decode_attention``."""

    dtype: torch.dtype
    scale_dtype: torch.dtype
    batch: int
    heads: int
    query_heads: int
    queries: int
    k_dim: int
    v_dim: int
    max_len: int
    k_bits: int
    k_group: int
    k_tokens: int
    v_bits: int
    v_group: int
    v_tokens: int
    residual: int
    ring: int
    sinks: int
    scale: float
    softcap: float
    window: int
    mask_dtype: torch.dtype | None
    mask_strides: tuple[int, int, int]
    sink_logits_dtype: torch.dtype | None
    chunk: bool
    """Whether the step's own tokens are passed, rather than found in the ring."""

    @property
    def row_block(self) -> int:
        """Query rows of a KV head (heads times tokens) that are worked on at a time."""
        rows = self.query_heads // self.heads * self.queries
        return max(n for n in range(1, min(rows, MOST_ROWS) + 1) if rows % n == 0)


def constants(p: Problem) -> str:
    """The constants that the C++ relies on."""
    numbers = {
        "B": p.batch, "H": p.heads, "HQ": p.query_heads, "Q": p.queries, "DK": p.k_dim, "DV": p.v_dim, "N": p.max_len,
        "K_BITS": p.k_bits, "K_GROUP": p.k_group, "K_TOKENS": p.k_tokens,
        "V_BITS": p.v_bits, "V_GROUP": p.v_group, "V_TOKENS": p.v_tokens,
        "RESIDUAL": p.residual, "RING_SLACK": p.ring - p.residual, "SINKS": p.sinks, "WINDOW": p.window,
        "MASK_B": p.mask_strides[0], "MASK_H": p.mask_strides[1], "MASK_Q": p.mask_strides[2],
        "ROWS": p.row_block, "DIGITS": 3 if p.dtype == torch.float32 else 2,
    }  # fmt: skip
    flags = {
        "HAS_NEW": p.chunk, "HAS_MASK": p.mask_dtype is not None, "HAS_SINK_LOGITS": p.sink_logits_dtype is not None
    }  # fmt: skip
    types = {
        "T": p.dtype, "S": p.scale_dtype, "MASK": p.mask_dtype or torch.bool,
        "SINK": p.sink_logits_dtype or torch.float32,
    }  # fmt: skip
    return definitions(numbers, {"SCALE": p.scale, "SOFTCAP": p.softcap}, flags, types)


@functools.cache
def source(p: Problem, isa: Isa) -> tuple[tuple[str, ...], str]:
    """(argument types, C++ source of ``kernel``) for the vectors of ``isa``.

    The arguments are the tensors that are present, in the order of the op, and the output.
    """
    absent = set()
    if not p.sinks:
        absent |= {"k_sink", "v_sink"}
    if not p.chunk:
        absent |= {"k_new", "v_new"}
    if p.mask_dtype is None:
        absent.add("mask")
    if p.sink_logits_dtype is None:
        absent.add("sink_logits")
    tensors = pointers(DecodeArguments, Overload())
    return assemble(isa, constants(p), "decode_attention/cpu.cpp", "attend", tensors, absent, outputs={"out": "xq::T*"})
