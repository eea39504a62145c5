"""Decode attention on CUDA: one op, ``xquant::triton_decode_attention``, over the kernels of ``triton_kernels``.

The op is a ``triton_op``: Inductor takes it apart and puts the kernels into the code it generates.
All launch parameters come from shapes and from what the GPU is, so they are fixed for a graph; how far the tokens go is
read on the device. Importing this module does not need Triton.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from xquant_fx.kernels.decode_attention.arguments import DecodeArguments
from xquant_fx.kernels.decode_attention.triton_interior_settings import interior_planes, why_no_interior
from xquant_fx.kernels.decode_attention.triton_settings import LEAST_TILE, ranks, settings
from xquant_fx.kernels.packing import WORD_BITS, high_and_low
from xquant_fx.kernels.rotation import rotated_size
from xquant_fx.kernels.schemes import wrap_of
from xquant_fx.kernels.triton_device import Device, device_of
from xquant_fx.kernels.triton_host import on_its_device, power_of_two

#: Tokens not written yet whose mask one program reads, beside ``interior_kernel``, at most.
TAIL_OF_PROGRAM = 8192


def why_not(a: DecodeArguments) -> str:
    """Why the kernels do not take these arguments, in words; "" if they do."""
    if not a.max_len:
        return "as many tokens are read as are written"
    if a.k_order is not None and a.k_group % LEAST_TILE:
        return f"ranked keys in groups of {a.k_group} tokens, which is no multiple of {LEAST_TILE}"
    return ""


def wraps(a: DecodeArguments) -> dict[str, int]:
    """After how many tokens codes of each side start over; 0: they do not."""
    k_dim, v_dim = a.q.shape[3], a.v_ring.shape[3]
    return dict(
        K_WRAP=wrap_of(a.k_scheme, a.k_codes.shape[3], a.max_len, k_dim, a.k_bits, a.k_group, a.k_residual),
        V_WRAP=wrap_of(a.v_scheme, a.v_scale.shape[3], a.max_len, v_dim, a.v_bits, a.v_group, a.v_residual),
    )


def dense_mask(mask: Tensor) -> Tensor:
    """``mask`` with one row for each that differs, contiguous, at an address that is a multiple of 4."""
    for dim in range(3):
        if mask.shape[dim] > 1 and mask.stride(dim) == 0:
            mask = mask.narrow(dim, 0, 1)
    mask = mask.contiguous()
    offset = mask.storage_offset() * mask.element_size()
    return mask if isinstance(offset, int) and offset % 4 == 0 else mask.clone()


def warps_of(a: DecodeArguments, hip: bool) -> int:
    """Warps of a program: more on NVIDIA where four have no registers for scales of every element, or for two of what
    takes many: ranked channels, two planes of codes, either in float32, wide heads, a chunk, logits added to or capped.
    """
    if hip:
        return 4
    ranked, wide = a.k_order is not None, max(a.q.shape[3], a.v_ring.shape[3]) > 128
    planes = (not ranked and high_and_low(a.k_bits)[1] > 0) or high_and_low(a.v_bits)[1] > 0
    added = a.softcap != 0 or (a.mask is not None and a.mask.dtype != torch.bool)
    in_float32 = a.q.dtype == torch.float32 and (ranked or planes)
    scales_of_elements = a.k_group % LEAST_TILE > 0 or (ranked and a.k_group < 2 * LEAST_TILE)
    return 8 if scales_of_elements or sum((ranked, planes, in_float32, wide, a.k_new is not None, added)) > 1 else 4


def edges_of(a: DecodeArguments, hip: bool) -> dict[str, int]:
    """What ``settings`` takes where ``interior_kernel`` runs: tokens remain after its tiles, sometimes before."""
    if why_no_interior(a, hip):
        return {}
    before = a.window > 0 or a.k_sink is not None
    return {"edges": 1 + before, "tails": 0 if a.mask is None else min(math.ceil(a.max_len / TAIL_OF_PROGRAM), 16)}


def needed(kernel: Any, constants: dict[str, Any]) -> dict[str, Any]:
    """Those of ``constants`` that ``kernel`` has."""
    return {name: value for name, value in constants.items() if name in kernel.arg_names}


def rotation_of(a: DecodeArguments) -> int:
    """``ROTATION`` of the values (triton_unpack.py)."""
    if a.v_zero is not None:
        return -1
    return rotated_size(a.v_ring.shape[3]).bit_length() - 1 if a.v_scheme == "per_token_rotated" else -2


def launch(
    a: DecodeArguments,
    *,
    wrap: Callable[[Any], Any],
    interpret: bool = False,
    hip: bool = torch.version.hip is not None,
    device: Device | None = None,
) -> Tensor:
    """Run the kernels; ``wrap`` is ``wrap_triton``, or nothing in the interpreter; ``device``: that of the tensors."""
    from xquant_fx.kernels.decode_attention.triton_interior import interior_kernel
    from xquant_fx.kernels.decode_attention.triton_kernels import combine_kernel, decode_kernel

    batch, heads, query, k_dim = a.q.shape
    kv_heads, v_dim = a.k_ring.shape[1], a.v_ring.shape[3]
    rows, ranked = heads // kv_heads * query, a.k_order is not None
    chosen = settings(
        batch=batch,
        kv_heads=kv_heads,
        rows=rows,
        k_dim=k_dim,
        v_dim=v_dim,
        max_len=min(a.max_len, a.window or a.max_len),  # what is read
        k_bits=a.k_bits,
        k_group=a.k_group,
        v_bits=int(a.v_bits),
        v_group=a.v_group,
        ranked=ranked,
        dtype=a.q.dtype,
        interpret=interpret,
        chunk=a.k_new is not None,
        hip=hip,
        warps=warps_of(a, hip),
        device=device or device_of(a.q.device),
        **edges_of(a, hip),
    )
    a = a.mapped(Tensor.contiguous, ("q", "k_new", "v_new")).mapped(dense_mask, ("mask",))
    mask_shape = (1, 1, 1) if a.mask is None else a.mask.shape[:3]
    parts = chosen.PARTS
    part = torch.empty((batch * heads * query, parts, v_dim), dtype=torch.float32, device=a.q.device)
    stats = torch.empty((batch * heads * query, parts, 2), dtype=torch.float32, device=a.q.device)
    out = torch.empty((batch, heads, query, v_dim), dtype=a.q.dtype, device=a.q.device)
    constants = dict(
        KV_HEADS=kv_heads,
        HEADS_PER_KV=heads // kv_heads,
        QUERY=query,
        NEW_TOKENS=a.new_tokens,
        PAST_STRIDE=a.past.stride(0) if a.past.shape[0] > 1 else 0,
        MAX_LEN=a.max_len,
        K_DIM=k_dim,
        K_BITS=int(a.k_bits),
        K_LOW=0 if ranked else high_and_low(a.k_bits)[1],
        K_WORDS=a.k_codes.shape[2],
        K_GROUP=a.k_group,
        K_TOKENS=a.k_codes.shape[3],
        K_GROUPS=a.k_scale.shape[2],
        K_RESIDUAL=a.k_residual,
        K_RING=a.k_ring.shape[2],
        V_DIM=v_dim,
        V_BITS=int(a.v_bits),
        V_LOW=high_and_low(a.v_bits)[1],
        V_GROUP=a.v_group,
        V_TOKENS=a.v_codes.shape[2] * WORD_BITS // int(a.v_bits),
        V_STRIDE=a.v_scale.shape[3],
        V_RESIDUAL=a.v_residual,
        V_RING=a.v_ring.shape[2],
        SINK_TOKENS=0 if a.k_sink is None else a.k_sink.shape[2] - 1,
        SCALE=a.scale,
        SOFTCAP=a.softcap,
        WINDOW=a.window,
        MASK_KIND="none" if a.mask is None else "bool" if a.mask.dtype == torch.bool else "float",
        MASK_BATCH=mask_shape[0],
        MASK_HEADS=mask_shape[1],
        MASK_QUERY=mask_shape[2],
        HAS_NEW=a.k_new is not None,
        ROTATION=rotation_of(a),
        **wraps(a),
        **ranks(a.k_bits, k_dim, ranked),
        **interior_planes(a.k_bits, k_dim, ranked),
        **dataclasses.asdict(chosen),
    )
    tensors = (*a.positional(without=("sink_logits",)), part, stats)
    interior = chosen.INTERIOR_SPLITS
    if interior:  # a grid may have 2**31 programs along its first dimension, 65,535 along the others
        wrap(interior_kernel)[(kv_heads * chosen.INTERIOR_BLOCKS, interior, batch)](
            *tensors, **needed(interior_kernel, constants), num_warps=1, num_stages=chosen.INTERIOR_STAGES
        )
    wrap(decode_kernel)[(kv_heads * chosen.ROW_BLOCKS, parts - interior, batch)](
        *tensors, **needed(decode_kernel, constants), num_warps=warps_of(a, hip)
    )
    wrap(combine_kernel)[(batch * heads * query,)](
        part,
        stats,
        a.sink_logits,
        out,
        HEADS=heads,
        QUERY=query,
        V_DIM=v_dim,
        PARTS=parts,
        PARTS_TILE=power_of_two(parts),
        PARTS_STEP=min(power_of_two(parts), 8),
        V_CHANNELS=power_of_two(v_dim),
        HAS_LOGITS=a.sink_logits is not None,
        num_warps=4,
    )
    return out


def _attend(*args: Any, **kwargs: Any) -> Tensor:
    a = DecodeArguments(*args, **kwargs)
    with on_its_device(a.q):
        return launch(a, wrap=torch.library.wrap_triton)


# triton_op ignores its parameter ``schema`` (torch 2.11 to 2.13; 2.14 heeds it) and infers one from the signature.
_attend.__signature__ = DecodeArguments.signature(returns=Tensor)  # type: ignore[attr-defined]

#: Attention of ``q`` [B, heads, q, D] over a quantized cache: [B, heads, q, v_dim]. Rows that see nothing are 0.
decode_attention = torch.library.triton_op("xquant::triton_decode_attention", _attend, mutates_args=())
