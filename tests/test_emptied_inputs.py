"""A compiled function that begins a sequence by emptying its buffers: they are quantized and stay so."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from numeric import seeded
from stepping import interpreted
from torch import Tensor
from torch._dynamo.exc import BackendCompilerFailed
from torch._dynamo.utils import counters
from torch.nn.functional import scaled_dot_product_attention as sdpa

from xquant_fx import XQuantConfig, explain
from xquant_fx.cache.kv_tensor import QuantizedKV
from xquant_fx.cache.stacked import StackedKV

FULL = XQuantConfig.preset("full")
LENGTH, DIM = 48, 16
EMPTY: dict[str, Callable[[Tensor], Any]] = {
    "zero_": lambda x: x.zero_(),
    "fill_": lambda x: x.fill_(0),
    "assigned": lambda x: x.__setitem__(slice(None), 0.0),
    "assigned to all": lambda x: x.__setitem__((..., slice(None), slice(0, None)), 0),
}
SIZES = 12, 1, 1, 1


def attend(x: Tensor, keys: Tensor, values: Tensor, pos: Tensor) -> Tensor:
    keys[:, :, pos], values[:, :, pos] = x, 2 * x
    return sdpa(x, keys, values, attn_mask=torch.arange(LENGTH) <= pos[:, None])


def stepper(empty: Callable[[Tensor], Any]) -> Callable[..., Tensor]:
    def step(x: Tensor, keys: Tensor, values: Tensor, pos: Tensor, begins: bool) -> Tensor:
        if begins:
            empty(keys)
            empty(values)
        return attend(x, keys, values, pos)

    return step


def fresh(fill: float = 0.0) -> list[Tensor]:
    return [torch.full((2, 2, LENGTH, DIM), fill) for _ in range(2)]


@torch.no_grad()
def sequences(step: Callable[..., Tensor], buffers: list[Tensor], count: int = 3) -> Tensor:
    out, generator = [], seeded(0)
    for _ in range(count):
        at = 0
        for n in SIZES:
            x = torch.randn(2, 2, n, DIM, generator=generator)
            out.append(step(x, *buffers, torch.arange(at, at + n), at == 0))
            at += n
    return torch.cat(out, 2)


@pytest.mark.parametrize("fill", [0.0, 3.0])
@pytest.mark.parametrize("way", EMPTY)
def test_each_sequence_is_quantized(way: str, fill: float) -> None:
    """Whatever the buffers held at first, as those of torch.empty do."""
    step, buffers, others = stepper(EMPTY[way]), fresh(fill), fresh(fill)
    counters.clear()
    got = sequences(torch.compile(step, backend=interpreted(config=FULL)), buffers)
    torch.testing.assert_close(got, sequences(step, others), rtol=1e-5, atol=1e-5)
    for buffer, other in zip(buffers, others, strict=True):
        assert isinstance(buffer, QuantizedKV)
        torch.testing.assert_close(buffer.dequantize(), other, rtol=1e-5, atol=1e-5)
    assert counters["stats"]["unique_graphs"] == 3  # a prompt, a step, and a prompt of buffers that are quantized


def test_parts_of_a_stack() -> None:
    def step(x: Tensor, kv: Tensor, pos: Tensor, begins: bool) -> Tensor:
        if begins:
            kv.zero_()
        kv[0][:, :, pos], kv[1][:, :, pos] = x, 2 * x
        return sdpa(x, kv[0], kv[1], attn_mask=torch.arange(LENGTH) <= pos[:, None])

    stacks = [torch.stack(fresh()) for _ in range(2)]
    got = sequences(torch.compile(step, backend=interpreted(config=FULL)), stacks[:1])
    torch.testing.assert_close(got, sequences(step, stacks[1:]), rtol=1e-5, atol=1e-5)
    assert type(stacks[0]) is StackedKV


def test_it_is_explained() -> None:
    with torch.no_grad():
        found = explain(stepper(EMPTY["zero_"]), torch.randn(2, 2, 12, DIM), *fresh(), torch.arange(12), True)
    assert [site.rewritten for site in found.sites] == [True]


def read_before(x: Tensor, keys: Tensor, values: Tensor, pos: Tensor, begins: bool) -> Tensor:
    before = keys.sum()
    keys.zero_()
    return attend(x, keys, values, pos) + before


def ones(x: Tensor, keys: Tensor, values: Tensor, pos: Tensor, begins: bool) -> Tensor:
    keys.fill_(1)
    return attend(x, keys, values, pos)


def some_tokens(x: Tensor, keys: Tensor, values: Tensor, pos: Tensor, begins: bool) -> Tensor:
    keys[:, :, 3:] = 0
    return attend(x, keys, values, pos)


def behind_the_append(x: Tensor, keys: Tensor, values: Tensor, pos: Tensor, begins: bool) -> Tensor:
    out = attend(x, keys, values, pos)
    keys.zero_()
    return out


@pytest.mark.parametrize("step", [read_before, ones, some_tokens, behind_the_append])
def test_what_does_not_begin_a_sequence_is_left_alone(step: Callable[..., Tensor]) -> None:
    buffers, others = fresh(), fresh()
    got = sequences(torch.compile(step, backend=interpreted(config=FULL)), buffers, 1)
    torch.testing.assert_close(got, sequences(step, others, 1), rtol=1e-5, atol=1e-5)
    assert type(buffers[0]) is Tensor and torch.equal(buffers[0], others[0])


def test_memory_that_is_read_by_another_name_is_not_emptied_before() -> None:
    def step(x: Tensor, keys: Tensor, values: Tensor, other: Tensor, pos: Tensor) -> Tensor:
        before = other.sum()
        keys.zero_()
        return attend(x, keys, values, pos) + before

    outs = []
    for compiled in (False, True):
        keys, values = fresh(1.0)
        run = torch.compile(step, backend=interpreted(config=FULL)) if compiled else step
        with torch.no_grad():
            outs.append(run(torch.ones(2, 2, 1, DIM), keys, values, keys.view(-1)[5:], torch.tensor([0])))
    assert torch.equal(*outs)


def test_a_refused_step_leaves_what_was_there() -> None:
    def step(x: Tensor, keys: Tensor, values: Tensor, pos: Tensor) -> Tensor:
        keys.zero_()
        return attend(x, keys, values, pos)

    keys, values = fresh(1.0)  # values hold numbers at the first position
    compiled = torch.compile(step, backend=interpreted(config=FULL, strict=True))
    with torch.no_grad(), pytest.raises(BackendCompilerFailed, match="NotRewrittenError: strict=True"):
        compiled(torch.ones(2, 2, 1, DIM), keys, values, torch.tensor([0]))
    assert bool((keys == 1).all())
