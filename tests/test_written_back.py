"""Uncompiled steps that write before older tokens of a buffer that was taken over: eager code shows no mask."""

from __future__ import annotations

import copy

import pytest
import torch
from stepping import interpreted
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

from xquant_fx import XQuantConfig
from xquant_fx.cache.kv_tensor import QuantizedKV

SLOTS, SINKS = 12, 2
FULL = XQuantConfig.preset("full")


def step(x: Tensor, keys: Tensor, values: Tensor, pos: Tensor, seen: Tensor) -> Tensor:
    keys[:, :, pos], values[:, :, pos] = x, 2 * x
    return sdpa(x, keys, values, attn_mask=seen)


def compiled(config: XQuantConfig = FULL):
    torch._dynamo.reset()
    return torch.compile(step, backend=interpreted(config=config))


def tokens(n: int, seed: int) -> Tensor:
    return torch.randn(1, 2, n, 16, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def test_a_rotating_buffer_shows_older_tokens_and_is_given_back_by_the_next_compiled_step():
    buffers = [torch.zeros(1, 2, SLOTS, 16) for _ in range(2)]
    plain, fast = [buffer.clone() for buffer in buffers], compiled()
    for t in range(30):
        at = t if t < SLOTS else SINKS + (t - SINKS) % (SLOTS - SINKS)
        pos, seen = torch.tensor([at]), torch.arange(SLOTS)[None] <= t
        run = step if 5 <= t < 26 else fast
        torch.testing.assert_close(run(tokens(1, t), *buffers, pos, seen), step(tokens(1, t), *plain, pos, seen))
        assert type(buffers[0]) is (QuantizedKV if t < 26 else Tensor)
    torch.testing.assert_close(buffers, plain)


@torch.no_grad()
@pytest.mark.parametrize("change", ["copy", "zero"])
def test_a_new_sequence_whose_mask_hides_the_old_one_stays_quantized(change: str):
    buffers = [torch.zeros(1, 2, SLOTS, 16) for _ in range(2)]
    plain, fast = [buffer.clone() for buffer in buffers], compiled()
    for t, (at, n, run) in enumerate(
        [(0, 4, step), (4, 1, fast), (5, 1, fast), (0, 3, step), (3, 1, step), (4, 1, fast)]
    ):
        pos = torch.arange(at, at + n)
        seen = torch.arange(SLOTS)[None] <= pos[:, None]
        if t == 4:
            assert buffers[0].state.behind is not None
            torch.testing.assert_close(buffers[0].dequantize(), plain[0])
            if change == "copy":
                buffers = copy.deepcopy(buffers)
            else:
                for buffer in (*buffers, *plain):
                    buffer[:, :, 3:].zero_() if type(buffer) is Tensor else buffer.zero_()
                for buffer, numbers in zip(buffers, plain, strict=True):
                    buffer[:, :, :3] = numbers[:, :, :3]
        torch.testing.assert_close(run(tokens(n, t), *buffers, pos, seen), step(tokens(n, t), *plain, pos, seen))
    assert type(buffers[0]) is QuantizedKV and buffers[0].state.behind is None
