"""Layers that are compiled one by one take over their parts of one tensor; what is left of it is as it was."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from stepping import interpreted
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed
from torch.nn.functional import scaled_dot_product_attention as sdpa

from xquant_fx import XQuantConfig, memory_report
from xquant_fx.cache.kv_tensor import QuantizedKV
from xquant_fx.cache.stacked import StackedKV

BATCH, LAYERS, KV, DIM, LENGTH = 2, 2, 2, 16, 64
PART = BATCH, KV, LENGTH, DIM
FULL = XQuantConfig.preset("full")
CONFIG = XQuantConfig.preset("kivi-4").replace(k_group_size=8, residual_length=8, rollback_tokens=8)
SIZES = 1, 1, 9, 1
Parts = Callable[[Any, int, int], Tensor]
#: The shape of the tensor, and where a layer's keys and values are.
HOLDERS: dict[str, tuple[tuple[int, ...], Parts]] = {
    "L2": ((LAYERS, 2, *PART), lambda kv, layer, side: kv[layer, side]),
    "2L": ((2, LAYERS, *PART), lambda kv, layer, side: kv[side, layer]),
    "B2L": ((BATCH, 2, LAYERS, KV, LENGTH, DIM), lambda kv, layer, side: kv[:, side, layer]),
}


class Layer(nn.Module):
    """One layer; its number is a constant to Dynamo, as that of a closure is not."""

    def __init__(self, number: int, part: Parts, hide: bool = True) -> None:
        super().__init__()
        self.number, self.part, self.hide = number, part, hide

    def forward(self, kv: Any, x: Tensor, pos: Tensor) -> Tensor:
        self.part(kv, self.number, 0)[:, :, pos] = x
        self.part(kv, self.number, 1)[:, :, pos] = 2 * x + self.number
        mask = torch.arange(LENGTH) <= pos[:, None] if self.hide else None
        keys, values = (self.part(kv, self.number, side) for side in range(2))
        return x + sdpa(x, keys, values, attn_mask=mask)


def compiled(steps: list[Any], **options: Any) -> list[Any]:
    torch._dynamo.reset()
    return [torch.compile(step, backend=interpreted(**options)) for step in steps]


@torch.no_grad()
def run(layers: list[Any], kv: Any, sizes: tuple[int, ...], begin: int = 0) -> Tensor:
    """What steps of ``sizes`` tokens give."""
    out, at = [], begin
    for n in sizes:
        x = torch.randn(BATCH, KV, n, DIM, generator=torch.Generator().manual_seed(at))
        for layer in layers:
            x = layer(kv, x, torch.arange(at, at + n))
        out.append(x)
        at += n
    return torch.cat(out, 2)


def filled(holder: str) -> tuple[list[Any], Tensor]:
    """Each layer's step, and the tensor after a prompt in eager code."""
    shape, part = HOLDERS[holder]
    layers, kv = [Layer(number, part) for number in range(LAYERS)], torch.zeros(shape)
    run(layers, kv, (12,))
    return layers, kv


@pytest.fixture(scope="module")
def apart() -> tuple[Tensor, int]:
    """What steps give with buffers apart, and the bytes of these."""
    _, kv = filled("L2")
    buffers = [[kv[number, side].clone() for side in range(2)] for number in range(LAYERS)]
    usual = [Layer(number, lambda kv, layer, side: kv[layer][side]) for number in range(LAYERS)]
    out = run(compiled(usual, config=CONFIG), buffers, SIZES, 12)
    return out, memory_report([each for pair in buffers for each in pair]).total_bytes


# The holder "B2L" is "2L" with a dimension before it; test_stacked.py has "2L" too.
@pytest.mark.parametrize("holder", ["L2", pytest.param("2L", marks=pytest.mark.slow), "B2L"])
def test_layer_by_layer_is_as_buffers_apart(holder: str, apart: tuple[Tensor, int]) -> None:
    layers, kv = filled(holder)
    exact, copied = kv.clone(), kv.clone()
    expected = run(layers, exact, SIZES, 12)
    torch.testing.assert_close(run(compiled(layers, config=FULL), copied, SIZES, 12), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(copied.dequantize(), exact)
    got = run(compiled(layers, config=CONFIG), kv, SIZES, 12)
    assert torch.equal(got, apart[0]) and type(kv) is StackedKV and len(kv.leaves) == 2 * LAYERS
    assert memory_report(kv.leaves).total_bytes == apart[1]


@pytest.mark.parametrize("holder", ["L2", pytest.param("B2L", marks=pytest.mark.slow)])
def test_what_is_left_of_it_is_as_it_was(holder: str) -> None:
    """Read, written to through views, copied, saved, emptied; then taken over in turn."""
    layers, kv = filled(holder)
    part, exact = HOLDERS[holder][1], kv.clone()
    for held in (kv, exact):  # layers beyond the first are eager code's
        run([*compiled(layers[:1], config=FULL), *layers[1:]] if held is kv else layers, held, (1, 1), 12)
    assert type(kv) is StackedKV and {type(leaf) for leaf in kv.leaves} >= {Tensor}
    torch.testing.assert_close(kv.dequantize(), exact, rtol=1e-5, atol=1e-5)
    assert isinstance(kv.leaves[0], QuantizedKV) and type(part(kv, 1, 0)) is Tensor
    with torch.no_grad():
        for held in (kv, exact):
            part(held, 1, 0).mul_(3)
            part(held, 1, 1)[:, :, :5].copy_(torch.ones(BATCH, KV, 5, DIM))
    torch.testing.assert_close(part(kv, 1, 0), part(exact, 1, 0), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(kv.clone(), exact, rtol=1e-5, atol=1e-5)
    file = io.BytesIO()
    torch.save(kv, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    for held in (copy.deepcopy(kv), loaded, kv):
        torch.testing.assert_close(held.dequantize(), exact)
        sizes = (1, 2, 1) if held is kv else (1, 1)
        rest = run(compiled(layers, config=FULL), held, sizes, 14)
        torch.testing.assert_close(rest, run(layers, exact.clone(), sizes, 14), rtol=1e-5, atol=1e-5)
        # Torch does not own the memory of what it loads.
        assert all(isinstance(leaf, QuantizedKV) for leaf in held.leaves) or held is loaded
    kv.zero_()
    assert not kv.dequantize().any()
    run(layers, exact.zero_(), (3,)), run(layers, kv, (3,))
    torch.testing.assert_close(kv.dequantize(), exact)


def test_a_part_that_somebody_sees_stays_as_it_is(caplog: pytest.LogCaptureFixture) -> None:
    layers, kv = filled("L2")
    exact = kv.clone()
    run([*compiled(layers[:1], config=FULL), layers[1]], kv, (1,), 12)
    run(layers, exact, (1,), 12)
    seen = kv[1]
    got = run(compiled(layers, config=FULL), kv, (1, 1), 13)
    torch.testing.assert_close(got, run(layers, exact, (1, 1), 13), rtol=1e-5, atol=1e-5)
    assert torch.equal(seen, kv[1]) and "shares the buffer's memory" in caplog.text
    with pytest.raises(BackendCompilerFailed, match="shares the buffer's memory"):
        run(compiled(layers, config=FULL, strict=True), kv, (1,), 15)


def test_layers_are_given_back_one_by_one() -> None:
    """A rotating buffer starts over, and no mask hides what it held."""
    layers = [Layer(number, HOLDERS["L2"][1], hide=False) for number in range(LAYERS)]
    kv, fast = torch.zeros(HOLDERS["L2"][0]), compiled(layers, config=FULL, self_check=False)
    exact = kv.clone()
    for at in (0, 1, 2, 0, 1):
        x = torch.randn(BATCH, KV, 1, DIM)
        with torch.no_grad():
            for number in range(LAYERS):
                pos = torch.tensor([at])
                got, wanted = fast[number](kv, x, pos), layers[number](exact, x, pos)
                torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
                x = wanted
                torch.testing.assert_close(kv.clone() if type(kv) is Tensor else kv.dequantize(), exact)
    assert type(kv) is Tensor


def test_a_layer_that_breaks_off_changes_nothing() -> None:
    layers, kv = filled("L2")
    exact = kv.clone()

    def breaks(kv: Any, x: Tensor, pos: Tensor) -> Tensor:
        kv[1, 0][:, :, pos] = x
        x = x + torch.linalg.cholesky(x[0, 0, 0, 0].abs() * -torch.ones(1, 1))
        kv[1, 1][:, :, pos] = x
        return sdpa(x, kv[1, 0], kv[1, 1], attn_mask=torch.arange(LENGTH) <= pos[:, None])

    fast = compiled([layers[0], breaks], config=FULL)
    with pytest.raises(RuntimeError, match="cholesky"):
        run(fast, kv, (1,), 12)
    run(layers[:1], exact, (1,), 12)
    torch.testing.assert_close(kv.dequantize(), exact, rtol=1e-5, atol=1e-5)
    assert {type(leaf) for leaf in kv.leaves} == {QuantizedKV, Tensor}


@pytest.mark.parametrize("backend", ["xquant", pytest.param(interpreted(), id="interpreted")])
def test_a_graph_may_write_to_some_tokens_of_a_layer_that_is_left(backend: Any) -> None:
    """By Inductor, too, which has to know that the sizes of the part are numbers."""
    shape, part = HOLDERS["L2"]
    kv = torch.zeros(shape)
    run(compiled([Layer(0, part)], config=FULL), kv, (20, 1))
    assert type(kv) is StackedKV and type(kv.leaves[-1]) is Tensor
    before = kv.dequantize()

    def fill(kv: Any) -> Tensor:
        kv[1, 1, :, :, :5].fill_(2.0)
        return kv[1, 1].sum()

    with torch.no_grad():
        torch.testing.assert_close(torch.compile(fill, backend=backend)(kv), fill(before))
    assert torch.equal(kv.dequantize(), before)
