"""Attention of uncompiled steps and chunks on a CPU: straight from the codes, where kernels are to run.

Of steps that is so where ``uncompiled.py`` says so; of chunks of more tokens where the model is compiled, if they are
too few for the kernel of prompts (``prompt_attention.py``), which reads dequantized numbers.

``scaled_dot_product_attention`` arrives at buffers of codes as the op that torch makes of it on a CPU. Private torch
APIs: that op and ``_fused_sdp_choice``. Checked on torch 2.11 and 2.13.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from xquant_fx import ops
from xquant_fx.cache.group import Chunk
from xquant_fx.cache.held_tokens import Held, HeldTokens, attend_to_held, held_of, mask_of_held
from xquant_fx.cache.prompt_attention import may_be_attended
from xquant_fx.cache.reads import Dequantized
from xquant_fx.cache.state import KVState
from xquant_fx.cache.uncompiled import built, is_warm
from xquant_fx.kernels.cpu.at_hand import are_wanted
from xquant_fx.kernels.decode_attention.arguments import DecodeArguments, of_sides
from xquant_fx.kernels.decode_attention.cpu_call import attend_chunk
from xquant_fx.kernels.layout import STEP_TOKENS
from xquant_fx.kernels.prompt_attention.cpu_call import attended
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
    if dropout or is_causal or q.requires_grad or is_transformed(q, attn_mask):
        return NotImplemented
    ours, theirs = held_of(key), held_of(value)
    if ours is None or theirs is None or (ours.tokens, *ours[1:]) != (theirs.tokens, *theirs[1:]):
        return NotImplemented
    out = attention(q, ours, theirs, attn_mask, scale)
    if out is not None:
        return out, q.new_empty(q.shape[:3], dtype=torch.float32)
    return attend_to_held(q, ours, theirs, attn_mask, scale)


def attend_in_one(
    q: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """``scaled_dot_product_attention`` itself, which inference mode does not take apart."""
    if q.device.type != "cpu" or enable_gqa or not torch.backends.cuda.flash_sdp_enabled():  # a switch for CPUs, too
        return NotImplemented
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=q.dtype).masked_fill_(~attn_mask, float("-inf"))
    if attn_mask is not None and attn_mask.dim() == 2:
        attn_mask = attn_mask[None, None]
    out = attend(q, key, value, dropout, is_causal, attn_mask=attn_mask, scale=scale)
    return out if out is NotImplemented else out[0]


def attention(q: Tensor, key: Held, value: Held, mask: Tensor | None, scale: float | None) -> Tensor | None:
    """Attention of ``q`` [B, heads, q, D] to a layer's tokens; None: it must read dequantized values.

    ``mask``: None, or added to the logits, [1 or B, 1 or heads, 1 or q, room].
    """
    written = None if key.is_read or value.is_read else _last_write(key.state, value.state)
    if written is None or not _takes(q, key.state) or key.tokens != written[0].past + written[0].new:
        return None
    scale = q.shape[3] ** -0.5 if scale is None else scale
    of_chunk = written[0].x is not None
    return (_of_chunk if of_chunk else _of_step)(q, key, value, written, mask, scale)


def _of_step(
    q: Tensor, key: Held, value: Held, written: tuple[Chunk, Chunk], mask: Tensor | None, scale: float
) -> Tensor | None:
    """Where one token was appended, transformers makes a query's heads of one KV head tokens of it: [B, KV heads,
    group, D] (``pack_gqa``)."""
    spec, new = key.state.spec, written[0].new
    heads, shape = spec.shape[1], q.shape
    if not 1 <= new <= STEP_TOKENS or not is_warm(key.state.group):
        return None
    if mask is not None and (mask.dim() != 4 or mask.shape[3] != key.room or not mask.is_floating_point()):
        return None
    if new == 1 and shape[1] == heads and key.times == 1:
        q, mask = q.reshape(shape[0], -1, 1, shape[3]), _of_heads(mask, shape)
    if q.shape[2] != new or q.shape[1] % heads:
        return None
    arguments = _arguments(q, key.state, value.state, written, _as_wide(mask, key.room, spec.shape[2]), scale)
    out = built(lambda: ops.decode_attention(**arguments))
    return None if out is None else _of_values(out, value.state).reshape(*shape[:3], -1)


def _of_chunk(
    q: Tensor, key: Held, value: Held, written: tuple[Chunk, Chunk], mask: Tensor | None, scale: float
) -> Tensor | None:
    """Keys and values of the chunk itself are seen in full precision."""
    (ours, theirs), heads = written, key.state.spec.shape[1]
    if ours.x is None or theirs.x is None or not ours.past or not are_wanted():
        return None
    if q.shape[2] != ours.new or q.shape[1] % heads:
        return None
    if (seen := mask_of_held(mask, key)) is None:
        return None
    if may_be_attended(q):
        return _as_prompt(q, key, value, seen, scale)
    arguments = _arguments(q, key.state, value.state, written, seen, scale)
    new = {"k_new": key.state.as_stored(ours.x), "v_new": value.state.as_stored(theirs.x)}
    out = attend_chunk(DecodeArguments(**arguments | new | {"max_len": key.tokens}))
    return None if out is None else _of_values(out, value.state)


def _of_values(out: Tensor, value: KVState) -> Tensor:
    """What a kernel made of stored values, which may be rotated, as one of values."""
    return ops.ROTATE(out, True) if value.spec.folded else out


def _as_prompt(q: Tensor, key: Held, value: Held, mask: Tensor, scale: float) -> Tensor | None:
    """By the kernel of prompts, under a mask that shows a token or hides it."""
    shown = mask == 0
    if not bool((shown | (mask == float("-inf"))).all()):
        return None
    return attended(q, key.reading.read(), value.reading.read(), shown, scale=scale, enable_gqa=True)


def _arguments(
    q: Tensor, key: KVState, value: KVState, written: tuple[Chunk, Chunk], mask: Tensor | None, scale: float
) -> dict[str, Any]:
    sides = of_sides(*(partial(side.tensor_before, one) for side, one in zip((key, value), written, strict=True)))
    return dict(
        q=q, **sides, start=key.group.start, past=torch.tensor([written[0].past]), mask=mask, sink_logits=None,
        new_tokens=written[0].new, **key.spec.decode_constants(value.spec), scale=scale, softcap=0.0,
    )  # fmt: skip


def _last_write(key: KVState, value: KVState) -> tuple[Chunk, Chunk] | None:
    """The last step or chunk, of keys and values, if a kernel may read what it left; else None."""
    ours, theirs = key.spec, value.spec
    if (ours.layer, ours.role, theirs.role) != (theirs.layer, "key", "value") or key.group is not value.group:
        return None
    if not (ours.quantized and theirs.quantized) or ours.window or why_not_fused(ours, theirs):
        return None
    written = key.last_write(), value.last_write()
    alike = {(chunk.past, chunk.new, chunk.x is None) for chunk in written}
    return written if len(alike) == 1 else None


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
    torch.ops.aten.scaled_dot_product_attention.default: attend_in_one,
}
HeldTokens.handlers |= HANDLERS
