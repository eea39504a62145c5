"""Play steps on a pair of layers with the Triton kernels in the interpreter (see store_runs.py)."""

from __future__ import annotations

import math
from typing import Any

import torch
from numeric import seeded
from store_reference import Case
from store_runs import ThroughKernel, ThroughOps, pair_of, run, store_arguments
from store_runs import append as append_by_op
from torch import Tensor

from xquant_fx.cache.state import KVState
from xquant_fx.kernels.layout import STEP_TOKENS
from xquant_fx.kernels.quantize_store.triton_launch import launch

#: What a group cannot hold: the last one is finite, but not its range.
BAD = {"nan": math.nan, "inf": math.inf, "large": 3e38}


def append(state: KVState, x: Tensor, pos: Tensor) -> None:
    """One step of up to STEP_TOKENS tokens by the kernel."""
    launch(store_arguments(state, x, pos), wrap=lambda kernel: kernel)


class ThroughTriton(ThroughKernel):
    """Steps by the Triton kernel."""

    append = staticmethod(append)


def case_of(**kwargs: Any) -> Case:
    """A Case from what JSON can hold."""
    dtypes = {name: getattr(torch, kwargs[name]) for name in ("dtype", "scale_dtype") if name in kwargs}
    return Case(**{**kwargs, **dtypes, "padding": tuple(kwargs.get("padding", ()))})


def play(script: list[int], **kwargs: Any) -> None:
    """Steps beside the float64 reference."""
    run(case_of(**kwargs), script, ThroughTriton)


def differences(script: list[int], spoil: str = "", **kwargs: Any) -> dict[str, int]:
    """How many stored numbers that are read differ between the kernel and the ops, by tensor."""
    case = case_of(**kwargs)
    ours, theirs = ThroughTriton(case), ThroughOps(case)
    past, found = 0, dict.fromkeys(("codes", "scale", "zero", "ring", "sink", "length"), 0)
    for number, new in enumerate(script):
        for layer in (0, 1):
            x = case.tokens(new, 2 * number + layer)
            if spoil and number == 2:
                x[0, 0, 1, 3] = BAD[spoil]
            ours.step(layer, past, x)
            theirs.step(layer, past, x)
        past += new
    for a, b in zip(ours.states, theirs.states, strict=True):
        limit = past // case.residual * case.residual if case.side == "key" else max(past - case.residual, 0)
        for name in found:
            x, y = a.tensor(name), b.tensor(name)
            if x is not None:
                x, y = (read(case, name, t, limit) for t in (x, y))
                found[name] += int(((x != y) & ~((x != x) & (y != y))).sum())
    return found


def ranked_differences(script: list[int], energy: bool = False, spoil: str = "", **kwargs: Any) -> dict[str, Any]:
    """What ``by_tensor`` finds between the kernel and the ops after ``script`` on ranked keys or rotated values.

    n > 0 is a step of n tokens, n < 0 rolls n tokens back, 0 starts anew. ``spoil`` is put into the third step.
    """
    case = case_of(ranked=True, **kwargs)
    ours, theirs = pair_of(case)[0], pair_of(case)[0]
    for state in (ours, theirs) if energy else ():
        state.tensor("energy").copy_(torch.rand(state.tensor("energy").shape, generator=seeded(11)) * 4)
    past = 0
    for number, new in enumerate(script):
        if new <= 0:
            past = max(past + new, 0) if new else 0
            continue
        x, pos = case.tokens(new, number), torch.arange(past, past + new)
        if spoil and number == 2:
            x[0, 0, 1, 3] = BAD[spoil]
        (append if new <= STEP_TOKENS else append_by_op)(ours, x, pos)
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
    for name in ("codes", "order", "ring", "sink", "length"):
        x, y = ours.tensor(name), theirs.tensor(name)
        if x is not None:
            x, y = (read(case, name, t, limit) for t in (x, y))
            found[name] = int(((x != y) & ~((x != x) & (y != y))).sum())
            found["numbers"] += x.numel()
    for name in ("scale", "zero"):
        x, y = ours.tensor(name), theirs.tensor(name)
        if x is not None:
            x, y = (read(case, name, t, limit).int() for t in (x, y))
            sign = (x ^ y) & 0x80 if name == "zero" else torch.zeros_like(x)
            off = torch.where(sign > 0, (x & 0x7F) + (y & 0x7F), (x - y).abs())
            found[name], found[f"{name}s"] = int(off.max() if limit else 0), int((off > 0).sum())
    if case.side == "key" and limit:
        x, y = ours.tensor("center"), theirs.tensor("center")
        found["center"] = float(((x - y).abs() / (1e-30 + y.abs().nan_to_num(0.0))).nan_to_num(0.0).max())
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
        return tensor[..., :limit] if name == "codes" else tensor[:, :, : limit // case.group]
    return tensor[:, :, : limit * int(case.bits) // 32] if name == "codes" else tensor[..., :limit]


def faults(steps: list[list[int]], **kwargs: Any) -> list[list[int]]:
    """[fault, length, furthest] of the kernel and of the ops after each step, given as its positions."""
    case, seen = case_of(**kwargs), []
    ours, theirs = pair_of(case)[0], pair_of(case)[0]
    for positions in steps:
        pos = torch.tensor(positions)
        x = case.tokens(len(positions), 0)
        for state in (ours, theirs):
            state.tensor("fault").zero_()
        append(ours, x, pos)
        append_by_op(theirs, x, pos)
        seen.append([[int(s.tensor("fault")), *s.tensor("length").tolist()] for s in (ours, theirs)])
    return seen


def fault_of(stored: int, positions: list[int], **kwargs: Any) -> list[list[int]]:
    """[fault, length, furthest] of the kernel and of the ops for one step after ``stored`` tokens."""
    case, seen = case_of(**kwargs), []
    for step in (append, append_by_op):
        state = pair_of(case)[0]
        append_by_op(state, case.tokens(stored, 0), torch.arange(stored))
        step(state, case.tokens(len(positions), 1), torch.tensor(positions))
        seen.append([int(state.tensor("fault")), *state.tensor("length").tolist()])
    return seen
