"""The C++ kernel that dequantizes in uncompiled code, beside plain torch: the same bits, but where it rotates."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from fast_and_slow import fast_but
from sliding_states import CONFIGS, play
from states import layers_of
from store_reference import Case
from store_runs import ThroughState, load_arguments, run
from store_runs import append as append_by_op
from torch import Tensor

from xquant_fx import XQuantConfig, ops
from xquant_fx.kernels.cpu import build as cpu_build
from xquant_fx.kernels.cpu.isa import ISAS
from xquant_fx.kernels.rotation import rotated_size
from xquant_fx.kernels.schemes import SCHEMES
from xquant_fx.kernels.shared_code_load import cpu_call
from xquant_fx.kernels.shared_code_load.arguments import LoadArguments

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
SCRIPT = [19, 1, 2, 3, 8, 20, 3, -8, 5, 4, 30, 1]
CASES: dict[str, dict[str, Any]] = {
    "keys, 1 bit, float32": dict(bits=1, dtype=F32, dim=8, group=4, sinks=5, padding=(3, 0)),
    "keys, 2 bits": dict(bits=2, dtype=BF16, dim=40, heads=2, scale_dtype=BF16, group=1),
    "keys, 3 bits, sinks, padding": dict(bits=3, dtype=F16, sinks=2, padding=(0, 5), scale_dtype=F32),
    "keys, 8 bits": dict(bits=8, dtype=F32, dim=96),
    "values, 1 bit": dict(side="value", bits=1, dtype=F16, dim=8, group=8),
    "values, 2 bits": dict(side="value", bits=2, dtype=F32, dim=96, group=32, sinks=3),
    "values, 3 bits, sinks, padding": dict(side="value", bits=3, dtype=BF16, dim=24, sinks=2, padding=(2, 0), group=8),
}
COVERED = {
    "keys, 1 bit, float32": "keys, 3 bits, sinks, padding",
    "keys, 8 bits": "keys, 3 bits, sinks, padding; sliding windows",
    "values, 1 bit": "values, 3 bits, sinks, padding",
    "values, 2 bits": "values, 3 bits, sinks, padding; sliding windows",
}


def check(a: LoadArguments, want: Tensor, got: Tensor) -> None:
    """The same, NaN included; sums of a rotation may be taken in another order, and then be rounded."""
    if SCHEMES[a.scheme].APPEND not in ("rotated", "folded"):
        torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)
        return
    assert torch.equal(got.isnan(), want.isnan())
    n = rotated_size(want.shape[3])
    terms = torch.nan_to_num(want.double()).norm(dim=3, keepdim=True)  # as long as the rotated token is
    sums = n * torch.finfo(F32).eps * terms
    rounding = torch.finfo(want.dtype).eps * torch.nan_to_num(want.double()).abs()
    assert (torch.nan_to_num((got.double() - want.double()).abs()) <= sums + rounding).all()


@pytest.fixture
def compared(monkeypatch: pytest.MonkeyPatch) -> list[LoadArguments]:
    """What plain torch has dequantized so far; the kernel has, too, and gave the same."""
    seen: list[LoadArguments] = []
    plain: Callable[[LoadArguments], Tensor] = ops.plain_load.load

    def both(a: LoadArguments) -> Tensor:
        want = plain(a)
        check(a, want, cpu_call.run(a))
        seen.append(a)
        return want

    monkeypatch.setattr(cpu_call, "dequantized", lambda a: None)  # which is plain torch's turn
    monkeypatch.setattr(ops.plain_load, "load", both)
    return seen


@pytest.mark.parametrize("name", fast_but(CASES, COVERED))
def test_any_step(name: str, compared: list[LoadArguments]) -> None:
    run(Case(**{"residual": 16, "group": 8, "max_len": 120, **CASES[name]}), SCRIPT, ThroughState)
    assert {a.x is None for a in compared} == {True, False}


@pytest.mark.parametrize("name", fast_but(CONFIGS, {"range codes": "range codes, groups of channels"}))
def test_sliding_windows(name: str, compared: list[LoadArguments]) -> None:
    play(XQuantConfig(**CONFIGS[name]), append_by_op)
    assert len(compared) > 40


@pytest.mark.parametrize("isa", ["portable", "avx2"])
@pytest.mark.parametrize("scheme", ["per_token_rotated", "per_token_folded"])
def test_the_default_schemes(scheme: str, isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranked keys, and values that are rotated here or come rotated, from any token on."""
    if ISAS[isa].lanes > cpu_build.isa().lanes:
        pytest.skip(f"this machine has {cpu_build.isa().name} only")
    monkeypatch.setattr(cpu_build, "isa", lambda: ISAS[isa])
    config = XQuantConfig(v_scheme=scheme, k_residual_length=32, v_residual_length=20, k_group_size=16, sink_tokens=2)
    for state in layers_of(config, (2, 2, 128, 48), F16)[0]:
        x = torch.randn(2, 2, 100, 48, generator=torch.Generator().manual_seed(1), dtype=F16)
        append_by_op(state, x[:, :, :90], torch.arange(90))
        append_by_op(state, x[:, :, 90:], torch.arange(90, 100))
        for new, first, n in ((10, 0, 128), (10, 70, 30), (1, 37, 1)):
            begin = torch.tensor([first]) if first else None
            a = LoadArguments(**load_arguments(state, 100 - new, new, n, first=begin))
            assert a.scheme in (scheme, "per_channel_ranked")
            check(a, ops.plain_load.load(a), cpu_call.run(a))


def test_before_channels_have_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A group of padding alone is quantized before there is a group to rank channels by; all of it is written."""
    config = XQuantConfig(k_residual_length=32, k_group_size=16)
    for ragged_start in ([0, 90], [0, 0]):
        key, _ = layers_of(config, (2, 2, 128, 24), F32, start=torch.tensor(ragged_start))[0]
        append_by_op(key, torch.randn(2, 2, 100, 24, generator=torch.Generator().manual_seed(1)), torch.arange(100))
        a = LoadArguments(**load_arguments(key, 99, 1, 128))
        assert (a.order is not None and not a.order[1].any()) == (ragged_start[1] > 0)
        monkeypatch.setattr(torch, "empty", lambda *size, **more: torch.full(*size, torch.nan, **more))
        got = cpu_call.run(a)
        monkeypatch.undo()
        assert not got.isnan().any()
        seen = torch.arange(128) >= torch.tensor(ragged_start)[:, None]
        want = torch.where(seen[:, None, :, None], ops.plain_load.load(a), got)
        torch.testing.assert_close(got, want, rtol=0, atol=0)
