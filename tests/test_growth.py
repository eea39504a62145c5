"""More room for a cache that grows: what is stored stays as it is, and how often it is compiled for."""

from __future__ import annotations

import ast
import dataclasses

import pytest
import torch
from plain_decoder import Decoder
from states import layers_of
from torch._dynamo.utils import counters
from transformers import DynamicCache

from xquant_fx import XQuantCache, XQuantConfig
from xquant_fx.cache.growing import GrowingKV
from xquant_fx.cache.growth import Growth, with_lasting_room
from xquant_fx.cache.room import enlarge, respec
from xquant_fx.cache.state import KVState
from xquant_fx.kernels.cpu.any_room import Rooms

FORMATS = {
    "the default": XQuantConfig(),
    "values of 3 bits, rotated": XQuantConfig(v_bits=3),
    "3 bits": XQuantConfig.preset("kivi-4").replace(k_bits=3, v_bits=3),
    "4 bits": XQuantConfig.preset("kivi-4"),
    "1 bit, shared": XQuantConfig.preset("xquant-1bit"),
    "16 bits": XQuantConfig.preset("full"),
}


def filled(config: XQuantConfig, layers: int = 2) -> list[KVState]:
    """States of all layers and sides with room for 512 tokens, 505 of them stored."""
    states = [state for layer in layers_of(config, (1, 2, 512, 64), torch.float32, layers) for state in layer]
    torch.manual_seed(0)
    x = torch.randn(len(states), 1, 2, 505, 64)
    for begin, end in ((0, 500), *((i, i + 1) for i in range(500, 505))):
        for state, tokens in zip(states, x, strict=True):
            state.store(tokens[:, :, begin:end], torch.arange(begin, end))
    return states


@pytest.mark.parametrize("name", FORMATS)
def test_what_is_stored_stays(name: str) -> None:
    states = filled(FORMATS[name])
    before = [state.load(505).clone() for state in states]
    for state in states:
        enlarge(state, 640)
    for state, old in zip(states, before, strict=True):
        torch.testing.assert_close(state.load(505), old, rtol=0, atol=0)


def test_a_pair_has_one_room() -> None:
    """A step that breaks off between two layers may have made room for the lower one: kernels read both as one."""
    states = filled(FORMATS["1 bit, shared"])
    lower, upper = states[1], states[3]
    assert upper.lower is lower and lower.borrowers == [upper]
    before = upper.load(505).clone()
    enlarge(lower, 640)
    assert upper.spec.shape[2] == 640
    torch.testing.assert_close(upper.load(505), before, rtol=0, atol=0)


@pytest.mark.parametrize("window", [0, 1024, 2048, 4096, 8192])
def test_few_graphs_serve_a_cache_that_grows(window: int) -> None:
    """Dynamo compiles eight of a function: windows that fill must not take them all."""
    state = layers_of(XQuantConfig(), (1, 1, 512, 64), torch.float32)[0][0]
    respec(state, with_lasting_room(dataclasses.replace(state.spec, window=window), 512))  # as when it is taken over
    growth, specs = Growth(state, any_room=True), []
    for tokens in range(300, 40_000, 100):
        growth.reserve(tokens)
        assert state.spec.shape[2] >= tokens
        if growth.spec not in specs:
            specs.append(growth.spec)
    assert len(specs) <= 3 and specs[-1].wraps == bool(window)


@torch.no_grad()
def test_products_of_torch_do_not_bind_a_graph_to_a_room() -> None:
    """Nine rows are more than ``linear_rows`` takes, so that the wrapper stays; it serves any room all the same."""
    counters.clear()
    model = Decoder(1).eval()
    config = XQuantConfig().replace(residual_length=32, k_group_size=32, k_residual_length=None)  # test_any_room.py
    step = torch.compile(model.logits, backend="xquant", options={"config": config, "strict": True})
    ids = torch.randint(0, 128, (9, 600), generator=torch.Generator().manual_seed(0))
    ours, others = DynamicCache(config=model.config), XQuantCache(model.config, 1024, config)
    begin, rooms = 0, list[int]()
    for size in (500, *[1] * 12):
        given = ids[:, begin : begin + size]
        torch.testing.assert_close(step(given, ours), model.logits(given, others), rtol=1e-6, atol=2e-5)
        begin, keys = begin + size, ours.layers[0].keys
        rooms += [keys.live.spec.shape[2]] if isinstance(keys, GrowingKV) else []
    assert set(rooms) == {512, 640} and counters["stats"]["unique_graphs"] == 1
    assert any("one by one" in name for name in counters["xquant"]) and not counters["xquant"]["one_call"]


@pytest.mark.parametrize(
    ("line", "is_open"),
    [
        ("cpp_xquant_append_1(codes, x, codes.size(3))", True),
        ("cpp_fused_1(codes, x)", False),
        ("y = reinterpret_tensor(codes, (4,), (1,), 0)", False),
        ("assert_size_stride(codes, (1, 2), (2, 1))", False),
        ("return (codes,)", False),
        ("extern_kernels.mm(x, x, out=x)", True),
    ],
)
def test_which_wrappers_serve_any_room(line: str, is_open: bool) -> None:
    """``codes``, the second argument, may have another room."""
    wrapper = ast.parse(f"def call(args):\n    x, codes, = args\n    args.clear()\n    {line}\n    del codes").body[0]
    assert isinstance(wrapper, ast.FunctionDef)
    assert Rooms([1]).are_ours(wrapper) == is_open
