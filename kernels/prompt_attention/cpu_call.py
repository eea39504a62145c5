"""The CPU kernel of a prompt's attention: where it is faster than torch's, and its call."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from xquant_fx.kernels.cpu.at_hand import built, why_none
from xquant_fx.kernels.prompt_attention.cpu_source import STRIDES, Problem, source
from xquant_fx.kernels.prompt_attention.seen import Seen, causal, seen_by
from xquant_fx.tracing import is_transformed, shown

#: Dtypes by instruction set: where it was measured to be faster. With AVX-512, of processors that multiply pairs of
#: bfloat16 numbers; where they multiply tiles (AMX), torch does so, too.
FASTER = {"avx512": (torch.bfloat16,), "avx2": (torch.bfloat16, torch.float32)}

#: Tokens from which on a prompt has the kernel, where it takes torch long enough to be worth one.
LONG_PROMPT = 256


@functools.cache
def faster_dtypes() -> tuple[torch.dtype, ...]:
    """The dtypes that the kernel is written for on this processor, as torch names it (privately: 2.11, 2.13)."""
    capability = torch.backends.cpu.get_cpu_capability().lower()
    has_pairs = torch.cpu._is_avx512_bf16_supported() and not torch.cpu._is_amx_tile_supported()
    return FASTER.get(capability, ()) if has_pairs or capability == "avx2" else ()


def attended(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor | None:
    """What ``scaled_dot_product_attention`` of these arguments is, by the kernel; None where torch's is to run.

    That is also so where flash attention is switched off (``torch.nn.attention.sdpa_kernel(SDPBackend.MATH)``).
    """
    if torch.compiler.is_compiling() or dropout_p or is_causal == (attn_mask is not None):
        return None
    if not _are_taken(query, key, value, enable_gqa) or not torch.backends.cuda.flash_sdp_enabled():
        return None
    if is_transformed(query, key.as_subclass(Tensor), value, attn_mask) or torch.is_autocast_enabled("cpu"):
        return None
    tokens = query.shape[2]
    if attn_mask is None and tokens != key.shape[2]:  # torch aligns such masks at the first token
        return None
    seen = causal(query.shape[0], tokens) if attn_mask is None else seen_by(attn_mask, query, key)
    if seen is None or not seen.tokens or why_none(source, Problem(dtype=query.dtype, dim=query.shape[3])):
        return None
    return attend(query, key[:, :, : seen.tokens], value[:, :, : seen.tokens], seen, scale)


def _are_taken(query: Tensor, key: Tensor, value: Tensor, grouped: bool) -> bool:
    """Whether many queries [B, heads, q, D], keys and values [B, KV heads, n, D] are of a dtype that gains."""
    tensors = (query, key, value)
    if not type(query) is type(value) is Tensor:  # others may have no memory of their own; keys are the caller's
        return False
    if query.dtype not in faster_dtypes() or any(x.dtype != query.dtype for x in tensors):
        return False
    if not all(x.dim() == 4 and x.device.type == "cpu" for x in tensors):
        return False
    (batch, heads, tokens, dim), (kv_heads, kept) = query.shape, key.shape[1:3]
    if tokens < LONG_PROMPT or dim % 32 or not key.shape == value.shape == (batch, kv_heads, kept, dim):
        return False
    return heads == kv_heads or (grouped and heads % kv_heads == 0)


def attend(query: Tensor, key: Tensor, value: Tensor, seen: Seen, scale: float | None = None) -> Tensor:
    """Attention [B, heads, q, D] of queries [B, heads, q, D] to keys and values [B, KV heads, n, D] that they see.

    All are bfloat16 or all float32. Scores and sums are in float32, weights are rounded to bfloat16 where pairs of such
    numbers are multiplied, the result is rounded once; it lies in memory as [B, q, heads, D], as torch's does. Who sees
    nothing gets zeros, as of torch. ``scale`` of scores: 1 / sqrt(D) if None.
    """
    (batch, heads, tokens, dim), kv_heads = query.shape, key.shape[1]
    out = query.new_empty(batch, tokens, heads, dim).transpose(1, 2)
    tensors = [*(x if x.stride(3) == 1 else x.contiguous() for x in (query, key, value)), out]
    strides = [x.stride(i) for x in tensors for i in range(len(STRIDES))]
    sizes = (batch, heads, kv_heads, tokens, key.shape[2])
    run = built(source, Problem(dtype=query.dtype, dim=dim))
    with shown("xquant::prompt_attention"):
        run(*tensors, seen.first, seen.end, *strides, *sizes, dim**-0.5 if scale is None else scale)
    return out
