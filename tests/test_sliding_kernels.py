"""Layers that keep a sliding window alone are stored to and read as layers that keep everything, by every kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from sliding_states import CONFIGS, LENGTH, WINDOW, decode, pair, play
from store_runs import append as append_by_op
from store_runs import store_arguments
from torch import Tensor
from triton_interpreter import Interpreter

from xquant_fx import XQuantConfig, ops
from xquant_fx.cache.state import KVState
from xquant_fx.errors import CacheStateError
from xquant_fx.kernels.decode_attention.arguments import DecodeArguments
from xquant_fx.kernels.decode_attention.plain_torch import attend

pytest_plugins = ["triton_fixture"]


def append_by_cpp(state: KVState, x: Tensor, pos: Tensor) -> None:
    """Each number of tokens is compiled, so that steps of other lengths are appended by the op."""
    if x.shape[2] not in (1, 8):
        return append_by_op(state, x, pos)
    store_arguments(state, x, pos).call(ops.APPEND_CPU, ops.APPEND_CPU_BORROWED)


@pytest.mark.parametrize(
    ("name", "append"),
    [*((name, append_by_op) for name in CONFIGS), *((name, append_by_cpp) for name in ("ranked", "range codes"))],
)
def test_steps_chunks_and_rollbacks(name: str, append: Callable[[KVState, Tensor, Tensor], None]) -> None:
    play(XQuantConfig(**CONFIGS[name]), append)


def by_cpp(a: DecodeArguments) -> Tensor:
    return ops.DECODE_CPU(**a._asdict())


NEW = dict(zip(CONFIGS, (1, 30, 3, 12), strict=True))
#: A step and a chunk, of ranked keys and of others: the kernel of each case takes seconds to compile.
CPP_SLOW = ("ranked, small groups, 3 bits", "range codes")


@pytest.mark.parametrize(
    ("name", "run"),
    [
        *((name, attend) for name in CONFIGS),
        *(pytest.param(n, by_cpp, marks=pytest.mark.slow if n in CPP_SLOW else ()) for n in CONFIGS),
    ],
)
def test_decode_attention(name: str, run: Callable[[DecodeArguments], Tensor]) -> None:
    ours, theirs = decode(XQuantConfig(**CONFIGS[name]), run, torch.float32, NEW[name])
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("name", ["ranked", pytest.param("range codes, groups of channels", marks=pytest.mark.slow)])
def test_triton_steps(name: str, interpreter: Interpreter) -> None:
    pytest.importorskip("triton")
    norms = dict(k_token_norms=True) if name == "ranked" else {}
    interpreter.call("triton_store_runs:sliding", what=name, **norms)


TRITON: dict[str, tuple[dict[str, Any], dict[str, Any], float]] = {
    "ranked": (CONFIGS["ranked"], dict(dtype="float32", new=1), 2e-5),
    "a chunk, planes": (CONFIGS["range codes, groups of channels"], dict(dtype="float32", new=12), 2e-5),
    "whole groups": (
        dict(k_bits=2, v_bits=2, k_group_size=128, k_residual_length=256, v_residual_length=128, k_token_norms=True),
        dict(dtype="float16", new=1, stored=1100, length=1300, window=600), 4e-3,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n == "ranked" else n for n in TRITON])
def test_triton_decode_attention(name: str, interpreter: Interpreter) -> None:
    pytest.importorskip("triton")
    config, how, allowed = TRITON[name]
    found = interpreter.call("triton_store_runs:sliding_attention", config=config, **how)
    assert found["error"] < allowed
    assert found["ran"] == ["interior_kernel"] * (name == "whole groups") + ["decode_kernel", "combine_kernel"]


@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_stored_is_bounded(name: str) -> None:
    """Codes hold the window, what can be rolled back, less what is in full precision, and less than 3 tiles more."""
    config = XQuantConfig(**CONFIGS[name])
    for state in pair(config, WINDOW, 1, 16):
        spec = state.spec
        assert spec.stored_tokens <= WINDOW + spec.rollback_tokens + spec.residual_length + 3 * 128 < LENGTH
        assert sum(t.nbytes for t in state.owned.values()) < sum(
            t.nbytes for t in pair(config, 0, 1, 16)[spec.role == "value"].owned.values()
        )


@pytest.mark.parametrize("bits", [2, 16])
def test_what_was_overwritten_cannot_be_rolled_back(bits: int) -> None:
    config = XQuantConfig(k_bits=bits, v_bits=bits, k_group_size=8, residual_length=16)
    state = pair(config, WINDOW, 1, 16)[0]
    for tensor in state.owned.values():
        tensor.zero_()
    state.store(torch.randn(1, 2, 300, 16), torch.arange(300))
    why = "quantized" if bits == 2 else "overwritten by what followed the window"
    with pytest.raises(CacheStateError, match=rf"at most 20 tokens can be rolled back.*{why}.*asked for 21 of 300"):
        state.truncate(279)
    with pytest.raises(CacheStateError, match="position 279"):
        state.store(torch.randn(1, 2, 1, 16), torch.arange(279, 280))
    append_by_op(state, torch.randn(1, 2, 1, 16), torch.arange(279, 280))
    assert int(state.tensor("fault")) == 3  # type: ignore[arg-type]
    state.tensor("fault").zero_()  # type: ignore[union-attr]
    state.truncate(280)


def test_windows_share_no_codes() -> None:
    config = XQuantConfig.preset("xquant")
    from xquant_fx.plan.plan import make_plan

    upper: Any = make_plan(config, 2).layers[1].value
    lower = make_plan(config, 2).layers[0].value.bind(0, (1, 2, 1024, 32), torch.float32, None, window=512)
    spec = upper.bind(1, (1, 2, 1024, 32), torch.float32, lower, window=512)
    assert spec.partner is None and "sliding window" in spec.reason
