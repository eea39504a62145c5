"""One side of a layer, keys or values: what C++ kernels that store it and that load it are compiled for."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from xquant_fx.kernels.cpu.planes import tables
from xquant_fx.kernels.cpu.source import dtype_of, sizes_of
from xquant_fx.kernels.packing import word_count
from xquant_fx.kernels.schemes import SCHEMES, wrap_of
from xquant_fx.kernels.widths import words_of


@dataclasses.dataclass(frozen=True, kw_only=True)
class Side:
    """What is fixed when such a kernel is compiled."""

    dtype: torch.dtype
    scale_dtype: torch.dtype
    heads: int
    dim: int
    append: str
    """Which step quantizes what is due: ``APPEND`` of the scheme."""
    bits: float
    group: int
    residual: int
    ring: int
    wrap: int
    """After how many tokens codes start over; 0: they do not."""
    sinks: int
    norms: bool
    """Whether tokens are divided by their norms."""

    @property
    def is_ranked(self) -> bool:
        """Whether channels have widths by rank."""
        return self.append == "ranked"

    @property
    def is_about_zero(self) -> bool:
        """Whether codes lie about zero, without zero points: those of rotated tokens."""
        return self.append in ("rotated", "folded")

    @property
    def numbers(self) -> dict[str, int]:
        """Constants of C++, by name."""
        return {
            "H": self.heads, "D": self.dim, "BITS": 8 if self.is_ranked else int(self.bits), "GROUP": self.group,
            "WORDS": words_of(self.bits, self.dim) if self.is_ranked else word_count(self.bits, self.dim),
            "WRAP": self.wrap, "RESIDUAL": self.residual, "SINKS": self.sinks,
        }  # fmt: skip

    @property
    def types(self) -> dict[str, torch.dtype]:
        """Types of C++, by name."""
        return {"T": self.dtype, "S": self.scale_dtype}

    @property
    def tables(self) -> str:
        """Where the codes are in their words, in C++."""
        return tables(self.append, self.bits, self.dim)

    @property
    def absent(self) -> set[str]:
        """The tensors that it has not."""
        has = {
            "sink": self.sinks > 0, "order": self.is_ranked, "center": self.is_ranked, "energy": self.is_ranked,
            "norm": self.norms, "zero": not self.is_about_zero,
        }  # fmt: skip
        return {name for name, there in has.items() if not there}


def fields_of_side(a: Any, sinks: int, sizes: Any = sizes_of, dtype: Any = dtype_of) -> dict[str, Any]:
    """The fields of a ``Side`` of the arguments of a store or a load; ``sizes`` and ``dtype`` read a tensor's."""
    _, heads, ring, dim = sizes(a.ring)
    wrap = wrap_of(a.scheme, tokens_of(a, sizes), a.max_len, dim, a.bits, a.group_size, a.residual_length)
    return dict(
        dtype=dtype(a.ring), scale_dtype=dtype(a.scale), heads=heads, dim=dim, append=SCHEMES[a.scheme].APPEND,
        bits=a.bits, group=a.group_size, residual=a.residual_length, ring=ring, wrap=wrap, sinks=sinks,
        norms=a.norm is not None,
    )  # fmt: skip


def tokens_of(a: Any, sizes: Any = sizes_of) -> int:
    """Tokens that the codes of a side have room for."""
    return SCHEMES[a.scheme].tokens_of(sizes(a.codes), sizes(a.scale))
