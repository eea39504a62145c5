"""What a buffer must hold to be taken over: tokens up to the first that is written, and nothing behind them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from xquant_fx.compiler.proof import why_not_held

HELD = 7
BUFFERS: dict[str, Callable[..., Tensor]] = {
    "whole words": lambda **of: torch.zeros(2, 3, 20, 64, **of),
    "no whole words": lambda **of: torch.zeros(2, 3, 20, 5, **of),
    "tokens before heads": lambda **of: torch.zeros(2, 20, 3, 64, **of).transpose(1, 2),
    "tokens last": lambda **of: torch.zeros(2, 3, 64, 20, **of).mT,
    "a part": lambda **of: torch.zeros(2, 3, 20, 67, **of)[..., 1:65],
}


@pytest.fixture(params=BUFFERS)
def buffer(request: pytest.FixtureRequest, dtype: torch.dtype) -> Tensor:
    made = BUFFERS[request.param](dtype=dtype)
    made[:, :, :HELD] = 1
    return made


@pytest.fixture(params=[torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    found: torch.dtype = request.param
    return found


def test_tokens_and_nothing_behind_them(buffer: Tensor) -> None:
    assert why_not_held(buffer, HELD) == ""
    assert f"behind position {HELD - 1}" in why_not_held(buffer, HELD - 1)
    assert f"empty at position {HELD}" in why_not_held(buffer, HELD + 1)


def test_no_number_behind_them_is_missed(buffer: Tensor) -> None:
    for number in (float("nan"), -1.0, torch.finfo(buffer.dtype).tiny):
        for at in ((0, 0, HELD, 0), (1, 2, 19, buffer.shape[3] - 1)):
            other = buffer.clone()
            other[at] = number
            assert f"behind position {HELD}" in why_not_held(other, HELD)


def test_a_zero_of_either_sign_is_nothing(buffer: Tensor) -> None:
    buffer[:, :, HELD:] = -0.0
    assert why_not_held(buffer, HELD) == ""


def test_a_token_is_there_if_any_head_of_it_is(buffer: Tensor) -> None:
    buffer[0, 0, 3] = 0
    assert why_not_held(buffer, HELD) == ""
    buffer[:, :, 3] = 0
    assert "empty at position 3" in why_not_held(buffer, HELD)
