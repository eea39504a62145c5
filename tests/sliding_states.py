"""Layers with a sliding window, beside such that keep all their tokens: what is read must be the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

import torch
from store_runs import append as append_by_op
from store_runs import load_arguments, poison
from torch import Tensor

from xquant_fx import XQuantConfig, ops
from xquant_fx.cache.allocate import allocate
from xquant_fx.cache.group import CacheGroup
from xquant_fx.cache.state import KVState
from xquant_fx.kernels.decode_attention.arguments import DecodeArguments, of_sides
from xquant_fx.kernels.decode_attention.plain_torch import attend
from xquant_fx.plan.plan import make_plan
from xquant_fx.plan.spec import Role

HEADS, LENGTH = 2, 600
CONFIGS: dict[str, dict[str, Any]] = {
    "ranked": dict(k_bits=2, v_bits=2, k_group_size=32, k_residual_length=64, v_residual_length=40, sink_tokens=4),
    "ranked, small groups, 3 bits": dict(k_bits=1.5, v_bits=3, k_group_size=8, residual_length=16, rollback_tokens=9),
    "range codes": dict(
        k_scheme="per_channel", v_scheme="per_token", k_bits=2, v_bits=1, k_group_size=16, residual_length=32
    ),
    "range codes, groups of channels": dict(
        k_scheme="per_channel", v_scheme="per_token", k_bits=3, v_bits=4, k_group_size=8, residual_length=24,
        v_group_size=16, sink_tokens=0,
    ),
}  # fmt: skip
WINDOW = 100
#: Tokens of each step; less than 0: taken back. Of fewer than 256, from which on uncompiled chunks have a kernel.
STEPS = [250, 50, 1, 5, 8, 1, -6, 3, 40, 1, 1, 8, -8, 2, 150, 1, 7, 1]
Append = Callable[[KVState, Tensor, Tensor], None]


def pair(
    config: XQuantConfig, window: int, batch: int, dim: int, dtype: torch.dtype = torch.float32, length: int = LENGTH
) -> list[KVState]:
    """Empty keys and values of one layer, poisoned; ``window`` 0 keeps all tokens."""
    plan = make_plan(config, 1)
    roles: tuple[Role, ...] = get_args(Role)
    shape = (batch, HEADS, length, dim)
    specs = [plan.layers[0].of(role).bind(0, shape, dtype, None, window=window) for role in roles]
    group = CacheGroup(plan, batch, torch.device("cpu"), torch.tensor([0, 11])[:batch])
    states = allocate(group, specs)
    for state in states:
        poison(state)
    return states


def visible(state: KVState, past: int, new: int, before: dict[str, Tensor | None], x: Tensor | None) -> Tensor:
    """What the queries of a step may see of a layer, by the op."""
    whole = ops.LOAD(**{**load_arguments(state, past, new, LENGTH, x=x), **before})
    return whole[:, :, max(past - WINDOW + 1, 0) : past + new]


def play(config: XQuantConfig, append: Append, dim: int = 16, batch: int = 2) -> None:
    """STEPS on a layer with a window and one without: bit for bit the same, by ``append`` for steps of up to 8."""
    sliding, whole = (pair(config, window, batch, dim) for window in (WINDOW, 0))
    assert all(s.spec.wraps and not w.spec.wraps for s, w in zip(sliding, whole, strict=True))
    past, generator = 0, torch.Generator().manual_seed(0)
    for move in STEPS:
        if move < 0:
            past += move
            continue
        for side in (0, 1):
            x = torch.randn(batch, HEADS, move, dim, generator=generator)
            x = x * (1 + torch.arange(dim) % 5) + torch.arange(dim) % 3
            seen = [_step(state[side], x, past, append) for state in (sliding, whole)]
            torch.testing.assert_close(*seen, rtol=0, atol=0)
        past += move


def _step(state: KVState, x: Tensor, past: int, append: Append) -> Tensor:
    new = x.shape[2]
    before = {name: state.owned[name].clone() for name in state.spec.overwritten} if new > 8 else {}
    step = append_by_op if new > 8 else append
    step(state, x, torch.arange(past, past + new))
    assert int(state.tensor("fault")) == 0  # type: ignore[arg-type]
    return visible(state, past, new, before, x if new > 8 else None)


def decode(
    config: XQuantConfig,
    run: Callable[[DecodeArguments], Tensor],
    dtype: torch.dtype,
    new: int,
    stored: int = 500,
    dim: int = 32,
    length: int = LENGTH,
    window: int = WINDOW,
) -> tuple[Tensor, Tensor]:
    """Attention of ``new`` queries after ``stored`` tokens: by ``run``, and in plain torch where all are kept."""
    results = []
    generator = torch.Generator().manual_seed(1)
    q = torch.randn(2, 3 * HEADS, new, dim, generator=generator).to(dtype)
    x = [torch.randn(2, HEADS, stored + new, dim, generator=generator).to(dtype) for _ in range(2)]
    for kept, body in ((window, run), (0, attend)):
        states = pair(config, kept, 2, dim, dtype, length)
        assert all(state.spec.wraps for state in states) == bool(kept)
        chunk: list[Tensor | None] = [None, None]
        for side, state in enumerate(states):
            for pos in torch.arange(stored).split(STEPS[0]):  # from 256 tokens on, uncompiled chunks have a kernel
                append_by_op(state, x[side][:, :, pos], pos)
            before = {name: state.owned[name].clone() for name in state.spec.overwritten}
            append_by_op(state, x[side][:, :, stored:], torch.arange(stored, stored + new))
            if new > 8:
                state.owned.update(before)
                chunk[side] = x[side][:, :, stored:]
        key, value = states
        t, last = torch.arange(length), torch.arange(stored, stored + new)[:, None]
        mask = ((t <= last) & (t >= torch.tensor([0, 11])[:, None, None]))[:, None]
        fixed = {**key.spec.decode_constants(value.spec), "window": window}
        results.append(body(DecodeArguments(
            q=q, **of_sides(key.tensor, value.tensor), start=key.group.start, past=torch.tensor([stored]), mask=mask,
            sink_logits=None, new_tokens=new, scale=dim**-0.5, softcap=0.0, k_new=chunk[0], v_new=chunk[1], **fixed,
        )))  # fmt: skip
    return results[0], results[1]
