"""Appending a decode step on CUDA: ops ``xquant::triton_append`` and ``xquant::triton_append_borrowed``.

They do what ``plain_torch.py`` does for steps of up to STEP_TOKENS tokens, in one launch of a kernel
of ``triton_kernels``, and leave alone what nobody reads: blocks of keys that are not complete, padding.
They are ``triton_op``s, so that Inductor puts the kernel into the code it generates. Importing this
module does not need Triton.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from xquant_fx.kernels.arguments import Overload
from xquant_fx.kernels.packing import high_and_low
from xquant_fx.kernels.quantize_store.arguments import BORROWED, OWN, StoreArguments
from xquant_fx.kernels.rotation import rotated_size
from xquant_fx.kernels.schemes import SCHEMES, wrap_of
from xquant_fx.kernels.schemes.per_token_rotated import GAUSSIAN_STEP
from xquant_fx.kernels.triton_host import power_of_two, rank_counts

#: Tensors of ranked keys alone.
RANKS = ("order", "center", "energy", "norm")
#: Channels that one program has registers for.
MOST_CHANNELS = 256


def why_not(a: StoreArguments) -> str:
    """Why the kernels do not take these arguments, in words; "" if they do."""
    if SCHEMES[a.scheme].APPEND == "ranked" and a.x.shape[3] > MOST_CHANNELS:
        return f"channels are ranked up to head_dim {MOST_CHANNELS}"
    tokens = SCHEMES[a.scheme].tokens_of(a.codes.shape, a.quantized.scale.shape)
    if wrap_of(a.scheme, tokens, a.max_len, a.x.shape[3], a.bits, a.group_size, a.residual_length):
        return "codes of a sliding window, which start over"
    return ""


def uniform(a: StoreArguments) -> dict[str, Any]:
    """Constants of both kernels of ``triton_kernels``."""
    return dict(BITS=int(a.bits), LOW=high_and_low(a.bits)[1], ETA=a.eta, FIT=a.fit or "own")


def blocks(a: StoreArguments) -> tuple[tuple[int, ...], dict[str, Any]]:
    """Grid and constants of ``append_keys_kernel``."""
    batch, heads, new, dim = a.x.shape
    # As many blocks as the step may complete, and 32 channels, which are whole words at any bits.
    groups = math.ceil(new / a.residual_length) * (a.residual_length // a.group_size)
    return (batch * heads, groups, math.ceil(dim / 32)), dict(
        **uniform(a), TOKENS=a.codes.shape[3], GROUPS=a.quantized.scale.shape[2], CHUNK=32,
        TILE=min(power_of_two(a.group_size), 64),
    )  # fmt: skip


def tokens(a: StoreArguments) -> tuple[tuple[int, ...], dict[str, Any]]:
    """Grid and constants of ``append_values_kernel``."""
    batch, heads, _, dim = a.x.shape
    return (batch * heads, dim // a.group_size), dict(
        **uniform(a), WORDS=a.codes.shape[2], STRIDE=a.quantized.scale.shape[3], CHUNK=power_of_two(a.group_size)
    )


def ranked(a: StoreArguments) -> tuple[tuple[int, ...], dict[str, Any]]:
    """Grid and constants of ``append_ranked_kernel``."""
    batch, heads, _, dim = a.x.shape
    channels = power_of_two(dim)
    return (batch * heads,), dict(
        TOKENS=a.codes.shape[3], GROUPS=a.quantized.scale.shape[2], WORDS=a.codes.shape[2], CHANNELS=channels,
        TILE=min(power_of_two(a.group_size), 2048 // channels), num_warps=4 if channels <= 64 else 8,
        **rank_counts(a.bits, dim),
    )  # fmt: skip


def rotated(a: StoreArguments) -> tuple[tuple[int, ...], dict[str, Any]]:
    """Grid and constants of ``append_rotated_kernel``."""
    batch, heads, _, dim = a.x.shape
    return (batch * heads, dim // a.group_size), dict(
        BITS=int(a.bits), LOW=high_and_low(a.bits)[1], STEP=GAUSSIAN_STEP[int(a.bits)],
        LEVELS=rotated_size(dim).bit_length() - 1 if SCHEMES[a.scheme].APPEND == "rotated" else -1,
        WORDS=a.codes.shape[2], STRIDE=a.quantized.scale.shape[3], CHANNELS=power_of_two(dim), num_warps=4,
    )  # fmt: skip


def launch(a: StoreArguments, *, wrap: Callable[[Any], Any]) -> None:
    """Append ``x`` [B, H, 1 to STEP_TOKENS, D]; ``wrap`` is ``wrap_triton``, or nothing in the interpreter."""
    from xquant_fx.kernels.quantize_store.triton_kernels import append_keys_kernel, append_values_kernel
    from xquant_fx.kernels.quantize_store.triton_ranked import append_ranked_kernel
    from xquant_fx.kernels.quantize_store.triton_rotated import append_rotated_kernel

    kernels = {
        "blocks": (append_keys_kernel, blocks, RANKS),
        "tokens": (append_values_kernel, tokens, RANKS),
        "ranked": (append_ranked_kernel, ranked, ()),
        "rotated": (append_rotated_kernel, rotated, ("zero", *RANKS)),
        "folded": (append_rotated_kernel, rotated, ("zero", *RANKS)),
    }
    kernel, plan, absent = kernels[SCHEMES[a.scheme].APPEND]
    grid, own = plan(a)
    _, heads, new, dim = a.x.shape
    wrap(kernel)[grid](
        *a.replace(x=a.x.contiguous()).positional(without=absent),
        HEADS=heads,
        NEW_TOKENS=new,
        NEW_TILE=power_of_two(new),
        DIM=dim,
        RING=a.quantized.ring.shape[2],
        SINK_TOKENS=a.sink_tokens,
        RESIDUAL=a.residual_length,
        GROUP=a.group_size,
        MAX_LEN=a.max_len,
        ROLLBACK=a.quantized.ring.shape[2] - a.residual_length,
        **{"num_warps": 4, **own},
    )


def _op(name: str, overload: Overload) -> Callable[..., None]:
    def append(*args: Any, **kwargs: Any) -> None:
        launch(StoreArguments(*args, **kwargs), wrap=torch.library.wrap_triton)

    # triton_op ignores its parameter ``schema`` (torch 2.11 to 2.13; 2.14 heeds it) and infers one from the signature.
    append.__signature__ = StoreArguments.signature(overload)  # type: ignore[attr-defined]
    return torch.library.triton_op(f"xquant::{name}", append, mutates_args=StoreArguments.written(overload))


append_own = _op("triton_append", OWN)
append_borrowed = _op("triton_append_borrowed", BORROWED)


def append(a: StoreArguments) -> None:
    """Append a step by the op for layers with codes of their own, or by that for layers that borrow them."""
    a.call(append_own, append_borrowed)
