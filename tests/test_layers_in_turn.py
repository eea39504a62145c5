"""Chunks, whose layers are compiled once and called one behind the other in Python."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from dynamo_graphs import fresh
from rewrites import ALONE, assign, quantized_layers, sdpa
from test_layers import plain
from torch import Tensor
from torch._dynamo.utils import counters

from xquant_fx import XQuantCache
from xquant_fx.compiler import inductor
from xquant_fx.kernels.cpu.in_turn import InTurn, Turn
from xquant_fx.kernels.cpu.wrapper_code import Number

CHUNK = 12
LAYERS = 7


@pytest.fixture
def whole_as_well(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The graphs that are compiled in turn, compiled as a whole, too."""
    made: list[Any] = []
    in_turn = inductor.compile_in_turn

    def both(gm: Any, inputs: Any, compile_one: Any) -> Any:
        found = in_turn(gm, inputs, compile_one)
        made.append((found, compile_one(gm, list(inputs))))
        return found

    monkeypatch.setattr(inductor, "compile_in_turn", both)
    return made


@torch.no_grad()
def test_chunks_give_what_all_layers_together_give(whole_as_well: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit, and write the same to the caches."""
    torch._dynamo.reset()
    counters.clear()
    args, layers = fresh(CHUNK), quantized_layers(ALONE, number=LAYERS)
    step = torch.compile(plain, backend="xquant", dynamic=False)
    first = [step(*args, layers, torch.arange(at, at + CHUNK)) for at in (0, CHUNK)]
    ((in_turn, whole),) = whole_as_well
    assert isinstance(in_turn, InTurn) and counters["xquant"]["layers_not_compiled_again"] == LAYERS - 3
    monkeypatch.setattr(in_turn, "turns", [])
    monkeypatch.setattr(type(in_turn), "__call__", lambda self, *given: whole(*given))
    again = quantized_layers(ALONE, number=LAYERS)
    second = [step(*args, again, torch.arange(at, at + CHUNK)) for at in (0, CHUNK)]
    assert all(map(torch.equal, first, second))
    for mine, theirs in zip(layers, again, strict=True):
        assert all(torch.equal(a.dequantize(), b.dequantize()) for a, b in zip(mine, theirs, strict=True))


@pytest.mark.slow  # of the model by hand, above, in make test
@torch.no_grad()
@pytest.mark.usefixtures("all_traced")
def test_chunks_of_a_model(tiny_llama: Any) -> None:
    """As uncompiled ones, in caches of three lengths, of which the last is not compiled for."""
    torch._dynamo.reset()
    model = tiny_llama(layers=LAYERS, head_dim=32)
    ids = torch.randint(3, 128, (1, 60), generator=torch.Generator().manual_seed(0))
    step, graphs = torch.compile(model.forward, backend="xquant"), []
    for length in (64, 96, 128):
        compiled, plain = XQuantCache(model.config, length), XQuantCache(model.config, length)
        for cache in (compiled, plain):
            model(ids[:, :12], past_key_values=cache)
        for piece in ids[:, 12:].split(24, 1):
            expected = model(piece, past_key_values=plain).logits
            torch.testing.assert_close(step(piece, past_key_values=compiled).logits, expected, rtol=1e-3, atol=1e-4)
        graphs.append(counters["xquant"]["layers_not_compiled_again"])
    assert graphs[0] and graphs[2] == graphs[1] > graphs[0]


def test_what_repeats_elements_between_pieces_keeps_the_graph_whole() -> None:
    """A copy could not be laid out so."""

    def step(q: Tensor, k: Tensor, v: Tensor, layers: Any, pos: Tensor) -> Tensor:
        loud = (q * 2).mean(3, keepdim=True).expand(q.shape)
        for keys, values in layers:
            assign(keys, values, k, v, pos)
            q = sdpa(q, keys, values)
            k, v = k + q, v * loud
        return q

    counters.clear()
    args, expected = fresh(CHUNK), quantized_layers(ALONE, number=LAYERS)
    with torch.no_grad():
        made = torch.compile(step, backend="xquant", dynamic=False)(
            *args, quantized_layers(ALONE, number=LAYERS), torch.arange(CHUNK)
        )
        torch.testing.assert_close(made, step(*args, expected, torch.arange(CHUNK)), rtol=1e-4, atol=1e-5)
    reasons = [name for name in counters["xquant"] if name.startswith("layers compiled together")]
    assert len(reasons) == 1 and "repeats elements" in reasons[0]


def test_steps_become_one_call() -> None:
    """Of up to 8 tokens: those are not called in Python."""
    counters.clear()
    step = torch.compile(plain, backend="xquant", dynamic=False)
    with torch.no_grad():
        step(*fresh(8), quantized_layers(ALONE, number=LAYERS), torch.arange(8))
    assert counters["xquant"]["one_call"] == 1


@pytest.mark.parametrize(("strides", "kept"), [((3, 1), 0), ((1, 2), 1), (None, 1)])
def test_what_no_later_piece_reads_is_let_go(strides: tuple[int, ...] | None, kept: int) -> None:
    """And what the next piece is given is laid out as it was told: by a copy, where it must be."""
    alive: list[weakref.ref[Tensor]] = []

    def doubled(x: Tensor, n: int) -> tuple[Tensor, ...]:
        assert sum(each() is not None for each in alive) == (kept if alive else 0)
        out = (x * 2).t().contiguous().t()
        alive.append(weakref.ref(out))
        return out, n  # type: ignore[return-value]

    turns = [Turn(doubled, [f"x{i}", "n"], [f"x{i + 1}", f"m{i}"], [strides, None]) for i in range(4)]
    run = InTurn(["x0", "n"], turns, ["x4", None, Number("n + 1"), "m1"])
    x, *others = run(torch.ones(2, 3), 5)
    assert x.stride() == (strides or (1, 2)) and torch.equal(x, torch.full((2, 3), 16.0))
    assert others == [None, 6, 5]


def test_results_that_are_numbers_or_of_open_shape() -> None:
    """A loop that counts along, and a piece that returns what grows."""

    def step(q: Tensor, k: Tensor, v: Tensor, layers: Any, begin: int, history: Tensor) -> Any:
        q = q * (begin + 1)
        out = plain(q, k, v, layers, torch.arange(CHUNK) + begin)
        return out, torch.cat([history, out.flatten(2)], 1), begin + CHUNK

    torch._dynamo.reset()
    counters.clear()
    args, layers = fresh(CHUNK), quantized_layers(ALONE, number=LAYERS)
    history, begin = torch.zeros(1, 2, CHUNK * args[0].shape[3]), 0
    twin, mine = quantized_layers(ALONE, number=LAYERS), torch.compile(step, backend="xquant")
    for turn in range(3):
        with torch.no_grad():
            expected = step(*args, twin, begin, history)
            found = mine(*args, layers, begin, history)
        torch.testing.assert_close(found[:2], expected[:2], rtol=1e-4, atol=1e-5)
        assert found[2] == expected[2] == CHUNK * (turn + 1)
        history, begin = expected[1], expected[2]
    assert counters["xquant"]["layers_not_compiled_again"] == 2 * (LAYERS - 3), "of a known history, and of any"
