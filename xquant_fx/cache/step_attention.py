"""Attention of uncompiled steps on a CPU: straight from the codes, where ``uncompiled.py`` has kernels run.

``scaled_dot_product_attention`` arrives at buffers of codes as the op that torch makes of it on a CPU. Private torch
APIs: that op and ``_fused_sdp_choice``. Checked on torch 2.11 and 2.13.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from xquant_fx import ops
from xquant_fx.cache.held_tokens import HeldTokens, attend_to_held
from xquant_fx.cache.reads import Dequantized
from xquant_fx.cache.state import KVState
from xquant_fx.cache.uncompiled import built, is_warm
from xquant_fx.kernels.decode_attention.arguments import of_sides
from xquant_fx.kernels.layout import STEP_TOKENS
from xquant_fx.plan.spec import why_not_fused
from xquant_fx.tracing import is_transformed


def sdp_choice(*args: Any, **kwargs: Any) -> Any:
    """Which SDPA kernel: that depends on shapes alone, and dequantizing for it would double the work."""
    args = tuple(
        torch.empty(a.shape, dtype=a.dtype, device=a.device) if isinstance(a, Dequantized) else a for a in args
    )
    return torch.ops.aten._fused_sdp_choice.default(*args, **kwargs)


def attend(
    q: Tensor,
    key: Tensor,
    value: Tensor,
    dropout: float = 0.0,
    is_causal: bool = False,
    *,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
) -> Any:
    """What ``scaled_dot_product_attention`` becomes on a CPU: the result, and what only a backward pass reads."""
    if dropout or is_causal or q.requires_grad:
        return NotImplemented
    ours, theirs = (x.first_tokens() if isinstance(x, Dequantized) else None for x in (key, value))
    if ours is not None and theirs is not None and ours[1] == theirs[1]:
        out = attention(q, ours[0], theirs[0], ours[1], attn_mask, scale)
        if out is not None:
            return out, q.new_empty(q.shape[:3], dtype=torch.float32)
    return attend_to_held(q, key, value, attn_mask, scale)


def attention(
    q: Tensor, key: KVState, value: KVState, tokens: int, mask: Tensor | None, scale: float | None
) -> Tensor | None:
    """Attention of ``q`` [B, heads, q, D] to the first ``tokens`` of a layer; None: it must read dequantized values.

    ``mask``: None, or added to the logits, [1 or B, 1 or heads, 1 or q, tokens]. Where one token was appended,
    transformers makes a query's heads of one KV head tokens of it: [B, KV heads, group, D] (``pack_gqa``).
    """
    step = _last_step(key, value)
    if step is None or not _takes(q, key) or not is_warm(key.group) or is_transformed(q, mask):
        return None
    (past, new), spec = step, key.spec
    heads, shape = spec.shape[1], q.shape
    if mask is not None and (mask.dim() != 4 or mask.shape[3] != tokens or not mask.is_floating_point()):
        return None
    if new == 1 and shape[1] == heads:
        q, mask = q.reshape(shape[0], -1, 1, shape[3]), _of_heads(mask, shape)
    if q.shape[2] != new or q.shape[1] % heads:
        return None
    arguments = dict(
        q=q, **of_sides(key.tensor, value.tensor), start=key.group.start, past=torch.tensor([past]),
        mask=_as_wide(mask, tokens, spec.shape[2]), sink_logits=None, new_tokens=new,
        **spec.decode_constants(value.spec), scale=q.shape[3] ** -0.5 if scale is None else scale, softcap=0.0,
    )  # fmt: skip
    out = built(lambda: ops.decode_attention(**arguments))
    if out is None:
        return None
    out = ops.ROTATE(out, True) if value.spec.folded else out
    return out.reshape(*shape[:3], -1)


def _last_step(key: KVState, value: KVState) -> tuple[int, int] | None:
    """Tokens before the last step, and of it, if a kernel may read what it left; else None."""
    ours, theirs = key.spec, value.spec
    if (ours.layer, ours.role, theirs.role) != (theirs.layer, "key", "value") or key.group is not value.group:
        return None
    if not (ours.quantized and theirs.quantized) or ours.ragged or ours.window or why_not_fused(ours, theirs):
        return None
    if key.behind is not None or value.behind is not None:
        return None
    steps = set()
    for chunk in (key._chunk(), value._chunk()):
        if chunk.x is not None or chunk.before:
            return None
        steps.add((chunk.past, chunk.new))
    past, new = steps.pop()
    return (past, new) if not steps and 1 <= new <= STEP_TOKENS else None


def _takes(q: Tensor, key: KVState) -> bool:
    batch, _, _, dim = key.spec.shape
    return q.dim() == 4 and (q.shape[0], q.shape[3], q.dtype) == (batch, dim, key.spec.dtype)


def _of_heads(mask: Tensor | None, shape: torch.Size) -> Tensor | None:
    """The mask of queries ``shape`` [B, KV heads, group, D] for [B, KV heads * group, 1, D]."""
    if mask is None or mask.shape[1] == mask.shape[2] == 1:
        return mask
    return mask.expand(-1, shape[1], shape[2], -1).reshape(mask.shape[0], -1, 1, mask.shape[3])


def _as_wide(mask: Tensor | None, tokens: int, width: int) -> Tensor | None:
    """The mask for all ``width`` tokens of a buffer, of which those from ``tokens`` on are not seen."""
    if mask is None:
        return None if tokens == width else (torch.arange(width) < tokens)[None, None, None]
    # Torch has made numbers of a mask of bools.
    return torch.nn.functional.pad(mask.to(torch.float32), (0, width - tokens), value=float("-inf"))


#: Op to what buffers of codes do where they are arguments of it; NotImplemented: they are read dequantized.
HANDLERS: dict[Any, Callable[..., Any]] = {
    torch.ops.aten._fused_sdp_choice.default: sdp_choice,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default: attend,
}
HeldTokens.handlers |= HANDLERS
