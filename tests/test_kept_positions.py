"""A buffer of positions that is moved on between the append and the attention, as torchtune counts tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from rewrites import Rewrites, count
from stepping import interpreted
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention as sdpa

from xquant_fx import XQuantConfig, ops
from xquant_fx.cache.kv_tensor import QuantizedKV

CONFIG = XQuantConfig.preset("kivi-4").replace(k_bits=8, v_bits=8, k_group_size=8, residual_length=8, rollback_tokens=8)
LENGTH = 64


def assigned(buffer: Tensor, at: Tensor, x: Tensor) -> None:
    buffer[:, :, at] = x


def copied(buffer: Tensor, at: Tensor, x: Tensor) -> None:
    buffer.index_copy_(2, at, x)


class Attention(nn.Module):
    """``moves`` says before which of the two appends, if any, positions are moved on, and back again."""

    def __init__(self, write: Any, between: bool = False) -> None:
        super().__init__()
        self.write, self.between = write, between
        self.keys, self.values = (nn.Buffer(torch.zeros(1, 2, LENGTH, 16)) for _ in range(2))
        self.positions = nn.Buffer(torch.arange(LENGTH))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        n = x.shape[2]
        self.write(self.keys, self.positions[:n], x)
        if self.between:
            self.positions.add_(n)
            self.write(self.values, self.positions[:n] - n, 2 * x)
        else:
            self.write(self.values, self.positions[:n], 2 * x)
            self.positions.add_(n)
        return sdpa(x, self.keys, self.values, attn_mask=mask)


@torch.no_grad()
def steps(step: Callable[..., Tensor]) -> list[Tensor]:
    out, p = [], 0
    for n in (20, *[1] * 20, 3):
        x = torch.randn(1, 2, n, 16, generator=torch.Generator().manual_seed(p))
        out.append(step(x, torch.ones(n, LENGTH, dtype=torch.bool).tril(p)))
        p += n
    return out


@pytest.mark.parametrize("write", [assigned, copied])
def test_it_is_fused(write: Any) -> None:
    seen, fast, plain = Rewrites(config=CONFIG), Attention(write), Attention(write)
    for got, want in zip(steps(torch.compile(fast, backend=seen)), steps(plain), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0.05)
    assert count(seen.made[-1], ops.DECODE) == 1 and count(seen.made[-1], ops.LOAD) == 0
    assert isinstance(fast.keys, QuantizedKV) and torch.equal(fast.positions, plain.positions)
    torch.testing.assert_close(fast.keys.dequantize(), plain.keys, rtol=0, atol=0.05)


def test_positions_that_move_between_two_appends() -> None:
    """They are moved back for the second one: both are at the same tokens, and nothing may say that by names."""
    seen, fast, plain = (
        Rewrites(config=XQuantConfig.preset("full")),
        Attention(assigned, True),
        Attention(assigned, True),
    )
    for got, want in zip(steps(torch.compile(fast, backend=seen)), steps(plain), strict=True):
        torch.testing.assert_close(got, want)
    assert all(count(graph, ops.DECODE) == 0 for graph in seen.made)


class Skips(Attention):
    """The second append is really one step further on."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        n = x.shape[2]
        self.write(self.keys, self.positions[:n], x)
        self.positions.add_(n)
        self.write(self.values, self.positions[:n], 2 * x)
        return sdpa(x, self.keys, self.values, attn_mask=mask)


def test_appends_at_different_positions_are_not_one_step() -> None:
    fast, plain = Skips(assigned), Skips(assigned)
    for got, want in zip(steps(torch.compile(fast, backend=Rewrites(config=CONFIG))), steps(plain), strict=True):
        torch.testing.assert_close(got, want)


class Rotating(nn.Module):
    """One position, which starts over when the buffer is full."""

    def __init__(self) -> None:
        super().__init__()
        self.keys, self.values = (torch.zeros(1, 2, 16, 16) for _ in range(2))

    def forward(self, x: Tensor, pos: Tensor) -> Tensor:
        self.keys[:, :, pos], self.values[:, :, pos] = x, 2 * x
        pos.add_(1)
        return sdpa(x, self.keys, self.values)


def test_a_buffer_that_starts_over_is_given_back() -> None:
    """It is told before the step, by the positions that are passed in."""
    fast, plain = Rotating(), Rotating()
    step, at = (
        torch.compile(fast, backend=interpreted(config=CONFIG)),
        [torch.zeros(1, dtype=torch.int64) for _ in "12"],
    )
    with torch.no_grad():
        for number in range(20):
            x = torch.randn(1, 2, 1, 16)
            for pos in at:
                pos.remainder_(16)
            torch.testing.assert_close(step(x, at[0]), plain(x, at[1]), rtol=0, atol=0.05)
            assert isinstance(fast.keys, QuantizedKV) == (number < 16)
    assert torch.equal(*at)
