"""The static facts of one side (keys or values) of one layer: shapes of its stored tensors."""

from __future__ import annotations

import dataclasses

import torch

from xquant_fx.kernels.layout import STEP_TOKENS

WORD_BITS = 32


@dataclasses.dataclass(frozen=True, kw_only=True)
class KVSpec:
    """Everything about a quantized KV buffer that a compiled graph may rely on.

    Dynamo guards on equality of this object, so two caches that differ in any field never run
    each other's graphs, and two that agree share one.
    """

    side: str
    """"key" (quantized per channel) or "value" (quantized per token)."""
    layer: int
    """Number of the quantized attention layer, from 0 in layer order."""
    shape: tuple[int, int, int, int]
    """Logical shape [B, H, N, D]: batch, KV heads, max_cache_len in tokens, head_dim."""
    dtype: torch.dtype
    """dtype of the model's keys and values."""
    bits: int
    """Bits of a stored element; 16 means unquantized in ``dtype``."""
    group_size: int
    """Tokens (key) or channels (value) that share one scale and zero point."""
    residual_length: int
    """Tokens kept in full precision (R)."""
    eta: float
    """Relaxation of both ends of the range."""
    sink_tokens: int
    """First tokens of a sequence kept in full precision."""
    scale_dtype: torch.dtype
    """dtype of scales and zero points."""
    partner: int | None
    """Layer whose codes this one reads (upper layer of a sharing pair), else None."""
    fit: str
    """How a borrowing layer gets its scales: "least_squares" or "minmax"."""

    @property
    def borrowed(self) -> bool:
        """Whether the codes belong to the layer below."""
        return self.partner is not None

    @property
    def quantized(self) -> bool:
        """False for 16-bit storage."""
        return self.bits < 16

    @property
    def codes_per_word(self) -> int:
        """Codes in one int32 word."""
        return WORD_BITS // self.bits

    @property
    def ring_tokens(self) -> int:
        """Tokens the residual window can hold."""
        return self.residual_length + STEP_TOKENS

    @property
    def stored_tokens(self) -> int:
        """Tokens the code tensors have room for: N and some padding that is never read."""
        max_len = self.shape[2]
        if not self.quantized:
            return max_len
        unit = self.residual_length if self.side == "key" else self.codes_per_word
        # The CPU kernel loads whole vectors of channels, of the last row, too: 16 at most.
        spare = 1 if self.side == "key" else max(1, -(-16 // self.shape[3]))
        return ((max_len + unit - 1) // unit + spare) * unit

    def tensor_shapes(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Name to (shape, dtype) of the tensors this side owns; borrowed codes are left out."""
        batch, heads, _, dim = self.shape
        tokens = self.stored_tokens
        length: dict[str, tuple[tuple[int, ...], torch.dtype]] = {"length": ((2,), torch.int64)}
        if not self.quantized:
            return {"codes": ((batch, heads, tokens, dim), self.dtype), **length}
        per = self.codes_per_word
        if self.side == "key":
            codes = (batch, heads, (dim + per - 1) // per, tokens)
            scale = (batch, heads, tokens // self.group_size, dim)
        else:
            codes = (batch, heads, tokens // per, dim)
            scale = (batch, heads, dim // self.group_size, tokens)
        shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        if not self.borrowed:
            shapes["codes"] = (codes, torch.int32)
        shapes["scale"] = shapes["zero"] = (scale, self.scale_dtype)
        shapes["ring"] = ((batch, heads, self.ring_tokens, dim), self.dtype)
        if self.sink_tokens:
            # One row more than there are sinks: where the writes of later tokens go to be ignored.
            shapes["sink"] = ((batch, heads, self.sink_tokens + 1, dim), self.dtype)
        return {**shapes, **length}
