"""Chunks of more tokens than a step's that run uncompiled in a compiled model: a kernel attends, straight from the
codes, as plain torch does to dequantized values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from fast_and_slow import fast_but
from numeric import seeded
from stepping import interpreted, relative_error, run_steps
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from transformers import DynamicCache, LlamaConfig, StaticCache
from transformers.integrations.sdpa_attention import repeat_kv

from xquant_fx import XQuantCache, XQuantConfig, memory_report
from xquant_fx.cache import step_attention
from xquant_fx.cache.held_tokens import HeldTokens
from xquant_fx.compiler import untraced
from xquant_fx.kernels.cpu import at_hand, build
from xquant_fx.kernels.cpu.at_hand import wanted
from xquant_fx.kernels.prompt_attention.cpu_call import faster_dtypes

SMALL = dict(k_group_size=16, residual_length=32)
BATCH, HEADS, GROUP, DIM, ROOM, PAST, NEW = 2, 2, 3, 16, 128, 70, 20
#: Prompts, steps and chunks of any number of tokens.
SIZES = (45, 12, 1, 33, 3, 9)


@pytest.fixture
def attended(monkeypatch) -> list[Any]:
    """The arguments that the kernel was run for, in turn."""
    found: list[Any] = []
    attend = step_attention.attend_chunk
    monkeypatch.setattr(step_attention, "attend_chunk", lambda a: (found.append(a), attend(a))[1])
    return found


def config_of(preset: str, **more: Any) -> XQuantConfig:
    return XQuantConfig.preset(preset).replace(**SMALL, **more)


def without_kernel(monkeypatch) -> None:
    monkeypatch.setattr(step_attention, "attend_chunk", lambda a: None)


@pytest.mark.parametrize("room", [sum(SIZES), 256])
@pytest.mark.parametrize(
    ("preset", "more", "model"),
    [
        ("xquant-2.2", {}, {}),
        ("xquant", dict(sink_tokens=4), dict(kv_heads=4)),
        pytest.param("xquant-1.4", dict(v_scheme="per_token_folded"), {}, marks=pytest.mark.slow),
        pytest.param("kivi-2", {}, {}, marks=pytest.mark.slow),
        pytest.param("xquant-2.7", {}, dict(dtype=torch.bfloat16), marks=pytest.mark.slow),
    ],
)
def test_as_plain_torch_on_dequantized_values(tiny_llama, attended, monkeypatch, preset, more, model, room):
    """A padded batch, layers that borrow codes, heads that queries share; room for more tokens, and for no more."""
    made = tiny_llama(layers=4, **model)
    ids = torch.randint(1, 128, (2, sum(SIZES)), generator=seeded(1))
    padding = torch.arange(SIZES[0]) >= torch.tensor([[0], [7]])
    outs = []
    for kernel in (True, False):
        if not kernel:
            without_kernel(monkeypatch)
        cache = XQuantCache(made.config, max_cache_len=room, config=config_of(preset, **more), padding_mask=padding)
        with wanted():
            outs.append(run_steps([(made.forward, n) for n in SIZES], ids, cache))
    assert [a.q.shape[2] for a in attended] == [12] * 4 + [33] * 4 + [9] * 4
    assert relative_error(*outs) < (1e-5 if made.dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize("kind", fast_but([StaticCache, DynamicCache], [DynamicCache]))
def test_caches_that_were_taken_over(tiny_llama, attended, monkeypatch, kind):
    model = tiny_llama(layers=2)
    ids = torch.randint(1, 128, (1, sum(SIZES) + 1), generator=seeded(1))
    monkeypatch.setattr(untraced, "_backends", [])
    outs = []
    for kernel in (True, False):
        if not kernel:
            without_kernel(monkeypatch)
        torch._dynamo.reset()
        backend = interpreted(self_check=False, config=config_of("xquant-2.2"))
        untraced.leave_prompts_untraced(backend, backend.asked)
        step = torch.compile(model.forward, backend=backend)
        cache = kind(config=model.config, **(dict(max_cache_len=160) if kind is StaticCache else {}))
        plan = [(step, SIZES[0]), (step, 1), *[(step, n) for n in SIZES[1:]]]
        outs.append(run_steps(plan, ids, cache))
    assert [a.q.shape[2] for a in attended] == [12, 12, 33, 33, 9, 9]
    assert relative_error(*outs) < 1e-5


def filled(new: int = NEW, **config: Any) -> XQuantCache:
    """A cache of PAST tokens, then a chunk of ``new``."""
    shape = dict(hidden_size=96, num_hidden_layers=2, num_key_value_heads=HEADS, num_attention_heads=6, head_dim=DIM)
    cache = XQuantCache(LlamaConfig(**shape), max_cache_len=ROOM, config=config_of("xquant-2.2", **config))
    with wanted():
        for tokens in (PAST, new):
            append(cache, tokens)
    return cache


def buffers(cache: XQuantCache) -> list[Any]:
    return [x for layer in cache.layers for x in (layer.keys, layer.values)]


def append(cache: XQuantCache, tokens: int) -> None:
    for layer in range(2):
        k, v = (torch.randn(BATCH, HEADS, tokens, DIM, generator=seeded(layer + side)) for side in (3, 5))
        cache.update(k, v, layer)


def repeated(x: Tensor, times: int = GROUP) -> Tensor:
    return repeat_kv(x, times)


def causal(room: int = ROOM, new: int = NEW) -> Tensor:
    return (torch.arange(room) <= torch.arange(PAST, PAST + new)[:, None])[None, None]


MASKS: dict[str, Callable[[], Tensor]] = {
    "bool": causal,
    "numbers": lambda: torch.where(causal(), 0.0, float("-inf")),
    "a bias a head": lambda: torch.randn(1, 6, NEW, ROOM, generator=seeded(2)).masked_fill(~causal(), float("-inf")),
    "of each sequence": lambda: causal() & (torch.arange(ROOM) >= torch.tensor([0, 9])[:, None, None, None]),
    "one row": lambda: (torch.arange(ROOM) < PAST)[None, None, None],
}


def assert_same(cache: XQuantCache, mask: Tensor | None, q: Tensor, **given: Any) -> None:
    sides = [cache.layers[1].keys, cache.layers[1].values]
    got = scaled_dot_product_attention(q, *map(repeated, sides), mask, **given)
    want = scaled_dot_product_attention(q, *(repeated(x.dequantize()) for x in sides), mask, **given)
    torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-4)


def queries(new: int = NEW, heads: int = 6) -> Tensor:
    return torch.randn(BATCH, heads, new, DIM, generator=seeded(9))


@pytest.mark.parametrize("name", ["bool", "numbers", "of each sequence", *(pytest.param(n, marks=pytest.mark.slow)
                                  for n in ("a bias a head", "one row"))])  # fmt: skip
@torch.no_grad()
def test_any_mask(attended, name):
    cache, mask = filled(), MASKS[name]()
    with wanted():
        assert_same(cache, mask, queries(), scale=0.3)
        assert_same(cache, mask.expand(BATCH, 6, NEW, ROOM), queries())
    assert [a.mask.shape[3] for a in attended] == [PAST + NEW] * 2


@torch.no_grad()
def test_what_the_kernel_does_not_take_reads_dequantized_values(attended):
    cache, q = filled(), queries()
    assert_same(cache, causal(), q)  # uncompiled models have no kernels to wait for
    with wanted():
        assert_same(cache, None, q)  # sees zeros behind the tokens
        assert_same(cache, causal() | (torch.arange(ROOM) > 100), q)  # so does this
        assert_same(cache, causal()[:, :, :12], queries(12))  # other queries than the chunk's
        with torch.enable_grad():
            assert_same(cache, causal(), q.clone().requires_grad_())
        assert_same(filled(k_bits=16, v_bits=16), causal(), q)
        keys, values = cache.layers[1].keys, cache.layers[1].values
        other = filled().layers[1].values
        for pair in ((values, keys), (keys, cache.layers[0].values), (keys, other)):
            got = scaled_dot_product_attention(q, *map(repeated, pair), causal())
            want = scaled_dot_product_attention(q, *(repeated(x.dequantize()) for x in pair), causal())
            torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-4)
    assert not attended


CHANGES: dict[str, Callable[[XQuantCache], Any]] = {
    "a chunk": lambda cache: append(cache, 9),
    "a step": lambda cache: append(cache, 1),
    "a rollback": lambda cache: cache.crop(-2),
    "reset": lambda cache: cache.reset(),
    "rows": lambda cache: cache.reorder_cache(torch.tensor([1, 0])),
    "what is kept of the chunk": lambda cache: memory_report(cache),
    "rows of each buffer": lambda cache: [x.copy_(x[[1, 0]]) for x in buffers(cache)],
    "another sequence": lambda cache: (cache.reset(), append(cache, PAST), append(cache, NEW)),
}


@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_what_was_repeated_before_the_cache_changed_stays_what_it_was(attended, change):
    """Reading it is put off, but not as long as that."""
    cache, mask, q = filled(), causal(), queries()
    keys, values = (repeated(x) for x in (cache.layers[1].keys, cache.layers[1].values))
    want = [repeated(x.dequantize()) for x in (cache.layers[1].keys, cache.layers[1].values)]
    assert isinstance(keys, HeldTokens) and not keys.held.is_read
    CHANGES[change](cache)
    assert keys.held.is_read
    with wanted():
        got = scaled_dot_product_attention(q, keys, values, mask)
    torch.testing.assert_close(got, scaled_dot_product_attention(q, *want, mask), atol=2e-5, rtol=1e-4)
    assert torch.equal(keys + 0, want[0]) and not attended


@torch.no_grad()
def test_nothing_is_dequantized_for_what_the_kernel_reads(attended, monkeypatch):
    """Nor is it kept in mind."""
    cache = filled()
    group = cache.group
    monkeypatch.setattr(type(cache.states[0]), "load", lambda *_: pytest.fail("dequantized"))
    with wanted():
        scaled_dot_product_attention(queries(), *(repeated(x) for x in (cache.layers[1].keys, cache.layers[1].values)),
                                     causal())  # fmt: skip
    assert len(attended) == 1 and group is not None and not any(ref() for ref in group.readings)


def test_a_compiler_that_fails_is_told_of_once(tiny_llama, monkeypatch, caplog):
    def fail(*args: Any) -> None:
        raise build.CompileError(["g++"], "no space left")

    model = tiny_llama(layers=2)
    ids = torch.randint(1, 128, (1, sum(SIZES)), generator=seeded(1))
    outs = []
    for fails in (False, True):
        monkeypatch.setattr(at_hand, "_failed", [])
        if fails:
            monkeypatch.setattr(build, "load", fail)
            monkeypatch.setattr(at_hand, "at_hand", lambda source, problem: None)
        cache = XQuantCache(model.config, max_cache_len=128, config=config_of("xquant-2.2"))
        with wanted():
            outs.append(run_steps([(model.forward, n) for n in SIZES], ids, cache))
    assert relative_error(*outs) < 1e-5
    assert sum("the C++ compiler fails" in record.message for record in caplog.records) == 1


@pytest.mark.parametrize("heads", [6, 2])
def test_inference_mode(attended, heads):
    """Which gives attention, and what models repeat, in one piece."""
    with torch.no_grad():
        cache, mask, q = filled(), causal(), queries(heads=heads)
        sides = [cache.layers[1].keys, cache.layers[1].values]
        want = scaled_dot_product_attention(q, *(repeated(x.dequantize(), heads // 2) for x in sides), mask)
    with torch.inference_mode(), wanted():
        got = scaled_dot_product_attention(q, *(repeated(x, heads // 2) for x in sides), mask)
        with sdpa_kernel(SDPBackend.MATH):  # torch attends, as everywhere else
            torchs = scaled_dot_product_attention(q, *(repeated(x, heads // 2) for x in sides), mask)
    assert len(attended) == 1
    for out in (got, torchs):
        torch.testing.assert_close(out, want, atol=2e-5, rtol=1e-4)


LONG = (300, 280, 1, 260)


@pytest.mark.skipif(torch.bfloat16 not in faster_dtypes(), reason="no kernel of prompts on this processor")
def test_long_chunks_are_the_same_whatever_room_there_is(tiny_llama, attended):
    """By the kernel of prompts."""
    model = tiny_llama(layers=2, head_dim=32, dtype=torch.bfloat16)
    ids = torch.randint(1, 128, (2, sum(LONG)), generator=seeded(1))
    outs = []
    for room in (sum(LONG), 4096):
        cache = XQuantCache(model.config, max_cache_len=room, config=config_of("xquant-2.2"))
        with wanted():
            outs.append(run_steps([(model.forward, n) for n in LONG], ids, cache))
    assert torch.equal(*outs) and not attended


@pytest.mark.skipif(torch.bfloat16 not in faster_dtypes(), reason="no kernel of prompts on this processor")
@pytest.mark.parametrize(
    ("kind", "values"),
    [
        pytest.param(StaticCache, "per_token_rotated", marks=pytest.mark.slow),
        (DynamicCache, "per_token_folded"),
    ],
)
def test_long_chunks_of_caches_that_were_taken_over(tiny_llama, attended, monkeypatch, kind, values):
    model = tiny_llama(layers=2, head_dim=32, dtype=torch.bfloat16)
    ids = torch.randint(1, 128, (1, sum(LONG) + 1), generator=seeded(1))
    monkeypatch.setattr(untraced, "_backends", [])
    long, outs = list[int](), []
    attend = step_attention.attended
    counting = lambda q, *args, **given: (long.append(q.shape[2]), attend(q, *args, **given))[1]  # noqa: E731
    for kernel in (counting, lambda *args, **given: None):
        monkeypatch.setattr(step_attention, "attended", kernel)
        torch._dynamo.reset()
        backend = interpreted(self_check=False, config=config_of("xquant-2.2", v_scheme=values))
        untraced.leave_prompts_untraced(backend, backend.asked)
        step = torch.compile(model.forward, backend=backend)
        cache = kind(config=model.config, **(dict(max_cache_len=1000) if kind is StaticCache else {}))
        outs.append(run_steps([(step, LONG[0]), (step, 1), *[(step, n) for n in LONG[1:]]], ids, cache))
    assert long == [280, 280, 260, 260] and not attended
    assert relative_error(*outs) < 4e-2
