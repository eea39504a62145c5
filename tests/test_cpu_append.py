"""The C++ kernels that append a step's tokens and chunks, against the float64 reference in store_reference.py."""

from __future__ import annotations

import math

import pytest
import torch
from bad_positions import BAD as BAD_POSITIONS
from fast_and_slow import fast_but
from ranked_store import BAD, RANKED, RANKED_SCRIPT, RANKED_SLOW, check_ranked, differences_by
from store_reference import Case
from store_runs import ThroughKernel, ThroughOps, pair_of, run, store_arguments
from store_runs import append as append_by_op
from torch import Tensor
from torch._dynamo.utils import counters

from xquant_fx import ops
from xquant_fx.cache.state import KVState
from xquant_fx.kernels.cpu import at_hand
from xquant_fx.kernels.cpu import build as cpu_build
from xquant_fx.kernels.cpu.isa import ISAS
from xquant_fx.kernels.quantize_store import cpu_call as append
from xquant_fx.kernels.quantize_store import cpu_source as cpu_store

APPENDS = (ops.APPEND_CPU, ops.APPEND_CPU_BORROWED)
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
STEPS = [9, 1, 1, 1, 3, 1, -3, 1, 3, 1, 1, 1, 3, 12, 1, 3, 1, 0, 1, 3]
CASES = {
    "keys": dict(bits=2, dtype=F32, eta=0.1),
    "keys, minmax": dict(bits=1, dtype=BF16, fit="minmax", eta=1 / 6, dim=32),
    "keys, 4 bits, padding": dict(bits=4, dtype=F16, padding=(0, 3), group=8, heads=2),
    "keys, 8 bits, sinks": dict(bits=8, dtype=F32, sinks=5, scale_dtype=F32, dim=8),
    "keys, odd head_dim": dict(bits=2, dtype=F16, dim=40, scale_dtype=BF16, group=1, scale=64.0),
    "values": dict(side="value", bits=2, dtype=F32, group=16, eta=0.1),
    "values, minmax": dict(side="value", bits=1, dtype=BF16, fit="minmax", eta=1 / 6, dim=32, group=8),
    "values, 4 bits, sinks": dict(side="value", bits=4, dtype=F16, sinks=2, padding=(2, 0), dim=24, group=8),
    "keys, 3 bits": dict(bits=3, dtype=F32, dim=40, heads=2),
    "values, 3 bits, sinks": dict(side="value", bits=3, dtype=F16, sinks=2, padding=(2, 0), dim=24, group=8),
    "values, 8 bits": dict(side="value", bits=8, dtype=F32, group=16, scale_dtype=F32, heads=2),
}  # fmt: skip


#: Case to the fast ones that have its options, too: each has kernels of its own, which take seconds to compile.
COVERED = {
    "keys": "keys, odd head_dim",
    "keys, 3 bits": "values, 3 bits, sinks; keys, odd head_dim",
    "values": "values, 8 bits",
    "values, 4 bits, sinks": "values, 3 bits, sinks; keys, 4 bits, padding",
}


class ChunksThroughCpp(ThroughOps):
    """Chunks, and steps, too, by the C++ kernel."""

    @staticmethod
    def by_op(state: KVState, x: Tensor, pos: Tensor) -> None:
        append.run(store_arguments(state, x.to(state.spec.dtype), pos))


class ThroughCpp(ThroughKernel):
    """Steps by the C++ kernel."""

    @staticmethod
    def append(state: KVState, x: Tensor, pos: Tensor) -> None:
        store_arguments(state, x, pos).call(*APPENDS)


@pytest.mark.parametrize("name", fast_but(CASES, COVERED))
def test_steps(name: str) -> None:
    run(Case(**{"residual": 8, "max_len": 60, **CASES[name]}), STEPS, ThroughCpp)


@pytest.mark.parametrize("name", fast_but([name for name in CASES if "," in name], COVERED))
def test_chunks(name: str) -> None:
    script = [30, 1, 12, -5, 9, 0, 17, 3, 40, 0, 60]
    run(Case(**{"residual": 8, "max_len": 60, **CASES[name]}), script, ChunksThroughCpp)


@pytest.mark.parametrize(
    "name",
    [
        "keys, minmax",
        "values, 3 bits, sinks",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("keys", "keys, 3 bits", "values")),
    ],
)
@pytest.mark.parametrize("isa", ["portable", "avx2"])
def test_narrower_vectors(name: str, isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if ISAS[isa].lanes > cpu_build.isa().lanes:
        pytest.skip(f"this machine has {cpu_build.isa().name} only")
    monkeypatch.setattr(cpu_build, "isa", lambda: ISAS[isa])
    run(Case(**{"residual": 8, "max_len": 60, **CASES[name]}), STEPS, ThroughCpp)


@pytest.mark.parametrize("side", ["key", "value"])
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_what_has_no_range_reads_as_nan(side: str, bad: float) -> None:
    """A group with an infinity or a NaN, and one that is constant, are stored as ``quantize_store`` stores them."""
    case = Case(side=side, residual=4, group=4, batch=1, dim=8, shared=False, max_len=24)
    mine, theirs = pair_of(case)[0], pair_of(case)[0]
    x = torch.randn(1, 1, 16, 8)
    x[0, 0, 2, 3], x[0, 0, 5], x[0, 0, 4:8, 6] = bad, 1.5, -2.0
    for t in range(16):
        for state, step in ((mine, ThroughCpp.append), (theirs, append_by_op)):
            step(state, x[:, :, t : t + 1], torch.tensor([t]))
    reads = [state.load(16) for state in (mine, theirs)]
    assert reads[0].isnan().any()
    torch.testing.assert_close(*reads, equal_nan=True)


@pytest.mark.parametrize("side", ["key", "value"])
@pytest.mark.parametrize("what", BAD_POSITIONS)
def test_faults(side: str, what: str) -> None:
    """Positions that do not follow set the fault code and touch no memory outside the tensors."""
    case, bad = Case(side=side, batch=1, shared=False), BAD_POSITIONS[what]
    layers = ThroughCpp(case)
    layers.step(0, 0, case.tokens(bad.stored, 0))
    state = layers.states[0]
    ThroughCpp.append(state, case.tokens(len(bad.positions), 1), torch.tensor(bad.positions))
    assert int(state.tensor("fault")) == bad.fault


@pytest.mark.parametrize("side", ["key", "value"])
@pytest.mark.parametrize("has_compiler", [True, False])
def test_long_prompts(side: str, has_compiler: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Uncompiled, a long chunk is stored by the kernel, or without a compiler by plain torch, which is counted."""
    monkeypatch.setattr(cpu_build, "has_compiler", lambda: has_compiler)
    if not has_compiler:
        monkeypatch.setattr(at_hand, "at_hand", lambda source, problem: None)  # nor a kernel of an earlier day
    case = Case(side=side, max_len=ops.LONG_CHUNK + 8, shared=False)
    states, x = [pair_of(case)[0] for _ in range(2)], case.tokens(ops.LONG_CHUNK, 0)
    counters["xquant"].clear()
    append_by_op(states[0], x, torch.arange(ops.LONG_CHUNK))
    assert counters["xquant"]["plain torch: no C++ compiler"] == int(not has_compiler)
    for t in range(0, ops.LONG_CHUNK, 64):
        append_by_op(states[1], x[:, :, t : t + 64], torch.arange(t, t + 64))
    torch.testing.assert_close(*(state.load(ops.LONG_CHUNK) for state in states))


@pytest.mark.parametrize("borrowed", [False, True])
def test_opcheck(borrowed: bool) -> None:
    case = Case(max_len=40)
    layers = ThroughCpp(case)
    for state in layers.states:
        state.reset()
    for layer in (0, 1):
        layers.step(layer, 0, case.tokens(20, layer))
    a = store_arguments(layers.states[int(borrowed)], case.tokens(1, 5), torch.arange(20, 21))
    a.call(*(lambda op=op, **given: torch.library.opcheck(op, (), given) for op in APPENDS))


def test_borrowed_codes_are_const() -> None:
    case = Case()
    for state, const in zip(pair_of(case), (False, True), strict=True):
        a = store_arguments(state, case.tokens(1, 0), torch.arange(1))
        types, _ = cpu_store.source(append.problem_of(a), ISAS["avx2"])
        assert (types[2] == "const int32_t*") == const


@pytest.mark.parametrize("name", ["keys, 3 bits", "values, 3 bits, sinks"])
def test_one_kernel_for_all_lengths_and_batches(name: str) -> None:
    def text(tokens: int, rows: bool = False, **more: int) -> tuple[tuple[str, ...], str]:
        case = Case(**{**CASES[name], "padding": (0,) * more.get("batch", 2), **more})
        a = store_arguments(pair_of(case)[0], case.tokens(tokens, 0), torch.arange(tokens))
        if rows:
            a = a.replace(pos=a.pos.expand(case.batch, -1), length=a.length.expand(case.batch, 2))
        return cpu_store.source(append.problem_of(a), ISAS["avx2"])

    caches = dict(max_len=60), dict(max_len=400), dict(max_len=60, batch=3)
    assert len({text(tokens, **each) for tokens in (1, 5) for each in caches}) == 1
    assert len({text(tokens, True, **each) for tokens in (1, 5) for each in caches} - {text(1, max_len=60)}) == 1


#: Slow, too: each of their options has another case.
RANKED_REPEATED = (
    "keys, head_dim 64, 2 bits",
    "keys, sinks, padding",
    "values, head_dim 64, groups of 64, 2 bits",
    "values, head_dim 80, groups of 80, 1 bits",
    "values, head_dim 24, groups of 24, 4 bits",  # groups of 24 of 96
    "values, head_dim 64, groups of 32, 3 bits",  # float16 scales
    "keys, head_dim 96, 1 bits",  # 80, 1.5
    "keys, odd groups",  # odd head_dim, quantized at once
    "keys, head_dim 80, 1.5 bits",  # token norms; head_dim 128
)


@pytest.mark.parametrize("name", fast_but((*RANKED, *RANKED_SLOW), (*RANKED_SLOW, *RANKED_REPEATED)))
def test_ranked_and_rotated_as_the_ops(name: str) -> None:
    case = {"script": RANKED_SCRIPT, **{**RANKED, **RANKED_SLOW}[name]}
    check_ranked(differences_by(ThroughCpp.append, **case))


@pytest.mark.parametrize(
    "name", fast_but([name for name in RANKED if "," in name and "bits" not in name], RANKED_REPEATED)
)
def test_ranked_and_rotated_chunks_as_the_ops(name: str) -> None:
    case = {**RANKED[name], "script": [50, 3, 20, -5, 30, 0, 70, 9, 8, 23]}
    check_ranked(differences_by(ChunksThroughCpp.by_op, longest=10**6, **case))


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("side", ["key", "value"])
def test_ranked_what_cannot_be_represented(side: str, bad: str) -> None:
    case = RANKED["keys, head_dim 16, 4 bits" if side == "key" else "values, head_dim 16, groups of 16, 8 bits"]
    check_ranked(differences_by(ThroughCpp.append, script=[8] * 8, spoil=bad, **case))
