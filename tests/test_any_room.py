"""Steps of caches that grow, compiled for any room: none is compiled anew when a cache has moved to more of it."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
from fast_and_slow import fast_but
from plain_decoder import Decoder
from states import layers_of
from stepping import interpreted
from torch import Tensor
from torch._dynamo.utils import counters
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from xquant_fx import XQuantCache, XQuantConfig, explain, memory_report
from xquant_fx.cache.growing import GrowingKV
from xquant_fx.cache.growth import Growth, exact_rooms
from xquant_fx.cache.room import enlarge, respec
from xquant_fx.kernels.cpu import any_room
from xquant_fx.kernels.cpu.any_room import Rooms
from xquant_fx.kernels.cpu.wrapper_code import KernelCall, NotReadError, Place, WrapperCode

CONFIG = XQuantConfig.preset("xquant-2.2").replace(residual_length=32, k_group_size=32, k_residual_length=None)
#: A prompt, a step, a chunk that leaves room for a few tokens, and steps until there is more room.
LIFE = [20, 1, 479, *[1] * 12]


def model_of(layers: int = 1) -> Any:
    return Decoder(layers).eval()


def llama(layers: int) -> Any:
    torch.manual_seed(0)
    sizes = dict(hidden_size=64, intermediate_size=32, num_attention_heads=2, num_key_value_heads=1, vocab_size=64)
    config = LlamaConfig(num_hidden_layers=layers, max_position_embeddings=2048, **sizes)
    return LlamaForCausalLM(config).eval()


def compiled(model: Any, config: XQuantConfig = CONFIG, **options: Any) -> Any:
    torch._dynamo.reset()
    counters.clear()
    return torch.compile(model.forward, backend="xquant", options={"config": config, "strict": True, **options})


@torch.no_grad()
def run(step: Any, cache: Any, sizes: list[int], **more: Any) -> Tensor:
    """Logits [B, T, V] of steps of these numbers of tokens."""
    ids = torch.randint(3, 60, (1, 2048), generator=torch.Generator().manual_seed(1))
    begin, parts = int(cache.get_seq_length()), []
    for size in sizes:
        given = {name: x[:, : begin + size] for name, x in more.items()}
        parts.append(step(ids[:, begin : begin + size], past_key_values=cache, **given).logits)
        begin += size
    return torch.cat(parts, 1)


def expected(model: Any, sizes: list[int], **more: Any) -> Tensor:
    """Logits of the same steps, uncompiled, with a cache that has the room from the start."""
    return run(model, XQuantCache(model.config, 1024, CONFIG), sizes, **more)


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


def keys_of(cache: Any) -> list[GrowingKV]:
    return [layer.keys for layer in cache.layers]


@pytest.mark.parametrize(  # equal layers are compiled once, or one wrapper is read for all
    ("make", "layers", "masked"),
    [
        (model_of, 5, True),
        (model_of, 1, False),
        *(pytest.param(llama, n, m, marks=pytest.mark.slow) for n in (6, 1) for m in (True, False)),
    ],
)
def test_more_room_is_not_compiled_for(make: Any, layers: int, masked: bool) -> None:
    model = make(layers)
    step, cache = compiled(model), DynamicCache(config=model.config)
    more = {"attention_mask": torch.ones(1, 2048, dtype=torch.int64)} if masked else {}
    if masked:
        more["attention_mask"][0, :7] = 0
    before = run(step, cache, LIFE[:5], **more)
    assert {k.live.spec.shape[2] for k in keys_of(cache)} == {512}
    made, calls = graphs(), counters["xquant"]["one_call"]
    got = torch.cat([before, run(step, cache, LIFE[5:], **more)], 1)
    assert {k.live.spec.shape[2] for k in keys_of(cache)} == {640}
    assert (graphs(), counters["xquant"]["one_call"]) == (made, calls) and calls
    assert counters["xquant"]["fuse_decode"] == layers * made  # prompts and chunks are not traced
    assert bool(counters["xquant"]["layers_not_compiled_again"]) == (layers > 1)
    # Of Llama's 6 layers a value may lie between two codes: one code more or less changes logits by 6e-5.
    bound = 2e-5 if make is model_of else 2e-4
    torch.testing.assert_close(got, expected(model, LIFE, **more), rtol=0, atol=bound)
    if make is model_of and layers > 1:
        return
    # Another cache, whose prompt is longer than that room: what was compiled serves it, too.
    longer, sizes = DynamicCache(config=model.config), [600, 1, 1]
    of_longer = run(step, longer, sizes, **more)
    assert {k.live.spec.shape[2] for k in keys_of(longer)} == {640}
    assert counters["xquant"]["fuse_decode"] == layers * made
    torch.testing.assert_close(of_longer, expected(model, sizes, **more), rtol=0, atol=bound)


@torch.no_grad()
def test_what_calls_kernels_one_by_one_is_compiled_for_the_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inductor's own wrapper looks at the sizes of what it is given."""
    monkeypatch.setattr(any_room, "OURS", "cpp_of_others_")
    model = model_of()
    step, cache = compiled(model), DynamicCache(config=model.config)
    got = run(step, cache, LIFE)
    assert not any(k.spec.any_room for k in keys_of(cache)) and {k.spec.shape[2] for k in keys_of(cache)} == {1024}
    assert any("of which there may be more" in name for name in counters["xquant"])
    monkeypatch.undo()
    torch.testing.assert_close(got, expected(model, LIFE), rtol=0, atol=2e-5)


#: Of what is compiled for one room.
ALONE = [{"disable": ["one_call"]}, {"preset": "full"}, {"self_check": True}, {"disable": ["fuse_decode"]}]


@pytest.mark.parametrize("options", fast_but(ALONE, ALONE[2:]))
def test_who_has_the_room_that_there_is(options: dict[str, Any]) -> None:
    model = model_of()
    given = {} if "preset" in options else {"config": CONFIG}
    step = torch.compile(model.forward, backend="xquant", options={**given, **options})
    cache = DynamicCache(config=model.config)
    run(step, cache, [20, 1])
    assert {k.spec.shape[2] for k in keys_of(cache)} == {512} and not any(k.spec.any_room for k in keys_of(cache))


@torch.no_grad()
def test_another_backend_compiles_for_the_room() -> None:
    """Whoever runs a graph op by op reads what lies behind the room as zeros: the step is compiled for it."""
    model = model_of()
    cache, others = DynamicCache(config=model.config), list[Any]()
    run(compiled(model), cache, LIFE[:2])
    assert all(k.spec.any_room for k in keys_of(cache))
    step = torch.compile(model.forward, backend=interpreted(others, config=CONFIG, self_check=False))
    got = run(step, cache, LIFE[2:])
    assert others and not any(k.spec.any_room for k in keys_of(cache))
    torch.testing.assert_close(got, expected(model, LIFE)[:, -got.shape[1] :], rtol=0, atol=2e-5)


def test_reports_are_of_the_room_that_there_is() -> None:
    model = model_of()
    step, cache = compiled(model), DynamicCache(config=model.config)
    run(step, cache, [20, 1])
    told = explain(model, torch.ones(1, 1, dtype=torch.int64), past_key_values=cache, options={"config": CONFIG})
    stored = sum(site.bytes for site in told.sites)
    parts = memory_report(cache).parts
    assert stored - parts["other"] <= sum(parts.values()) - parts["other"] <= stored


def growth_of(config: XQuantConfig, room: int = 512, window: int = 0, any_room: bool = True) -> Growth:
    state = layers_of(config, (1, 2, room, 64), torch.float32)[0][0]
    if window:
        respec(state, dataclasses.replace(state.spec, window=window))
    return Growth(state, any_room=any_room)


def test_what_graphs_rely_on() -> None:
    """Caches of different room agree in it; those that are told nothing, and such as are, never."""
    rooms = [growth_of(CONFIG, room).spec for room in (512, 1024, 4096)]
    assert rooms[0] == rooms[1] == rooms[2] and rooms[0].shape[2] == 4096 and rooms[0].any_room
    assert growth_of(CONFIG, 8192).spec.shape[2] == 32768
    exact = growth_of(CONFIG, 4096, any_room=False).spec
    assert exact.shape == rooms[0].shape and exact != rooms[0]
    with exact_rooms():
        assert growth_of(CONFIG, 1024).spec == growth_of(CONFIG, 1024, any_room=False).spec


def test_who_is_told_nothing() -> None:
    """Windows that start over or are going to, and what is stored as it is."""
    for growth in (growth_of(CONFIG, 512, window=64), growth_of(CONFIG, 512, window=1000)):
        assert growth.spec == growth.state.spec
    assert growth_of(XQuantConfig.preset("full")).spec.shape[2] == 512


def test_a_window_that_starts_over_gets_room_for_long() -> None:
    """Which takes no memory."""
    growth = growth_of(CONFIG, 512, window=64)
    enlarge(growth.state, 512)
    before = growth.state.spec.stored_bytes
    growth.reserve(513)
    assert growth.state.spec.shape[2] == 4096 and growth.state.spec.stored_bytes == before


def test_copies_and_rows_are_as_their_cache() -> None:
    kv = GrowingKV.of(growth_of(CONFIG))
    kv = torch.cat([kv, torch.randn(1, 2, 40, 64)], 2)
    for other in (copy.deepcopy(kv), kv.index_select(0, torch.tensor([0, 0])), kv[:, :, :30]):
        assert isinstance(other, GrowingKV) and other.spec.any_room


@pytest.mark.parametrize(
    ("name", "result", "reason"),
    [
        ("cpp_xquant_append_3", "buf0", ""),
        ("cpp_fused_add_0", "buf0", r"cpp_fused_add_0 reads \['codes'\]"),
        ("cpp_xquant_append_3", "codes", "a result is an input"),
    ],
)
def test_who_may_be_given_such_inputs(name: str, result: str, reason: str) -> None:
    """``codes`` alone may have another room."""
    places = {each: Place(each, 0, 4, each) for each in ("x", "codes", "buf0")}
    code = WrapperCode(arguments=["x", "codes"], results=[places[result]])
    code.calls = [KernelCall("cpp_other", [places["x"]]), KernelCall(name, [places["x"], places["codes"], 3])]
    if not reason:
        Rooms([1]).check(code)
        return
    with pytest.raises(NotReadError, match=reason):
        Rooms([1]).check(code)
