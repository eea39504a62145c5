"""``decode_attention``: attention straight from the codes, for people who write their own decode loop."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

from xquant_fx import ops
from xquant_fx.cache.kv_tensor import QuantizedKV
from xquant_fx.cache.state import KVState
from xquant_fx.errors import ArgumentError, CacheStateError
from xquant_fx.kernels.decode_attention.arguments import of_sides
from xquant_fx.kernels.layout import STEP_TOKENS
from xquant_fx.plan.spec import why_not_fused
from xquant_fx.tracing import not_traced


@not_traced("xquant_fx.decode_attention is a kernel already")
def decode_attention(
    q: Tensor,
    cache: Any,
    layer: int,
    *,
    mask: Tensor | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    window: int = 0,
    sink_logits: Tensor | None = None,
) -> Tensor:
    """Attention of the newest tokens' queries to layer ``layer`` of ``cache``, whose keys and values are stored.

    Append the step's keys and values first (``cache.update(k, v, layer)``), then call this. Inside a compiled
    function it is a graph break: there the pass makes the same kernel of an ordinary attention.

    Args:
        q: [B, Hq, q, D] with 1 to 8 tokens, the last ones stored; Hq is a multiple of the KV heads.
        cache: an ``XQuantCache``, or any cache whose buffers were taken over, or a (keys, values) pair of
            quantized buffers, whose rows may have lengths of their own.
        layer: index of the layer in the cache; ignored for a pair.
        mask: None (causal, left padding of the cache left out), bool (True may be attended to) or
            float (added to the logits), broadcastable to [B, Hq, q, N], N being max_cache_len (not 1).
        scale: of the logits; default 1 / sqrt(D).
        softcap: logits become ``softcap * tanh(logits / softcap)``; 0 is off.
        window: tokens a query sees, its own included; 0 is off. A layer with a sliding window shows no more than that.
        sink_logits: [Hq], one logit per head that joins the softmax without a value.

    Returns:
        [B, Hq, q, D of the values] in the dtype of ``q``.

    Raises:
        ArgumentError: an argument breaks its rule or does not fit the layer.
        CacheStateError: the layer is not quantized or not allocated yet, stores 16 bits, was rolled back
            too far to know the tokens before the query's, or ``q`` wants a gradient.
    """
    key, value = _states(cache, layer)
    _check(q, key, value)
    new, spec = q.shape[2], key.spec
    where = f"layer {spec.layer}: "
    scale = 1 / math.sqrt(q.shape[3]) if scale is None else float(scale)
    if not (0 <= softcap < math.inf and window >= 0 and math.isfinite(scale)):
        raise ArgumentError(
            where + f"scale must be finite, softcap and window 0 (off) or more, got {scale}, {softcap} and {window}"
        )
    for name, x in (("mask", mask), ("sink_logits", sink_logits)):
        if x is not None:
            _check_memory(name, x, key)
    if sink_logits is not None:
        sink_logits = _logits(sink_logits, q, where)
    past = _rows(key)[:, 0] - new
    fixed = spec.decode_constants(value.spec)
    if mask is None and new == 1 and _sees_all(key):
        fixed["max_len"] = 0  # as many as are written
    else:
        mask = _causal(key, past, new) if mask is None else _fitting(mask, (*q.shape[:3], spec.shape[2]), where)
    fixed["window"] = min((n for n in (window, spec.window) if n), default=0)
    out = ops.decode_attention(  # the op's body: this is never traced, and the op itself takes as long as a short step
        q=q,
        **of_sides(key.tensor, value.tensor),
        start=key.group.start,
        past=past,
        mask=mask,
        sink_logits=sink_logits,
        new_tokens=new,
        **fixed,
        scale=scale,
        softcap=softcap,
    )
    return ops.ROTATE(out, True) if value.spec.folded else out


def _states(cache: Any, layer: int) -> tuple[KVState, KVState]:
    if isinstance(cache, tuple | list) and len(cache) == 2:
        keys, values = cache
    else:
        layers = getattr(cache, "layers", ())
        if not -len(layers) <= layer < len(layers):
            raise ArgumentError(
                f"layer must be one of the cache's {len(layers)} layers, got {layer} of a {type(cache).__name__}"
            )
        keys, values = (getattr(layers[layer], name, None) for name in ("keys", "values"))
    if not (isinstance(keys, QuantizedKV) and isinstance(values, QuantizedKV)):
        raise CacheStateError(f"layer {layer} is not quantized, or not allocated yet (that happens at its first step)")
    key, value = keys.live, values.live
    if (key.spec.role, value.spec.role) != ("key", "value"):
        raise ArgumentError(f"a pair must be (keys, values), got ({key.spec.role}s, {value.spec.role}s)")
    return key, value


def _check(q: Tensor, key: KVState, value: KVState) -> None:
    where, (batch, heads, _, dim) = f"layer {key.spec.layer}: ", key.spec.shape
    if _placed(key) != _placed(value):
        raise ArgumentError(where + f"a pair must be of one cache, got keys {_placed(key)} and values {_placed(value)}")
    if not (key.spec.quantized and value.spec.quantized):
        raise CacheStateError(where + "16-bit storage has no codes to attend to; use scaled_dot_product_attention")
    if reason := why_not_fused(key.spec, value.spec):
        raise CacheStateError(where + f"no kernel attends to such a layer: {reason}")
    fits = q.dim() == 4 and q.shape[0] == batch and q.shape[1] and q.shape[1] % heads == 0 and q.shape[3] == dim
    if not fits or q.dtype != key.spec.dtype:
        raise ArgumentError(
            where + f"q must have shape [{batch}, multiple of {heads}, q, {dim}] and dtype {key.spec.dtype}, "
            f"got {tuple(q.shape)} and {q.dtype}"
        )
    _check_memory("q", q, key)
    rows = list(zip(_rows(key).tolist(), _rows(value).tolist(), strict=True))
    stored = min(keys for (keys, _), _ in rows)
    if not 1 <= q.shape[2] <= min(STEP_TOKENS, stored):
        error = CacheStateError if 1 <= q.shape[2] <= STEP_TOKENS else ArgumentError
        raise error(where + f"q must have 1 to {STEP_TOKENS} stored tokens, got {q.shape[2]} of {stored}")
    for row, ((keys, _), (values, _)) in enumerate(rows):
        if keys != values:
            of_row = f"row {row}: " if len(rows) > 1 else ""
            raise CacheStateError(where + f"{of_row}{keys} keys and {values} values are stored")
    lost = max(max(most_keys, most_values) - keys for (keys, most_keys), (_, most_values) in rows) + q.shape[2]
    if lost > key.spec.rollback_tokens:
        raise CacheStateError(
            where
            + "after a rollback the query and the tokens taken back must be at most rollback_tokens of the config, "
            f"{key.spec.rollback_tokens}, got {lost}: "
            "older ones are quantized already"
        )
    if (torch.is_grad_enabled() and q.requires_grad) or unpack_dual(q).tangent is not None:
        raise CacheStateError(
            where + "a quantized KV cache has no gradient; call this under torch.no_grad() or torch.inference_mode()"
        )


def _placed(state: KVState) -> tuple[list[int], str, str]:
    """Batch, heads and tokens of a side, how its rows grow, and where it is: what both sides of a layer share."""
    spec = state.spec
    return list(spec.shape[:3]), "row by row" if spec.ragged else "together", str(state.group.start.device)


def _check_memory(name: str, x: Tensor, state: KVState) -> None:
    """Raise ArgumentError unless ``x`` is dense and where the cache is: kernels take addresses, and cannot tell."""
    where, device = f"layer {state.spec.layer}: ", state.group.start.device
    if x.device != device:
        raise ArgumentError(where + f"this cache is on {device}, {name} on {x.device}")
    if x.layout != torch.strided:
        raise ArgumentError(where + f"{name} must be dense, got {x.layout}")


def _rows(state: KVState) -> Tensor:
    """Tokens stored, and stored at most since the sequence began: int64 [1, 2], or [B, 2] where rows differ."""
    return state.owned["length"].reshape(-1, 2)


def _sees_all(state: KVState) -> bool:
    """Whether the last token sees all that is written, where asking does not wait for a device."""
    start = state.group.start
    return start.device.type == "cpu" and not state.spec.window and not bool(start.any())


def _causal(state: KVState, past: Tensor, new: int) -> Tensor:
    """Bool [B or 1, 1, q, N]: tokens up to the query's own, without left padding."""
    tokens = torch.arange(state.spec.shape[2], device=past.device)
    seen = tokens <= past[:, None, None] + torch.arange(new, device=past.device)[:, None]
    return (seen & (tokens >= state.group.start[:, None, None]))[:, None]


def _fitting(mask: Tensor, shape: tuple[int, ...], where: str) -> Tensor:
    """The mask with four dimensions, in a dtype that the kernels take."""
    full = (1,) * (4 - mask.dim()) + tuple(mask.shape)
    fits = len(full) == 4 and full[3] == shape[3] and all(a in (1, b) for a, b in zip(full, shape, strict=True))
    if not fits or not (mask.dtype == torch.bool or mask.dtype.is_floating_point):
        raise ArgumentError(
            where + f"the mask must be bool or float and broadcast to {list(shape)} (its last dimension that long), "
            f"got {tuple(mask.shape)} of {mask.dtype}"
        )
    mask = mask if mask.dim() == 4 else mask.reshape(full)
    return mask if mask.dtype in (torch.bool, torch.float32) else mask.to(torch.float32)


def _logits(sink_logits: Tensor, q: Tensor, where: str) -> Tensor:
    if tuple(sink_logits.shape) != (q.shape[1],):
        raise ArgumentError(where + f"sink_logits must have shape [{q.shape[1]}], got {tuple(sink_logits.shape)}")
    return sink_logits.to(torch.float32)
