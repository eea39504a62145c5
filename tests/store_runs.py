"""Play steps, chunks and rollbacks on a pair of layers, by ``KVState`` or by the raw ops, beside the reference.

Every run starts from poisoned tensors: NaN wherever there are floating-point numbers, junk codes.
What is never written must never be read.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from numeric import seeded
from states import layers_of
from store_reference import Case, Reference
from torch import Tensor

from xquant_fx import ops
from xquant_fx.cache.state import KVState
from xquant_fx.kernels.faults import may_wrap
from xquant_fx.kernels.layout import STEP_TOKENS
from xquant_fx.kernels.quantize_store.arguments import StoreArguments
from xquant_fx.kernels.shared_code_load.arguments import STORED


def pair_of(case: Case) -> list[KVState]:
    """The two layers of a pair, freshly allocated and poisoned."""
    layers = layers_of(case.config, case.shape, case.dtype, 2, start=case.start)
    states = [layer[case.side == "value"] for layer in layers]
    for state in states:
        poison(state)
    return states


def poison(state: KVState) -> None:
    """NaN and junk in all that a state owns and has not written."""
    for name, tensor in state.owned.items():
        if name in ("center", "energy"):  # nothing is known yet of a sequence
            tensor.zero_()
        elif name == "norm":
            tensor.fill_(0xFF)
        elif tensor.is_floating_point():
            tensor.fill_(math.nan)
        elif name == "codes":
            tensor.random_(-(2**31), 2**31 - 1, generator=seeded(0))


def store_arguments(state: KVState, x: Tensor, pos: Tensor) -> StoreArguments:
    """An append of ``x`` at ``pos`` as the raw op takes it."""
    fit = state.spec.fit if state.spec.borrowed else None
    return StoreArguments(x=x, pos=pos, **state.tensors, **state.spec.store_constants(), fit=fit)


def append(state: KVState, x: Tensor, pos: Tensor) -> None:
    """Append by the raw op, as a rewritten graph does."""
    store_arguments(state, x, pos).call(ops.STORE, ops.STORE_BORROWED)


def load_arguments(state: KVState, past: int, new: int, n: int, **more: Tensor | None) -> dict[str, Any]:
    """Arguments of ``shared_code_load`` by name in a step of ``new`` tokens after ``past``; ``more`` goes first."""
    tensors = {name: state.tensor(name) for name in STORED}
    lengths = dict(past=torch.tensor([past]), new_tokens=new, n=n)
    return {**tensors, **lengths, **state.spec.load_constants(), **more}


class ThroughState:
    """Steps by ``KVState.store`` and ``load``."""

    keeps_steps = True
    """Whether a layer shows what its last step saw until it is written to again, if that was of up to 8 tokens."""

    def __init__(self, case: Case) -> None:
        self.states = pair_of(case)
        self.count = case.max_len

    def step(self, layer: int, past: int, x: Tensor) -> Tensor:
        state, new = self.states[layer], x.shape[2]
        state.store(x, torch.arange(past, past + new))
        seen = state.load(self.count)
        for n in (new, past + new):
            torch.testing.assert_close(state.load(n), seen[:, :, :n], rtol=0, atol=0, equal_nan=True)
        return seen

    def view(self, layer: int, length: int) -> Tensor:
        assert self.states[layer].length == length
        return self.states[layer].load(self.count)

    def rollback(self, layer: int, length: int) -> None:
        self.states[layer].truncate(length)


class ThroughOps(ThroughState):
    """Steps by the raw ops, as a rewritten graph calls them; a rollback is a step at a lower position.

    Only a full cache is told to start anew: there position 0 alone is a fault (test_store_faults.py).
    """

    keeps_steps = False
    by_op = staticmethod(append)

    def step(self, layer: int, past: int, x: Tensor) -> Tensor:
        state, new = self.states[layer], x.shape[2]
        chunk = new > STEP_TOKENS and state.spec.quantized
        ring = state.tensor("ring").clone() if chunk else state.tensor("ring")
        self.by_op(state, x, torch.arange(past, past + new))
        assert state.length == past + new and int(state.tensor("fault")) == 0
        return self._load(state, ring, past, new, x if chunk else None)

    def view(self, layer: int, length: int) -> Tensor:
        state = self.states[layer]
        return self._load(state, state.tensor("ring"), length, 0, None)

    def rollback(self, layer: int, length: int) -> None:
        state = self.states[layer]
        if length == 0 and may_wrap(state.length, 1, state.spec.shape[2]):  # an op would take it for a fault
            super().rollback(layer, length)

    def _load(self, state: KVState, ring: Tensor | None, past: int, new: int, x: Tensor | None) -> Tensor:
        return ops.LOAD(**load_arguments(state, past, new, self.count, ring=ring, x=x))


class ThroughKernel(ThroughOps):
    """Steps of up to STEP_TOKENS tokens by a kernel, ``append``; chunks and all reading by the ops."""

    @staticmethod
    def append(state: KVState, x: Tensor, pos: Tensor) -> None:
        raise NotImplementedError

    def step(self, layer: int, past: int, x: Tensor) -> Tensor:
        state, new = self.states[layer], x.shape[2]
        if new > STEP_TOKENS:
            return super().step(layer, past, x)
        self.append(state, x, torch.arange(past, past + new))
        assert state.length == past + new and int(state.tensor("fault")) == 0
        return self._load(state, state.tensor("ring"), past, new, None)


def run(case: Case, script: list[int], driver: type[ThroughState]) -> list[KVState]:
    """Play ``script`` on both layers: n > 0 is a step of n tokens, n < 0 rolls n tokens back, 0 starts anew.

    Steps are cut to the room that is left, rollbacks to ``case.rollback`` behind the furthest token written.
    """
    layers = driver(case)
    lower = Reference(case)
    refs = [lower, Reference(case, lower if layers.states[1].spec.borrowed else None)]
    length = furthest = 0
    shown = (0, 0)  # tokens before the step that the lower layer shows, and of it
    for number, move in enumerate(script):
        past = length
        if move <= 0:
            length = max(length + move, furthest - case.rollback, 0) if move else 0
            furthest, shown = furthest if length else 0, (length, 0)
            for layer, ref in enumerate(refs):
                layers.rollback(layer, length)
                ref.write(length, ref.tokens[:, :, :0])
        else:
            length = min(length + move, case.max_len)
            if length > past:
                kept = driver.keeps_steps and length - past <= STEP_TOKENS
                shown = (past, length - past) if kept else (length, 0)
            for layer, ref in enumerate(refs[: 2 * (length > past)]):
                x = case.tokens(length - past, 2 * number + layer)
                ref.write(past, x)
                compare(layers.step(layer, past, x), ref, past, length - past)
                ref.check_stored(layers.states[layer].tensors)
        furthest = max(furthest, length)
        for layer, ref in enumerate(refs[: 1 if move > 0 else 2]):  # the upper layer's last step is still to be seen
            compare(layers.view(layer, length), ref, *shown)
    return layers.states


def compare(got: Tensor, ref: Reference, past: int, new: int) -> None:
    """Quantized tokens within rounding, all others bit for bit, zeros behind."""
    expected, allowed = ref.seen(past, new, got.shape[2])
    assert got.shape == expected.shape and got.dtype == ref.case.dtype
    wrong = ~((got.double() - expected).abs() <= allowed)
    assert not wrong.any(), f"tokens {sorted(set(wrong.nonzero()[:, 2].tolist()))} are wrong after {past} + {new}"
