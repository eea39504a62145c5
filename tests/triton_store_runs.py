"""Play steps on a pair of layers with the Triton kernels in the interpreter (see store_runs.py)."""

from __future__ import annotations

from typing import Any

import sliding_states
import torch
from ranked_store import BAD, case_of, differences_by, read
from states import layers_of
from store_runs import ThroughKernel, ThroughOps, load_arguments, pair_of, poison, run, store_arguments
from store_runs import append as append_by_op
from torch import Tensor

from xquant_fx import XQuantConfig, ops
from xquant_fx.cache.state import KVState
from xquant_fx.kernels.decode_attention.arguments import DecodeArguments
from xquant_fx.kernels.decode_attention.triton_launch import launch as attend
from xquant_fx.kernels.decode_attention.triton_launch import why_not
from xquant_fx.kernels.quantize_store.triton_launch import launch


def append(state: KVState, x: Tensor, pos: Tensor) -> None:
    """One step of up to STEP_TOKENS tokens by the kernel."""
    launch(store_arguments(state, x, pos), wrap=lambda kernel: kernel)


def differ(x: Tensor, y: Tensor) -> Tensor:
    """Which numbers differ; NaN and NaN do not."""
    return (x != y) & ~((x != x) & (y != y))


class ThroughTriton(ThroughKernel):
    """Steps by the Triton kernel."""

    append = staticmethod(append)


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
                found[name] += int(differ(x, y).sum())
    return found


def ranked_differences(**kwargs: Any) -> dict[str, Any]:
    """``ranked_store.differences_by`` of the Triton kernel."""
    return differences_by(append, **kwargs)


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


def both(script: list[int], config: dict[str, Any], positions: list[int]) -> dict[str, Any]:
    """Two layers by one launch each for keys and values, and by the ops: what differs, launches, and the faults.

    Steps of ``script``, then one at ``positions``. "off" is the largest share of loaded numbers that differ by more
    than the order of sums may change.
    """
    shape, start = (1, 2, 80, 16), torch.tensor([5])
    ours, theirs = (layers_of(XQuantConfig(**config), shape, torch.float32, 2, start=start) for _ in range(2))
    states = [[state for layer in layers for state in layer] for layers in (ours, theirs)]
    for state in (*states[0], *states[1]):
        poison(state)
    launched: list[str] = []

    def noted(kernel: Any) -> Any:
        launched.append(kernel.fn.__name__)
        return kernel

    def step(layer: int, x: list[Tensor], pos: Tensor) -> None:
        launch(*(store_arguments(state, x[side], pos) for side, state in enumerate(ours[layer])), wrap=noted)
        for side, state in enumerate(theirs[layer]):
            append_by_op(state, x[side], pos)

    past, generator = 0, torch.Generator().manual_seed(0)
    for new in script:
        for layer in (0, 1):
            step(layer, [torch.randn(1, 2, new, 16, generator=generator) for _ in "kv"], torch.arange(past, past + new))
        past += new
    found: dict[str, Any] = dict(off=0.0, ring=0, length=0, sink=0)
    for one, other in zip(*states, strict=True):
        loads = [ops.LOAD(**load_arguments(state, past, 0, past)) for state in (one, other)]
        found["off"] = max(found["off"], float((~loads[0].isclose(loads[1], 1e-4, 1e-5, True)).float().mean()))
        for name in ("ring", "length", "sink"):
            x, y = one.tensor(name), other.tensor(name)
            if x is not None and y is not None:
                wrong = differ(x, y)
                found[name] += int((wrong[:, :, :-1] if name == "sink" else wrong).sum())  # the last row is nobody's
    found["faults_before"] = [int(layers[0][0].tensor("fault")) for layers in (ours, theirs)]
    step(0, [torch.zeros(1, 2, len(positions), 16)] * 2, torch.tensor(positions))
    return {**found, "faults": [int(layers[0][0].tensor("fault")) for layers in (ours, theirs)], "launched": launched}


def rows(lengths: list[int], script: list[list[list[int]]], config: dict[str, Any], layers: int = 1) -> dict[str, Any]:
    """Steps of layers whose rows have positions of their own [B, q], by one launch each, and by the ops.

    Rows begin with prompts of ``lengths``. What differs in the end, as in ``both``, launches, and of the kernel and of
    the ops the faults of all steps and the lengths after each.
    """
    batch, settings = len(lengths), XQuantConfig(**config)
    shape, start, generator = (batch, 2, 48, 16), torch.arange(batch), torch.Generator().manual_seed(9)
    ours, theirs = (layers_of(settings, shape, torch.float32, layers, start=start, ragged=True) for _ in range(2))
    states = [[state for layer in each for state in layer] for each in (ours, theirs)]
    for side, state in [pair for each in states for pair in enumerate(each)]:
        poison(state)
        state.fill(torch.randn(batch, 2, max(lengths), 16, generator=torch.Generator().manual_seed(side)), lengths)
    launched: list[str] = []
    found: dict[str, Any] = dict(off=0.0, ring=0, length=0, sink=0, lengths=[])

    def noted(kernel: Any) -> Any:
        launched.append(kernel.fn.__name__)
        return kernel

    for pos in map(torch.tensor, script):
        for mine, other in zip(ours, theirs, strict=True):
            x = [torch.randn(batch, 2, pos.shape[1], 16, generator=generator) for _ in "kv"]
            launch(*(store_arguments(state, x[side], pos) for side, state in enumerate(mine)), wrap=noted)
            for side, state in enumerate(other):
                append_by_op(state, x[side], pos)
        found["lengths"].append([each[-1].tensor("length").tolist() for each in states])
    for one, other in zip(*states, strict=True):
        past = one.tensor("length")[:, 0]
        loads = [ops.LOAD(**{**load_arguments(state, 0, 0, 48), "past": past}) for state in (one, other)]
        found["off"] = max(found["off"], float((~loads[0].isclose(loads[1], 1e-4, 1e-5, True)).float().mean()))
        for name in ("ring", "length", "sink"):
            x, y = one.tensor(name), other.tensor(name)
            if x is not None and y is not None:
                wrong = differ(x, y)
                found[name] += int((wrong[:, :, :-1] if name == "sink" else wrong).sum())
    return {**found, "faults": [each[0].tensor("fault").tolist() for each in states], "launched": launched}


def sliding(what: str, **fields: Any) -> None:
    """A layer with a sliding window and one without are stored to and read the same; see sliding_states.py."""
    sliding_states.play(XQuantConfig(**sliding_states.CONFIGS[what], **fields), append)


def sliding_attention(config: dict[str, Any], dtype: str, new: int, **sizes: int) -> dict[str, Any]:
    """Largest error of the kernels on a sliding window's storage, and which ran."""
    ran: list[str] = []

    def noted(kernel: Any) -> Any:
        ran.append(kernel.fn.__name__)
        return kernel

    def run(a: DecodeArguments) -> Tensor:
        assert not why_not(a)
        return attend(a, wrap=noted, interpret=True, hip=False)

    ours, theirs = sliding_states.decode(XQuantConfig(**config), run, getattr(torch, dtype), new, **sizes)
    assert ours.isfinite().all() and theirs.abs().max() > 0.1
    return {"error": float((ours.double() - theirs.double()).abs().max()), "ran": ran}
