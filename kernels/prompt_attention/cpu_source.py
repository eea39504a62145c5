"""Source of the CPU kernel of a prompt's attention: for a head size, and any batch, heads and tokens."""

from __future__ import annotations

import dataclasses
import functools

import torch

from xquant_fx.kernels.cpu.isa import Isa
from xquant_fx.kernels.cpu.source import definitions, whole_source

#: Strides in numbers, of batch, head and token.
STRIDES = ("batch", "head", "token")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
    """What is fixed when the kernel is compiled."""

    dtype: torch.dtype
    """bfloat16 or float32."""
    dim: int
    """Channels of a head, a multiple of 32."""


def constants(p: Problem) -> str:
    """The constants that the C++ relies on."""
    assert p.dim % 32 == 0
    return definitions({"D": p.dim}, {}, {}, {"T": p.dtype})


@functools.cache
def source(p: Problem, isa: Isa) -> tuple[tuple[str, ...], str]:
    """(argument types, C++ source of ``kernel``): q, k, v, out, what queries see, strides, sizes, scale."""
    tensors = {name: "const xq::T*" for name in ("q", "k", "v")} | {"out": "xq::T*"}
    seen = {name: "const int32_t*" for name in ("first", "end")}
    strides = {f"{name}_{of}": "int64_t" for name in tensors for of in STRIDES}
    sizes = {name: "int64_t" for name in ("batch", "heads", "kv_heads", "queries", "tokens")}
    heads = ", ".join("{" + ", ".join([name, *(f"{name}_{of}" for of in STRIDES)]) + "}" for name in tensors)
    entry = f"xq::attend({{{heads}, {', '.join((*seen, *sizes))}, scale}});"
    given = {**tensors, **seen, **strides, **sizes, "scale": "float"}
    return whole_source(isa, constants(p), "prompt_attention/cpu.cpp", given, entry)
