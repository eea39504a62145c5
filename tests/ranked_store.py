"""Appends of ranked keys and rotated values by a kernel, beside those of the ops."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from numeric import seeded
from store_reference import Case
from store_runs import append as append_by_op
from store_runs import pair_of
from torch import Tensor

from xquant_fx.cache.state import KVState
from xquant_fx.kernels.faults import may_wrap
from xquant_fx.kernels.layout import STEP_TOKENS
from xquant_fx.kernels.packing import code_planes

Append = Callable[[KVState, Tensor, Tensor], None]

#: What a group cannot hold: the last one is finite, but not its range.
BAD = {"nan": math.nan, "inf": math.inf, "large": 3e38}

RANKED_SCRIPT = [8, 8, 3, 8, 1, 3, 8, 8, 8, -5, 8, 8, 8, 1, 1, 8, 8]
RANKED_SHAPE = dict(residual=32, group=16, max_len=110, batch=1, dim=64)
RANKED: dict[str, dict[str, Any]] = {
    **{
        f"keys, head_dim {dim}, {bits} bits": dict(side="key", **{**RANKED_SHAPE, "dim": dim, "bits": bits})
        for dim, bits in ((16, 4), (64, 2), (80, 1.5), (96, 1), (128, 3))
    },
    **{
        f"values, head_dim {dim}, groups of {group}, {bits} bits": dict(
            side="value", **{**RANKED_SHAPE, "dim": dim, "group": group, "bits": bits}
        )
        for dim, group, bits in (
            (64, 64, 2),
            (80, 80, 1),
            (96, 24, 2),
            (24, 24, 4),
            (128, 128, 1),
            (16, 16, 8),
            (64, 32, 3),
        )
    },
    "keys, sinks, padding": dict(side="key", sinks=5, padding=[0, 20], **{**RANKED_SHAPE, "batch": 2, "bits": 1.5}),
    "keys, as the queries say": dict(side="key", energy=True, dtype="float16", heads=2, **RANKED_SHAPE),
    "keys, token norms": dict(
        side="key", norms=True, heads=2, sinks=5, padding=[0, 20], **{**RANKED_SHAPE, "batch": 2, "bits": 1.5}
    ),
    "keys, token norms, odd head_dim, quantized at once": dict(
        side="key", norms=True, heads=3, **{**RANKED_SHAPE, "dim": 20, "residual": 4, "group": 4}
    ),
    "keys, chunks": dict(side="key", script=[50, 3, 8, 8, 0, 8, 8, 8, 8, 8, 8, 4], **RANKED_SHAPE),
    "keys, float16 scales": dict(side="key", scale_dtype="float16", **{**RANKED_SHAPE, "bits": 2.5}),
    "values, float16 scales": dict(side="value", scale_dtype="float16", **{**RANKED_SHAPE, "bits": 3, "group": 32}),
    "keys, several groups a step": dict(side="key", **{**RANKED_SHAPE, "residual": 4, "group": 2}),
    "keys, odd groups": dict(side="key", **{**RANKED_SHAPE, "residual": 24, "group": 12}),
    "values, sinks": dict(side="value", sinks=5, padding=[3], dtype="float16", **{**RANKED_SHAPE, "group": 32}),
    "values that came rotated": dict(side="value", folded=True, **{**RANKED_SHAPE, "group": 64}),
    "loud values": dict(side="value", scale=64.0, **{**RANKED_SHAPE, "group": 64}),
    "scales that do not fit": dict(side="key", scale=2.0**14, **RANKED_SHAPE),
}
RANKED_SLOW = {
    "keys, head_dim 256": dict(side="key", **{**RANKED_SHAPE, "dim": 256}),
    "values, head_dim 256": dict(side="value", **{**RANKED_SHAPE, "dim": 256, "group": 256}),
}


def check_ranked(found: dict[str, Any]) -> None:
    """Numbers as the ops store them, but for what a sum in another order may change."""
    assert found["limit"] > 0
    assert not any(found.get(name) for name in ("order", "norm", "ring", "sink", "length")), found
    # A code lies at a tie, a scale between two codes, where a rounding of a sum decides: rare.
    assert found["codes"] <= found["numbers"] // 2000 and found["scale"] <= 1 and found.get("zero", 0) <= 1, found
    assert found["scales"] + found.get("zeros", 0) <= 2 + found["numbers"] // 1000, found
    assert found.get("center", 0.0) < 1e-5 and found["nans"][0] == found["nans"][1], found


def case_of(**kwargs: Any) -> Case:
    """A Case from what JSON can hold."""
    dtypes = {name: getattr(torch, kwargs[name]) for name in ("dtype", "scale_dtype") if name in kwargs}
    return Case(**{**kwargs, **dtypes, "padding": tuple(kwargs.get("padding", ()))})


def differences_by(
    append: Append, script: list[int], energy: bool = False, spoil: str = "", longest: int = STEP_TOKENS, **kwargs: Any
) -> dict[str, Any]:
    """What ``by_tensor`` finds between ``append`` and the ops after ``script`` on ranked keys or rotated values.

    n > 0 is a step of n tokens, n < 0 rolls n tokens back, 0 starts anew. ``spoil`` is put into the third step. Steps
    of more than ``longest`` tokens are the ops' on both sides.
    """
    case = case_of(ranked=True, **kwargs)
    ours, theirs = pair_of(case)[0], pair_of(case)[0]
    for state in (ours, theirs) if energy else ():
        state.tensor("energy").copy_(torch.rand(state.tensor("energy").shape, generator=seeded(11)) * 4)
    past = 0
    for number, new in enumerate(script):
        if new <= 0:
            past = max(past + new, 0) if new else 0
            for state in (ours, theirs) if not past else ():
                if may_wrap(state.length, 1, state.spec.shape[2]):  # an op would take a step at 0 for a fault
                    state.owned["length"].zero_()
            continue
        x, pos = case.tokens(new, number), torch.arange(past, past + new)
        if spoil and number == 2:
            x[0, 0, 1, 3] = BAD[spoil]
        (append if new <= longest else append_by_op)(ours, x, pos)
        append_by_op(theirs, x, pos)
        past += new
    assert int(ours.tensor("fault")) == int(theirs.tensor("fault")) == 0
    return by_tensor(case, ours, theirs, past)


def by_tensor(case: Case, ours: KVState, theirs: KVState, past: int) -> dict[str, Any]:
    """How many numbers that are read differ, and by how much scales and keys or values do at most."""
    limit = max(past - case.residual, 0)
    if case.side == "key":
        limit = max(past - case.residual + case.group, 0) // case.group * case.group
    found: dict[str, Any] = {"limit": limit, "numbers": 0}
    for name in ("codes", "order", "norm", "ring", "sink", "length"):
        x, y = ours.tensor(name), theirs.tensor(name)
        if x is not None:
            x, y = (read(case, name, t, limit) for t in (x, y))
            found[name] = int(((x != y) & ~((x != x) & (y != y))).sum())
            found["numbers"] += x.numel()
    for name in ("scale", "zero"):
        x, y = ours.tensor(name), theirs.tensor(name)
        if x is not None:
            x, y = (read(case, name, t, limit) for t in (x, y))
            top = 0x80
            if x.dtype == torch.float16:
                x, y, top = x.nan_to_num(65504.0).view(torch.int16), y.nan_to_num(65504.0).view(torch.int16), 0x8000
            x, y = x.int() & (2 * top - 1), y.int() & (2 * top - 1)
            sign = (x ^ y) & top if name == "zero" else torch.zeros_like(x)
            off = torch.where(sign > 0, (x & (top - 1)) + (y & (top - 1)), (x - y).abs())
            found[name], found[f"{name}s"] = int(off.max() if limit else 0), int((off > 0).sum())
    if case.side == "key" and limit:
        x, y = ours.tensor("center"), theirs.tensor("center")
        largest = y.abs().nan_to_num(0.0).amax(2, keepdim=True)  # one near 0 is what is left of sums that cancel
        found["center"] = float(((x - y).abs() / (1e-30 + largest)).nan_to_num(0.0).max())
    seen = [s.load(past)[:, :, :limit].double() for s in (ours, theirs)]
    found["nans"] = [int(t.isnan().sum()) for t in seen]
    found["largest"] = float((seen[0] - seen[1]).abs().nan_to_num(0.0).max()) if limit else 0.0
    return found


def read(case: Case, name: str, tensor: Tensor, limit: int) -> Tensor:
    """The part of a stored tensor that holds the first ``limit`` tokens; of the sinks all but the spare row."""
    if name == "sink":
        return tensor[:, :, : case.sinks]
    if name in ("ring", "length"):
        return tensor
    if name == "order":
        return tensor
    if case.side == "key":
        return tensor[..., :limit] if name in ("codes", "norm") else tensor[:, :, : limit // case.group]
    if name == "codes":  # whole words of each plane
        parts = [
            tensor[:, :, p.first :][:, :, : limit * p.width // 32] for p in code_planes(case.bits, tensor.shape[2])
        ]
        return torch.cat(parts, 2)
    return tensor[..., :limit]
