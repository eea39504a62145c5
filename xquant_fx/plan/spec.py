"""The static facts of one side (keys or values) of one layer: shapes of its stored tensors."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Literal

import torch

from xquant_fx.kernels.decode_attention.arguments import why_not_fused as why_no_kernel
from xquant_fx.kernels.layout import STEP_TOKENS, WORD_TOKENS
from xquant_fx.kernels.schemes import SCHEMES
from xquant_fx.kernels.schemes.per_token_folded import NAME as FOLDED

Role = Literal["key", "value"]
#: Types of keys and values that can be quantized.
STORABLE = frozenset({torch.float32, torch.bfloat16, torch.float16})


@dataclasses.dataclass(frozen=True, kw_only=True)
class KVSpec:
    """Everything about a quantized KV buffer that a compiled graph may rely on.

    Dynamo guards on equality of this object, so two caches that differ in any field never run
    each other's graphs, and two that agree share one.
    """

    role: Role
    """What attention uses it for: for people and for the config, never for layout or kernels."""
    scheme: str
    """How it is quantized: a name of ``kernels.schemes.SCHEMES``."""
    layer: int
    """Number of the quantized attention layer, from 0 in layer order."""
    shape: tuple[int, int, int, int]
    """Logical shape [B, H, N, D]: batch, KV heads, max_cache_len in tokens, head_dim."""
    dtype: torch.dtype
    """dtype of the model's keys and values."""
    bits: float
    """Bits of a stored element, an average where widths are mixed; 16 means unquantized in ``dtype``."""
    group_size: int
    """Tokens (per channel) or channels (per token) that share one scale and zero point."""
    residual_length: int
    """Tokens kept in full precision (R)."""
    eta: float
    """Relaxation of both ends of the range."""
    sink_tokens: int
    """First tokens of a sequence kept in full precision."""
    rollback_tokens: int = STEP_TOKENS
    """Latest tokens that can be taken back exactly: room in the window beyond ``residual_length``."""
    scale_dtype: torch.dtype
    """dtype of scales and zero points; uint8: 8-bit floats (``kernels/small_floats.py``)."""
    partner: int | None
    """Layer whose codes this one reads (upper layer of a sharing pair), else None."""
    window: int = 0
    """Tokens that a query sees, its own included (a sliding window); 0: all. Older ones are not kept."""
    token_norms: bool = False
    """Whether a token is divided by its norm over all heads before it is quantized."""
    ragged: bool = False
    """Whether each row of the batch has a length of its own, and is appended to at positions of its own."""
    any_room: bool = False
    """Whether a cache may have room for less than N tokens, and graphs are told at each call for how many."""
    fit: str
    """How a borrowing layer gets its scales: "least_squares" or "minmax"."""
    reason: str = dataclasses.field(default="", compare=False, repr=False)
    """Why it reads its own codes, or that it borrows, for people: graphs do not rely on it."""

    def __deepcopy__(self, memo: object) -> KVSpec:
        """Itself, as it never changes: Dynamo's guards keep a deep copy, and compare it in each step."""
        return self

    def with_room(self, tokens: int) -> KVSpec:
        """The same for ``tokens`` tokens (N)."""
        batch, heads, _, dim = self.shape
        return dataclasses.replace(self, shape=(batch, heads, tokens, dim))

    @property
    def borrowed(self) -> bool:
        """Whether the codes belong to the layer below."""
        return self.partner is not None

    @property
    def quantized(self) -> bool:
        """False for 16-bit storage."""
        return self.bits < 16

    @property
    def folded(self) -> bool:
        """Whether tokens are stored rotated, in window and sinks, too, so that attention's output is rotated."""
        return self.quantized and self.scheme == FOLDED

    @property
    def ring_tokens(self) -> int:
        """Tokens the residual window can hold."""
        return self.residual_length + self.rollback_tokens

    @property
    def stored_tokens(self) -> int:
        """Tokens the code tensors have room for: N and some padding that is never read."""
        kept, dim = self._kept_tokens, self.shape[3]
        if not self.quantized:
            return kept
        return SCHEMES[self.scheme].stored_tokens(kept, dim, self.bits, self.group_size, self.residual_length)

    @property
    def _kept_tokens(self) -> int:
        """Tokens that have a slot of their own: N, or as many as a window may read after the furthest rollback."""
        max_len, reach = self.shape[2], self.window + self.rollback_tokens
        if not 0 < self.window < max_len:
            return max_len
        if self.quantized:
            of_scheme = SCHEMES[self.scheme].window_tokens
            reach = of_scheme(reach + WORD_TOKENS - 1, self.group_size, self.residual_length)
        return min(max_len, reach)

    @property
    def full_tokens(self) -> int:
        """Tokens that the buffer would hold in full precision."""
        return min(self.window or self.shape[2], self.shape[2])

    @property
    def wraps(self) -> bool:
        """Whether what is stored starts over: later tokens overwrite those that have left the window."""
        return self._kept_tokens < self.shape[2]

    @property
    def overwritten(self) -> tuple[str, ...]:
        """The stored tensors of which a chunk of more than STEP_TOKENS may overwrite what its own queries see."""
        if not self.wraps:
            return ("ring",) if self.quantized else ()
        return tuple(name for name in ("codes", "scale", "zero", "norm", "ring") if name in self.tensor_shapes())

    @property
    def full_bytes(self) -> int:
        """Bytes of the same in full precision."""
        batch, heads, _, dim = self.shape
        return batch * heads * self.full_tokens * dim * self.dtype.itemsize

    @property
    def stored_bytes(self) -> int:
        """Bytes of all tensors that the buffer owns."""
        return sum(math.prod(shape) * dtype.itemsize for shape, dtype in self.tensor_shapes().values())

    @property
    def is_exact_back(self) -> bool:
        """Whether any number of tokens can be taken back: none is quantized and none overwritten."""
        return not self.quantized and not self.wraps

    def why_not(self, x: torch.Tensor) -> str:
        """Why ``x`` [B, H, q, D] cannot be tokens of this buffer, in words; "" if it can."""
        reason = why_not_tokens(x, self.shape, self.dtype)
        return f"layer {self.layer} {self.role}s: {reason}" if reason else ""

    def load_constants(self) -> dict[str, Any]:
        """What ``xquant::shared_code_load`` takes besides tensors and lengths."""
        seen = self.window if self.wraps and not self.quantized else self.residual_length
        return dict(
            scheme=self.scheme, bits=self.bits, group_size=self.group_size, residual_length=seen, max_len=self.shape[2]
        )

    def store_constants(self) -> dict[str, Any]:
        """What ``xquant::quantize_store`` takes besides tensors (and ``fit``, where codes are borrowed)."""
        return {**self.load_constants(), "eta": self.eta, "sink_tokens": self.sink_tokens}

    def decode_constants(self, value: KVSpec) -> dict[str, Any]:
        """What ``xquant::decode_attention`` takes besides tensors and what the attention says; ``self`` is the keys'.

        Only where :func:`why_not_fused` gives no reason: both sides then agree in what it takes once.
        """
        return dict(
            max_len=self.shape[2], window=self.window,
            k_scheme=self.scheme, k_bits=self.bits, k_group=self.group_size, k_residual=self.residual_length,
            v_scheme=value.scheme, v_bits=value.bits, v_group=value.group_size, v_residual=value.residual_length,
        )  # fmt: skip

    def tensor_shapes(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Name to (shape, dtype) of the tensors this side owns; borrowed codes are left out."""
        batch, heads, _, dim = self.shape
        tokens = self.stored_tokens
        length: dict[str, tuple[tuple[int, ...], torch.dtype]]
        length = {"length": ((batch, 2) if self.ragged else (2,), torch.int64)}
        if not self.quantized:
            return {"codes": ((batch, heads, tokens, dim), self.dtype), **length}
        of_scheme = SCHEMES[self.scheme].shapes(tokens, dim, self.bits, self.group_size, self.scale_dtype)
        shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            name: ((batch, heads, *shape), dtype)
            for name, (shape, dtype) in of_scheme.items()
            if not (name == "codes" and self.borrowed)
        }
        if self.token_norms:
            shapes["norm"] = ((batch, tokens), torch.uint8)
        shapes["ring"] = ((batch, heads, self.ring_tokens, dim), self.dtype)
        if self.sink_tokens:
            # One row more than there are sinks: where the writes of later tokens go to be ignored.
            shapes["sink"] = ((batch, heads, self.sink_tokens + 1, dim), self.dtype)
        return {**shapes, **length}


def why_not_tokens(x: torch.Tensor, shape: Sequence[int], dtype: torch.dtype) -> str:
    """Why ``x`` [B, H, q, D] cannot be tokens of a buffer of ``shape`` [B, H, N, D] and ``dtype``, or ""."""
    batch, heads, _, dim = shape
    if x.dim() != 4 or (x.shape[1], x.shape[3]) != (heads, dim):
        return f"this cache is for [{batch}, {heads}, tokens, {dim}], the step has {list(x.shape)}"
    if x.shape[0] != batch:
        return (
            f"this cache holds {batch} row{'s' if batch > 1 else ''}, the step has {x.shape[0]}: make a cache for "
            f"{x.shape[0]}, or reset() an XQuantCache and give the prompts again"
        )
    if x.dtype != dtype and not torch.is_autocast_enabled(x.device.type):
        return (
            f"this cache holds {dtype}, the step has {x.dtype}: make the cache after the model's dtype was changed, or "
            "reset() an XQuantCache and give the prompt again"
        )
    return ""


def why_not_fused(key: KVSpec, value: KVSpec) -> str:
    """Why no kernel attends to keys and values that are stored so, in words; "" if one does."""
    reason = why_no_kernel(key.scheme, key.bits, value.scheme, value.bits)
    if reason:
        return reason
    for name in ("sink_tokens", "rollback_tokens", "scale_dtype", "window"):
        ours, theirs = getattr(key, name), getattr(value, name)
        if ours != theirs:
            return f"keys and values differ in {name}: {ours} and {theirs}"
    return ""
