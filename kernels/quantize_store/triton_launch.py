"""Appending a decode step on CUDA: ops ``xquant::triton_append``, and ``xquant::triton_append_both`` for both sides.

They do what ``plain_torch.py`` does for steps of up to STEP_TOKENS tokens, in one launch of the kernel
of ``triton_append``, and leave alone what nobody reads: blocks of keys that are not complete, padding.
They are ``triton_op``s, so that Inductor puts the kernel into the code it generates. Each has an op for every choice of
sides that only read their codes. Importing this module does not need Triton.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from xquant_fx.kernels.arguments import Arguments, Overload
from xquant_fx.kernels.packing import high_and_low
from xquant_fx.kernels.quantize_store.arguments import BORROWED, OWN, StoreArguments
from xquant_fx.kernels.quantize_store.both_arguments import BOTH, COMMON, OF_SIDE, BothArguments
from xquant_fx.kernels.rotation import rotated_size
from xquant_fx.kernels.schemes import SCHEMES, wrap_of
from xquant_fx.kernels.schemes.per_token_rotated import GAUSSIAN_STEP
from xquant_fx.kernels.triton_host import on_its_device, power_of_two, rank_counts

#: Channels that one program has registers for.
MOST_CHANNELS = 256


def why_not(a: StoreArguments) -> str:
    """Why the kernels do not take these arguments, in words; "" if they do."""
    if SCHEMES[a.scheme].APPEND == "ranked" and a.x.shape[3] > MOST_CHANNELS:
        return f"channels are ranked up to head_dim {MOST_CHANNELS}"
    return ""


def wrap_of_side(a: StoreArguments) -> int:
    """After how many tokens codes start over; 0: they do not."""
    tokens = SCHEMES[a.scheme].tokens_of(a.codes.shape, a.quantized.scale.shape)
    return wrap_of(a.scheme, tokens, a.max_len, a.x.shape[3], a.bits, a.group_size, a.residual_length)


def blocks(a: StoreArguments) -> dict[str, Any]:
    """What ``append_blocks`` takes, and how many programs there are."""
    batch, heads, new, dim = a.x.shape
    # As many blocks as the step may complete, and 32 channels, which are whole words at any bits.
    groups = math.ceil(new / a.residual_length) * (a.residual_length // a.group_size)
    return dict(
        PROGRAMS=batch * heads * groups * math.ceil(dim / 32), TOKENS=a.codes.shape[3],
        GROUPS=a.quantized.scale.shape[2], CHANNELS=32, TILE=min(power_of_two(a.group_size), 64),
    )  # fmt: skip


def tokens(a: StoreArguments) -> dict[str, Any]:
    """The same of ``append_tokens``."""
    batch, heads, _, dim = a.x.shape
    return dict(
        PROGRAMS=batch * heads * (dim // a.group_size), TOKENS=a.quantized.scale.shape[3],
        CHANNELS=power_of_two(a.group_size),
    )  # fmt: skip


def ranked(a: StoreArguments) -> dict[str, Any]:
    """The same of ``append_ranked``."""
    batch, heads, _, dim = a.x.shape
    channels = power_of_two(dim)
    return dict(
        PROGRAMS=batch * heads, TOKENS=a.codes.shape[3], GROUPS=a.quantized.scale.shape[2], CHANNELS=channels,
        TILE=min(power_of_two(a.group_size), 2048 // channels), **rank_counts(a.bits, dim),
    )  # fmt: skip


def rotated(a: StoreArguments) -> dict[str, Any]:
    """The same of ``append_rotated``."""
    batch, heads, _, dim = a.x.shape
    return dict(
        PROGRAMS=batch * heads * (dim // a.group_size), TOKENS=a.quantized.scale.shape[3], CHANNELS=power_of_two(dim),
        ABOUT_ZERO=GAUSSIAN_STEP[int(a.bits)],
        LEVELS=rotated_size(dim).bit_length() - 1 if SCHEMES[a.scheme].APPEND == "rotated" else -1,
    )  # fmt: skip


PLANS = {"blocks": blocks, "tokens": tokens, "ranked": ranked, "rotated": rotated, "folded": rotated}
#: What a side has that is not there, or that has no such constants.
NOTHING = dict(
    APPEND="", PROGRAMS=0, HEADS=0, DIM=0, RING=0, SINKS=0, RESIDUAL=0, GROUP=0, MAX_LEN=0, WRAP=0, BITS=0, LOW=0,
    ETA=0.0, FIT="own", ABOUT_ZERO=0.0, LEVELS=0, TOKENS=0, GROUPS=0, WORDS=0, CHANNELS=0, TILE=0,
    **{f"RANKS_{least}": 0 for least in range(1, 8)},
)  # fmt: skip


def constants(a: StoreArguments | None) -> dict[str, Any]:
    """Constants of one side under their names without its number, and its PROGRAMS."""
    if a is None:
        return dict(NOTHING)
    append = SCHEMES[a.scheme].APPEND
    given = dict(
        APPEND=append, HEADS=a.x.shape[1], DIM=a.x.shape[3], RING=a.quantized.ring.shape[2], SINKS=a.sink_tokens,
        RESIDUAL=a.residual_length, GROUP=a.group_size, MAX_LEN=a.max_len, WORDS=a.codes.shape[2],
        BITS=0 if append == "ranked" else int(a.bits), LOW=0 if append == "ranked" else high_and_low(a.bits)[1],
        ETA=a.eta, FIT=a.fit or "own", WRAP=wrap_of_side(a),
    )  # fmt: skip
    return {**NOTHING, **given, **PLANS[append](a)}


def launch(*sides: StoreArguments, wrap: Callable[[Any], Any]) -> None:
    """Append ``x`` [B, H, 1 to STEP_TOKENS, D] of one side, or of two at the same positions, in one launch.

    ``wrap`` is ``wrap_triton``, or nothing in the interpreter.
    """
    from xquant_fx.kernels.quantize_store.triton_append import append_kernel

    first, second = sides[0], sides[1] if len(sides) > 1 else None
    new = first.x.shape[2]
    both = [constants(side) for side in (first, second)]
    programs = [made.pop("PROGRAMS") for made in both]
    # Ranked channels take registers, and so do planes of 3 bits and codes that start over: more threads share them.
    many = any(made["APPEND"] == "ranked" and made["CHANNELS"] > 64 for made in both)
    many = many or any(made["BITS"] == 3 or made["WRAP"] for made in both)
    of_sides = [
        side.replace(x=side.x.contiguous()).positional(without=COMMON) if side else [None] * len(OF_SIDE)
        for side in (first, second)
    ]
    wrap(append_kernel)[(sum(programs),)](
        *(getattr(first.mapped(Tensor.contiguous, ("pos",)), name) for name in COMMON),
        *of_sides[0],
        *of_sides[1],
        NEW_TOKENS=new,
        NEW_TILE=power_of_two(new),
        RAGGED=first.length.dim() == 2,
        PROGRAMS_0=programs[0],
        **{f"{name}_{number}": value for number, made in enumerate(both) for name, value in made.items()},
        num_warps=8 if many else 4,
    )


def _op(name: str, kind: type[Arguments], overload: Overload) -> Callable[..., None]:
    def append(*args: Any, **kwargs: Any) -> None:
        given = kind(*args, **kwargs)
        sides: Any = given.sides if isinstance(given, BothArguments) else (given,)
        with on_its_device(sides[0].x):
            launch(*sides, wrap=torch.library.wrap_triton)

    # triton_op ignores its parameter ``schema`` (torch 2.11 to 2.13; 2.14 heeds it) and infers one from the signature.
    append.__signature__ = kind.signature(overload)  # type: ignore[attr-defined]
    return torch.library.triton_op(f"xquant::{name}", append, mutates_args=kind.written(overload))


append_own = _op("triton_append", StoreArguments, OWN)
append_borrowed = _op("triton_append_borrowed", StoreArguments, BORROWED)
append_of = {
    name: _op(f"triton_append_both{name and '_'}{name}", BothArguments, overload) for name, overload in BOTH.items()
}


def append(a: StoreArguments) -> None:
    """Append a step by the op for layers with codes of their own, or by that for layers that borrow them."""
    a.call(append_own, append_borrowed)


def append_both(a: BothArguments) -> None:
    """The same of keys and values."""
    append_of[a.overload](**a._asdict())


def why_not_both(a: BothArguments) -> str:
    """Why the kernel does not take one of two sides, in words; "" if it takes both."""
    return next((reason for reason in map(why_not, a.sides) if reason), "")
