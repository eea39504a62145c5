"""Appending a decode step on CUDA: ops ``xquant::triton_append`` and ``xquant::triton_append_borrowed``.

They do what ``kernels/store.py`` does for steps of up to STEP_TOKENS tokens, in one launch of a kernel
of ``triton_append``, and leave alone what nobody reads: blocks of keys that are not complete, padding.
They are ``triton_op``s, so that Inductor puts the kernel into the code it generates. Importing this
module does not need Triton.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from xquant_fx.kernels.decode_attention.triton_launch import has_triton, power_of_two
from xquant_fx.kernels.layout import STEP_TOKENS


def applies(x: Tensor) -> bool:
    """Whether these ops can append ``x``: a step of known length on a GPU, where Triton is installed."""
    return x.device.type == "cuda" and isinstance(x.shape[2], int) and x.shape[2] <= STEP_TOKENS and has_triton()


def launch(
    x: Tensor, pos: Tensor, codes: Tensor, scale: Tensor, zero: Tensor, ring: Tensor, sink: Tensor | None,
    start: Tensor, length: Tensor, fault: Tensor, side: str, bits: int, group_size: int, residual_length: int,
    eta: float, sink_tokens: int, max_len: int, fit: str, wrap: Callable[[Any], Any],
) -> None:  # fmt: skip
    """Run the kernel of ``side``; ``fit`` is "own" or how scales are fitted to borrowed codes."""
    from xquant_fx.kernels.quantize_store.triton_kernels import append_keys_kernel, append_values_kernel

    batch, heads, new, dim = x.shape
    shared = dict(
        HEADS=heads, NEW_TOKENS=new, NEW_TILE=power_of_two(new), DIM=dim, RING=ring.shape[2], SINK_TOKENS=sink_tokens,
        RESIDUAL=residual_length, GROUP=group_size, BITS=bits, ETA=eta, FIT=fit, MAX_LEN=max_len,
        STEP_TOKENS=STEP_TOKENS, num_warps=4,
    )  # fmt: skip
    tensors = (x.contiguous(), pos, codes, scale, zero, ring, sink, start, length, fault)
    if side == "key":
        # As many blocks as the step may complete, and 32 channels, which are whole words at any bits.
        groups = math.ceil(new / residual_length) * (residual_length // group_size)
        wrap(append_keys_kernel)[(batch * heads, groups, math.ceil(dim / 32))](
            *tensors, **shared, TOKENS=codes.shape[3], GROUPS=scale.shape[2], CHUNK=32,
            TILE=min(power_of_two(group_size), 64),
        )  # fmt: skip
    else:
        wrap(append_values_kernel)[(batch * heads, dim // group_size)](
            *tensors, **shared, WORDS=codes.shape[2], STRIDE=scale.shape[3], CHUNK=power_of_two(group_size)
        )


@torch.library.triton_op(
    "xquant::triton_append", mutates_args=("codes", "scale", "zero", "ring", "sink", "length", "fault")
)
def append_own(
    x: Tensor, pos: Tensor, codes: Tensor, scale: Tensor, zero: Tensor, ring: Tensor, sink: Tensor | None,
    start: Tensor, length: Tensor, fault: Tensor, side: str, bits: int, group_size: int, residual_length: int,
    eta: float, sink_tokens: int, max_len: int,
) -> None:  # fmt: skip
    """Append to a layer that has codes of its own."""
    launch(
        x, pos, codes, scale, zero, ring, sink, start, length, fault, side, bits, group_size, residual_length, eta,
        sink_tokens, max_len, "own", torch.library.wrap_triton,
    )  # fmt: skip


@torch.library.triton_op(
    "xquant::triton_append_borrowed", mutates_args=("scale", "zero", "ring", "sink", "length", "fault")
)
def append_borrowed(
    x: Tensor, pos: Tensor, codes: Tensor, scale: Tensor, zero: Tensor, ring: Tensor, sink: Tensor | None,
    start: Tensor, length: Tensor, fault: Tensor, side: str, bits: int, group_size: int, residual_length: int,
    eta: float, sink_tokens: int, max_len: int, fit: str,
) -> None:  # fmt: skip
    """Append to a layer that fits scales to the codes of the one below."""
    launch(
        x, pos, codes, scale, zero, ring, sink, start, length, fault, side, bits, group_size, residual_length, eta,
        sink_tokens, max_len, fit, torch.library.wrap_triton,
    )  # fmt: skip


def append(
    x: Tensor, pos: Tensor, codes: Tensor, scale: Tensor, zero: Tensor, ring: Tensor, sink: Tensor | None,
    start: Tensor, length: Tensor, fault: Tensor, side: str, bits: int, group_size: int, residual_length: int,
    eta: float, sink_tokens: int, max_len: int, fit: str | None,
) -> None:  # fmt: skip
    """Append ``x`` [B, H, 1 to STEP_TOKENS, D] at ``pos``; the arguments are those of ``xquant::quantize_store``."""
    given = (x, pos, codes, scale, zero, ring, sink, start, length, fault, side, bits, group_size, residual_length, eta)
    if fit is None:
        append_own(*given, sink_tokens, max_len)
    else:
        append_borrowed(*given, sink_tokens, max_len, fit)
