"""Sliding windows of caches that are quantized before their first step is traced, and of those that stay."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from fast_and_slow import every_other, fast_but
from stepping import interpreted, relative_error
from test_later_prompts import graphs
from test_sliding_windows import FULL, LENGTH, LOW, WINDOW, close, ids_of, model_of
from test_trial import ended  # noqa: F401 - a fixture
from test_untraced import own_backends  # noqa: F401 - a fixture of all tests here
from torch import Tensor
from torch._dynamo.utils import counters
from transformers import DynamicCache, StaticCache

from xquant_fx import XQuantCache, XQuantConfig
from xquant_fx.cache.growing import STORED_KV
from xquant_fx.cache.prompts import uncompiled
from xquant_fx.compiler import untraced
from xquant_fx.compiler.tracing_time import watch_tracing
from xquant_fx.kernels.layout import STEP_TOKENS

KINDS = [StaticCache, DynamicCache]
STAY = [
    LOW.replace(residual_length=32),  # the residual window holds them
    LOW.replace(sliding_windows="auto"),  # too short to be worth it
    LOW.replace(sliding_windows=False),
]
#: A prompt, steps and a chunk; the window of 40 tokens is full after the second step behind that.
LIFE = [20, 1, 1, 1, 14, 1, 1, 1, 1, 1, 9, 1, 1]


class Run:
    """A model that is compiled, with the caches that it is given."""

    def __init__(self, name: str, config: XQuantConfig, traced: bool = False, **options: Any) -> None:
        torch._dynamo.reset()
        self.model = model_of(name, num_hidden_layers=2)
        self.backend = interpreted(self_check=False, config=config)
        watch_tracing(self.backend)
        if not traced:
            untraced.leave_prompts_untraced(self.backend, self.backend.asked)
        self.call = torch.compile(self.model.forward, backend=self.backend, **options)
        counters.clear()

    def new(self, kind: type) -> Any:
        config = self.model.config
        return DynamicCache(config=config) if kind is DynamicCache else StaticCache(config=config, max_cache_len=LENGTH)

    @torch.no_grad()
    def __call__(self, ids: Tensor, cache: Any) -> Tensor:
        return self.call(ids, past_key_values=cache).logits

    @torch.no_grad()
    def life(self, call: Any, cache: Any, sizes: list[int]) -> Tensor:
        parts = ids_of(1, sum(sizes)).split(sizes, 1)
        return torch.cat([call(part, past_key_values=cache).logits for part in parts], 1)


def quantized(cache: Any) -> list[bool]:
    return [isinstance(layer.keys, STORED_KV) and isinstance(layer.values, STORED_KV) for layer in cache.layers]


@pytest.mark.parametrize("kind", fast_but(KINDS, [DynamicCache]))
@pytest.mark.parametrize("name", fast_but(["Gemma3Text", "Mistral", "GptOss"], ["Mistral", "GptOss"]))
def test_they_are_quantized_before_the_first_step(name: str, kind: type, ended: list[Any]) -> None:  # noqa: F811
    """Exactly at 16 bits, until the window is full and beyond; the step and those behind it are one graph."""
    run = Run(name, FULL)
    cache = run.new(kind)
    got = [run.life(run.call, cache, LIFE[:4])]
    assert ended == [True] and quantized(cache) == [True, True]
    assert graphs() == 1
    assert close(got[0], run.life(run.model, run.new(kind), LIFE[:4]))
    cache = run.new(kind)
    assert close(run.life(run.call, cache, LIFE), run.life(run.model, run.new(kind), LIFE))
    assert quantized(cache) == [True, True]


@pytest.mark.parametrize("kind", fast_but(KINDS, [StaticCache]))
def test_they_are_stored_as_by_a_takeover(kind: type) -> None:
    caches = []
    for traced in (False, True):
        run = Run("Gemma3Text", LOW, traced)
        caches.append(cache := run.new(kind))
        run.life(run.call, cache, LIFE[:4])
    for mine, theirs in zip(*(cache.layers for cache in caches), strict=True):
        for side in ("keys", "values"):
            mine_, theirs_ = getattr(mine, side), getattr(theirs, side)
            assert mine_.live.spec == theirs_.live.spec and mine_.shape == theirs_.shape
            assert relative_error(mine_.dequantize(), theirs_.dequantize()) < 1e-5


@pytest.mark.parametrize("kind", fast_but(KINDS, [StaticCache]))
@pytest.mark.parametrize("config", fast_but(STAY, STAY[:2]), ids=["short", "little", "not asked"])
def test_windows_that_stay(config: XQuantConfig, kind: type, ended: list[Any]) -> None:  # noqa: F811
    """The other layer is quantized before the first step, and no step behind it is traced until they are full."""
    run = Run("Gemma3Text", config)
    cache = run.new(kind)
    run.life(run.call, cache, [20, *[1] * 8])
    assert ended == [True] and quantized(cache) == [False, True] and graphs() == 1
    assert type(cache.layers[0].keys) is Tensor and not hasattr(cache.layers[0].keys, "live")
    other = run.new(kind)
    expected = run.life(run.model, run.new(kind), LIFE)
    assert relative_error(run.life(run.call, other, LIFE), expected) < 0.3 and quantized(other) == [False, True]


def test_all_windows_that_stay(ended: list[Any]) -> None:  # noqa: F811
    """Nothing is quantized, and it is as without us."""
    run = Run("Mistral", STAY[2])
    cache = run.new(DynamicCache)
    assert close(run.life(run.call, cache, LIFE), run.life(run.model, run.new(DynamicCache), LIFE))
    assert not ended and quantized(cache) == [False, False]


@pytest.mark.parametrize("kind", fast_but(KINDS, [DynamicCache]))
@pytest.mark.parametrize("prompt", fast_but([WINDOW - 1, WINDOW, WINDOW + 20], [WINDOW - 1, WINDOW + 20]))
def test_windows_that_have_lost_tokens_are_not_tried(kind: type, prompt: int, ended: list[Any]) -> None:  # noqa: F811
    """A takeover knows what they hold."""
    run = Run("Gemma3Text", FULL)
    cache, sizes = run.new(kind), [prompt, 1, 1, 9, 1]
    assert close(run.life(run.call, cache, sizes), run.life(run.model, run.new(kind), sizes))
    assert bool(ended) == (kind is StaticCache and prompt < WINDOW)
    assert quantized(cache) == [True, True]


@pytest.mark.parametrize(("kind", "stays", "prompt"), every_other(KINDS, [False, True], [20, WINDOW + 5]))
@pytest.mark.parametrize("mode", fast_but([torch.no_grad, torch.inference_mode], [torch.inference_mode]))
def test_first_steps_that_fail_are_not_counted(kind: type, stays: bool, prompt: int, mode: Any) -> None:
    """Neither as a tensor nor as a number, nor has a window lost a token to them."""
    with mode():
        first_steps_that_fail(kind, stays, prompt)


def first_steps_that_fail(kind: type, stays: bool, prompt: int) -> None:
    run = Run("Gemma3Text", FULL.replace(sliding_windows=not stays))

    def call(ids: Tensor, cache: Any, at: Tensor) -> Tensor:
        return run.model(ids, past_key_values=cache).logits.index_select(2, at)

    step, cache, every = torch.compile(call, backend=run.backend), run.new(kind), torch.arange(128)
    ids = ids_of(1, prompt + 2)
    run.model(ids[:, :prompt], past_key_values=cache)
    plain = copy.deepcopy(cache)
    is_tried = prompt < WINDOW or stays
    for _ in range(2 * is_tried):
        with pytest.raises((IndexError, RuntimeError)):
            step(ids[:, prompt : prompt + 1], cache, every + 1000)
        for mine, other in zip(cache.layers, plain.layers, strict=True):
            assert int(mine.get_seq_length()) == prompt
            assert getattr(mine, "cumulative_length", 0) == getattr(other, "cumulative_length", 0)
    got = torch.cat([step(ids[:, i : i + 1], cache, every) for i in (prompt, prompt + 1)], 1)
    expected = torch.cat([run.model(ids[:, i : i + 1], past_key_values=plain).logits for i in (prompt, prompt + 1)], 1)
    assert close(got, expected) and quantized(cache) == [not stays, True]


@torch.no_grad()
def test_layers_of_other_kinds_are_no_buffers() -> None:
    """LFM2's convolutions, say, in front of a window that begins to move."""
    run = Run("Gemma3Text", FULL)
    cache = run.new(StaticCache)
    run.life(run.call, cache, [20, *[1] * (WINDOW - 20)])
    assert uncompiled(cache, 1) is not None
    cache.layers.insert(0, torch.nn.Identity())
    assert uncompiled(cache, 1) is not None


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_refused_becomes_what_it_was(kind: type, ended: list[Any]) -> None:  # noqa: F811
    """A function that reads a window: its buffer stays, and so it is no step as was foreseen."""
    run = Run("Gemma3Text", LOW)

    @torch.no_grad()
    def call(ids: Tensor, past_key_values: Any) -> Any:
        out = run.model(ids, past_key_values=past_key_values)
        out.logits = out.logits + past_key_values.layers[0].values.sum()
        return out

    step = torch.compile(call, backend=run.backend)
    cache = run.new(kind)
    got = run.life(step, cache, [20, 1, 1])
    assert ended == [False] and quantized(cache)[0] is False
    assert relative_error(got, run.life(call, run.new(kind), [20, 1, 1])) < 0.3


@pytest.mark.parametrize("kind", fast_but(KINDS, [DynamicCache]))
@pytest.mark.parametrize(
    ("sizes", "is_tried"),
    [
        pytest.param([34, STEP_TOKENS, 1, 1], False, marks=pytest.mark.slow),
        ([30, 4, 1, 1], True),
        pytest.param([20, 30, 1, 1], False, marks=pytest.mark.slow),
    ],
)
def test_several_tokens_at_once(kind: type, sizes: list[int], is_tried: bool, ended: list[Any]) -> None:  # noqa: F811
    """A step of a few tokens that would fill the window is not tried, nor is a chunk."""
    run = Run("Gemma3Text", FULL)
    cache = run.new(kind)
    assert close(run.life(run.call, cache, sizes), run.life(run.model, run.new(kind), sizes))
    assert quantized(cache) == [True, True] and ended == [True] * is_tried


@pytest.mark.parametrize(
    ("kind", "is_quantized", "prompt"),
    every_other(
        KINDS, [True, False], [20, WINDOW + 20, WINDOW - 2, WINDOW - 1, WINDOW], slow=[WINDOW - 2, WINDOW - 1, WINDOW]
    ),
)
def test_graphs_are_those_of_windows_that_fill_and_of_full_ones(kind: type, is_quantized: bool, prompt: int) -> None:
    """Or what takes over windows that have lost tokens. Steps between, and chunks beside windows in full precision, are
    not traced, and a second cache has the same graphs."""
    config = FULL if is_quantized else STAY[2]
    run = Run("Gemma3Text", config)
    sizes = [prompt, *[1] * (WINDOW - prompt + 4 if prompt < WINDOW else 3), *[11] * (config is not FULL), 1, 1]
    for _ in range(2):
        got = run.life(run.call, run.new(kind), sizes)
        if config is FULL:
            assert close(got, run.life(run.model, run.new(kind), sizes))
        assert graphs() == (2 if prompt < WINDOW or config is FULL else 1)


def test_windows_are_no_views_behind_uncompiled_code() -> None:
    """Of which Dynamo would make a graph for the next step alone."""
    run = Run("Gemma3Text", STAY[2])
    cache = run.new(DynamicCache)
    for tokens in (WINDOW + 20, 11):
        run(ids_of(1, tokens), cache)
        assert type(cache.layers[0].keys) is Tensor and cache.layers[0].keys.shape[2] == WINDOW - 1
        assert not cache.layers[0].keys._is_view() and not cache.layers[0].values._is_view()
        run(ids_of(1, 1), cache)


def test_a_loop_that_fills_its_window_is_traced_from_then_on() -> None:
    """A call that does more than the step that it was taken for."""
    run = Run("Gemma3Text", FULL)

    @torch.no_grad()
    def two_steps(ids: Tensor, cache: Any) -> Tensor:
        first = run.model(ids, past_key_values=cache).logits
        return torch.cat([first, run.model(ids, past_key_values=cache).logits], 1)

    twice, ids = torch.compile(two_steps, backend=run.backend), ids_of(1, 1)
    cache, plain = run.new(DynamicCache), run.new(DynamicCache)
    run.life(run.call, cache, [20, 1]), run.life(run.model, plain, [20, 1])
    for _ in range(12):
        before = graphs()
        with torch.no_grad():
            assert close(twice(ids, cache), two_steps(ids, plain))
    assert cache.get_seq_length() == plain.get_seq_length() == 45 and graphs() == before


@pytest.mark.parametrize("dynamic", [None, False])
def test_what_windows_count_is_open_from_the_first_step_on(dynamic: bool | None) -> None:
    """An ``XQuantCache`` makes one graph until its windows are full; but where the program wants none left open."""
    run = Run("Gemma3Text", STAY[2], dynamic=dynamic)
    cache = XQuantCache(run.model.config, LENGTH, STAY[2])
    got = run.life(run.call, cache, [20, 1, 1, 1, 1])
    assert graphs() == (1 if dynamic is None else 4)
    assert relative_error(got, run.life(run.model, run.new(StaticCache), [20, 1, 1, 1, 1])) < 0.3
