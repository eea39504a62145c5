"""Decode attention, whichever way a device does it: arguments, the CPU kernel's call, and plain torch.

``Arguments`` names what ``xquant::decode_attention`` takes, in its order.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from xquant_fx.kernels.cpu.source import dtype_of, sizes_of
from xquant_fx.kernels.decode_attention.cpu_source import Problem, source
from xquant_fx.kernels.shared_code_load.plain_torch import load


class Arguments(NamedTuple):
    """Arguments of ``xquant::decode_attention``; see ``KVSpec`` for the shapes of stored tensors."""

    q: Tensor
    k_codes: Tensor
    k_scale: Tensor
    k_zero: Tensor
    k_ring: Tensor
    k_sink: Tensor | None
    v_codes: Tensor
    v_scale: Tensor
    v_zero: Tensor
    v_ring: Tensor
    v_sink: Tensor | None
    start: Tensor
    past: Tensor
    mask: Tensor | None
    sink_logits: Tensor | None
    new_tokens: int
    max_len: int
    k_bits: int
    k_group: int
    v_bits: int
    v_group: int
    residual_length: int
    scale: float
    softcap: float
    window: int
    k_new: Tensor | None = None
    v_new: Tensor | None = None

    @property
    def present(self) -> dict[str, Tensor]:
        """The tensors that are there, by name, in order."""
        names = (*self._fields[:15], "k_new", "v_new")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}


def empty_output(*args: Any) -> Tensor:
    """An uninitialised result [B, Hq, q, Dv]."""
    a = Arguments(*args)
    return a.q.new_empty((*a.q.shape[:3], a.v_ring.shape[3]))


def problem_of(a: Arguments, sizes: Any = sizes_of, dtype: Any = dtype_of) -> Problem:
    """The CPU kernel for these arguments; ``sizes`` and ``dtype`` read a tensor's shape and dtype."""
    batch, query_heads, queries, k_dim = sizes(a.q)
    mask_strides = (0, 0, 0)
    if a.mask is not None:
        b, h, q, n = sizes(a.mask)
        mask_strides = (h * q * n if b > 1 else 0, q * n if h > 1 else 0, n if q > 1 else 0)
    return Problem(
        dtype=dtype(a.q), scale_dtype=dtype(a.k_scale), batch=batch, heads=sizes(a.k_ring)[1], query_heads=query_heads,
        queries=queries, k_dim=k_dim, v_dim=sizes(a.v_ring)[3], max_len=a.max_len, k_bits=a.k_bits, k_group=a.k_group,
        k_tokens=sizes(a.k_codes)[3], v_bits=a.v_bits, v_group=a.v_group, v_tokens=sizes(a.v_scale)[3],
        residual=a.residual_length, ring=sizes(a.k_ring)[2],
        sinks=sizes(a.k_sink)[2] - 1 if a.k_sink is not None else 0,
        scale=a.scale, softcap=a.softcap, window=a.window, mask_dtype=dtype(a.mask) if a.mask is not None else None,
        mask_strides=mask_strides, sink_logits_dtype=dtype(a.sink_logits) if a.sink_logits is not None else None,
        chunk=a.k_new is not None,
    )  # fmt: skip


def run_cpu(*args: Any) -> Tensor:
    """Compile the kernel for this problem, or take it from the cache, and run it."""
    # Imported here: it brings in Inductor's compiler.
    from xquant_fx.kernels.cpu import build as cpu_build

    a = Arguments(*args)
    tensors = {name: t.contiguous() for name, t in a.present.items()}
    types, code = source(problem_of(a), cpu_build.isa())
    out = a.q.new_empty((*a.q.shape[:3], a.v_ring.shape[3]))
    cpu_build.load(types, code)(*tensors.values(), out)
    return out


def dequantized(*args: Any) -> Tensor:
    """The same in plain torch, on dequantized keys and values: for devices without a kernel."""
    a = Arguments(*args)
    sides = []
    for side, codes, scale, zero, ring, sink, bits, group, new in (
        ("key", a.k_codes, a.k_scale, a.k_zero, a.k_ring, a.k_sink, a.k_bits, a.k_group, a.k_new),
        ("value", a.v_codes, a.v_scale, a.v_zero, a.v_ring, a.v_sink, a.v_bits, a.v_group, a.v_new),
    ):
        where = (a.start, a.past, a.new_tokens, a.max_len)
        x = load(codes, scale, zero, ring, sink, *where, side, bits, group, a.residual_length, new)
        sides.append(x.repeat_interleave(a.q.shape[1] // x.shape[1], 1))
    keys, values = sides
    logits = (a.q @ keys.transpose(2, 3)).to(torch.float32) * a.scale
    if a.softcap:
        logits = a.softcap * torch.tanh(logits / a.softcap)
    if a.mask is not None and a.mask.dtype == torch.bool:
        logits = logits.masked_fill(~a.mask, -torch.inf)
    elif a.mask is not None:
        logits = logits + a.mask
    if a.window:
        tokens = torch.arange(a.max_len, device=a.q.device)
        last = a.past + torch.arange(a.q.shape[2], device=a.q.device)
        logits = logits.masked_fill(tokens <= last[:, None] - a.window, -torch.inf)
    if a.sink_logits is not None:
        extra = a.sink_logits.to(torch.float32)[:, None, None].expand(*logits.shape[:3], 1)
        logits = torch.cat([logits, extra], -1)
    nothing = (logits == -torch.inf).all(-1, keepdim=True)  # rows that may attend to nothing give 0
    weights = torch.where(nothing, 0.0, torch.softmax(logits, -1))[..., : a.max_len]
    return weights.to(values.dtype) @ values
