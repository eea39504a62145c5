"""Uncompiled steps on a CPU: kernels take them over, and give what plain torch on dequantized values gives."""

from __future__ import annotations

import contextlib

import pytest
import torch
from fast_and_slow import fast_but
from numeric import seeded
from stepping import relative_error, run_steps
from torch.nn.functional import scaled_dot_product_attention
from transformers import DynamicCache, StaticCache

from xquant_fx import XQuantCache, XQuantConfig, ops
from xquant_fx.cache import uncompiled
from xquant_fx.kernels.cpu import at_hand, build

SMALL = dict(k_group_size=16, residual_length=32)
NEVER = 10**9
BATCH, HEADS, DIM, ROOM = 2, 2, 16, 128


@pytest.fixture
def calls(monkeypatch):
    """What kernels were run for, "append" or "attend", in turn; from the first step on."""
    found: list[str] = []
    append, attend = ops.append_uncompiled, ops.decode_attention
    monkeypatch.setattr(uncompiled, "WARM", 0)
    monkeypatch.setattr(ops, "append_uncompiled", lambda a: (found.append("append"), append(a))[1])
    monkeypatch.setattr(ops, "decode_attention", lambda **a: (found.append("attend"), attend(**a))[1])
    return found


def config_of(preset: str, **more) -> XQuantConfig:
    return XQuantConfig.preset(preset).replace(**SMALL, **more)


@pytest.mark.parametrize(
    ("preset", "more", "dtype"),
    [
        ("xquant-2.2", {}, torch.float32),
        ("xquant", {}, torch.float32),
        pytest.param("xquant-1.4", dict(v_scheme="per_token_folded"), torch.float32, marks=pytest.mark.slow),
        pytest.param("xquant-1bit", {}, torch.float32, marks=pytest.mark.slow),
        pytest.param("kivi-2", dict(sink_tokens=4), torch.float32, marks=pytest.mark.slow),
        pytest.param("xquant-2.7", {}, torch.bfloat16, marks=pytest.mark.slow),
    ],
)
def test_steps_are_those_of_plain_torch(tiny_llama, calls, monkeypatch, preset, more, dtype):
    """A padded batch, single tokens and a few at a time; windows are flushed twice."""
    model = tiny_llama(layers=4, dtype=dtype)
    ids = torch.randint(1, 128, (2, 115), generator=seeded(1))
    padding = torch.arange(45) >= torch.tensor([[0], [7]])
    plan = [(model.forward, 45), *[(model.forward, n) for n in (1, 3, 1) * 14]]
    outs = []
    for warm in (NEVER, 0):
        monkeypatch.setattr(uncompiled, "WARM", warm)
        cache = XQuantCache(model.config, max_cache_len=128, config=config_of(preset, **more), padding_mask=padding)
        assert not calls
        outs.append(run_steps(plan, ids, cache))
    # Also where transformers repeats the heads that queries share: of more than one token, old versions always.
    assert calls == ["append", "append", "attend"] * 4 * 3 * 14
    assert relative_error(outs[1], outs[0]) < (3e-5 if dtype == torch.float32 else 3e-2)


def filled(new: int, *, k_bits: int = 2, layers: int = 2) -> XQuantCache:
    """A cache of 70 tokens, then a step of ``new``."""
    from transformers import LlamaConfig

    shape = dict(
        hidden_size=96, num_hidden_layers=layers, num_key_value_heads=HEADS, num_attention_heads=3 * HEADS, head_dim=DIM
    )
    config = config_of("xquant-2.2", k_bits=k_bits, v_bits=k_bits)
    cache = XQuantCache(LlamaConfig(**shape), max_cache_len=ROOM, config=config)
    for tokens in (70, new):
        for layer in range(layers):
            k, v = (torch.randn(BATCH, HEADS, tokens, DIM, generator=seeded(layer + side)) for side in (3, 5))
            cache.update(k, v, layer)
    return cache


MASKS = {
    "none": lambda q, heads: None,
    "bool": lambda q, heads: torch.arange(ROOM) < 60,
    "a row": lambda q, heads: torch.rand(BATCH, 1, 1, ROOM, generator=seeded(2)) < 0.5,
    "a query": lambda q, heads: torch.rand(1, 1, q, ROOM, generator=seeded(2)) < 0.5,
    "heads": lambda q, heads: torch.randn(BATCH, heads, q, ROOM, generator=seeded(2)),
    "a head": lambda q, heads: torch.randn(1, heads, 1, ROOM, generator=seeded(2)),
}


#: (Heads per KV head, name of a mask, tokens of the buffer that are seen), all of them: a kernel for each two.
EVERY = [(group, name, tokens) for group in (1, 3) for name in MASKS for tokens in (ROOM, 90)]
#: Tokens of a step to some of them, each of which has a kernel of its own: each kind of mask, each number of heads
#: and of tokens for one of the two; masks of tokens, of rows and of none for each number of heads.
SOME = {
    1: [(1, "none", ROOM), (3, "bool", 90), (1, "a row", 90), (3, "heads", 90)],
    3: [(3, "none", 90), (3, "a row", ROOM), (1, "a query", ROOM), (1, "a head", ROOM)],
}


@pytest.mark.parametrize(
    ("new", "chosen"),
    [*SOME.items(), *(pytest.param(new, EVERY, marks=pytest.mark.slow) for new in SOME)],
    ids=["1-some", "3-some", "1-every", "3-every"],
)
@torch.no_grad()
def test_any_mask_and_group(calls, new, chosen):
    """Also of the first tokens of a buffer."""
    cache = filled(new)
    keys, values = cache.layers[1].keys, cache.layers[1].values
    calls.clear()
    for group, name, tokens in chosen:
        heads = group * HEADS
        q = torch.randn(BATCH, heads, new, DIM, generator=seeded(9))
        mask = MASKS[name](new, heads)
        mask = mask if mask is None else mask[..., :tokens]
        if mask is not None and mask.dim() == 1:
            mask = mask.expand(1, 1, new, tokens)
        given = dict(attn_mask=mask, enable_gqa=group > 1, scale=0.3)
        got = scaled_dot_product_attention(q, keys[:, :, :tokens], values[:, :, :tokens], **given)
        dense = (x.dequantize()[:, :, :tokens] for x in (keys, values))
        want = scaled_dot_product_attention(q, *dense, **given)
        torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
    assert calls == ["attend"] * len(chosen)


@torch.no_grad()
def test_what_no_kernel_takes_reads_dequantized_values(calls):
    cache = filled(1)
    keys, values = cache.layers[1].keys, cache.layers[1].values
    q = torch.randn(BATCH, HEADS, 1, DIM, generator=seeded(9))
    calls.clear()

    def same(k, v, x=q, **given):
        got = scaled_dot_product_attention(x, k, v, **given)
        want = scaled_dot_product_attention(
            x, *(y.dequantize() if hasattr(y, "dequantize") else y for y in (k, v)), **given
        )
        torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-4)

    same(keys, values, is_causal=True)
    same(keys[:, :, 4:90], values[:, :, 4:90])
    same(keys, values[:, :, :ROOM].dequantize())
    same(keys, cache.layers[0].values)
    same(values, keys)
    same(keys, values, torch.randn(BATCH, HEADS + 1, 2, DIM)[:, :HEADS])
    mask = torch.rand(1, HEADS, 2, ROOM, generator=seeded(2)) < 0.5
    same(keys, values, torch.randn(BATCH, HEADS, 2, DIM), attn_mask=mask)
    assert calls == ["attend"] * 2  # two queries for one new token may be two heads
    calls.clear()
    with torch.enable_grad():
        same(keys, values, q.clone().requires_grad_())
    cache.crop(-1)
    same(keys, values)
    wide = filled(12)
    same(wide.layers[1].keys, wide.layers[1].values, torch.randn(BATCH, HEADS, 12, DIM))
    full = filled(1, k_bits=16)
    same(full.layers[1].keys, full.layers[1].values)
    assert "attend" not in calls


def test_begins_after_some_steps_of_each_sequence(tiny_llama, calls, monkeypatch):
    """So the same tokens give the same numbers, whatever the cache held before."""
    monkeypatch.setattr(uncompiled, "WARM", 5)
    model = tiny_llama(layers=2, kv_heads=4)
    ids = torch.randint(1, 128, (1, 52), generator=seeded(1))
    cache = XQuantCache(model.config, max_cache_len=128, config=config_of("xquant-2.2"))
    plan = [(model.forward, 45), *[(model.forward, 1)] * 7]
    outs = []
    for _ in range(2):
        calls.clear()
        outs.append(run_steps(plan, ids, cache))
        assert calls == ["append", "append", "attend"] * 2 * 3
        cache.reset()
    assert torch.equal(*outs)


def test_a_profiler_changes_nothing_and_sees_the_kernels(tiny_llama, calls):
    model = tiny_llama(layers=2, kv_heads=4)
    ids = torch.randint(1, 128, (1, 47), generator=seeded(1))
    outs = []
    for around in (contextlib.nullcontext(), torch.profiler.profile()):
        cache = XQuantCache(model.config, max_cache_len=64, config=config_of("xquant-2.2"))
        with around:
            outs.append(run_steps([(model.forward, 45), *[(model.forward, 1)] * 2], ids, cache))
    assert torch.equal(*outs)
    assert calls == ["append", "append", "attend"] * 2 * 4
    seen = [event.key for event in around.key_averages()]
    assert {"xquant::append_cpu", "xquant::decode_attention_cpu"} <= set(seen)


def test_a_compiler_that_fails_is_told_of_once(tiny_llama, calls, monkeypatch, caplog):
    def fail(*args):
        raise build.CompileError(["g++"], "no space left")

    monkeypatch.setattr(at_hand, "_failed", [])
    monkeypatch.setattr(build, "load", fail)
    monkeypatch.setattr(at_hand, "at_hand", lambda source, problem: None)  # nor a kernel of an earlier day
    model = tiny_llama(layers=2)
    ids = torch.randint(1, 128, (1, 50), generator=seeded(1))
    outs = []
    for warm in (0, NEVER):
        monkeypatch.setattr(uncompiled, "WARM", warm)
        cache = XQuantCache(model.config, max_cache_len=64, config=config_of("xquant-2.2"))
        outs.append(run_steps([(model.forward, 45), *[(model.forward, 1)] * 5], ids, cache))
    assert torch.equal(*outs)
    assert calls == ["append"]
    assert sum("the C++ compiler fails" in record.message for record in caplog.records) == 1


@pytest.mark.parametrize("kind", fast_but([StaticCache, DynamicCache], [StaticCache]))
def test_caches_that_were_taken_over(tiny_llama, calls, monkeypatch, kind):
    """Uncompiled steps on what compiled ones quantized."""
    model = tiny_llama(layers=2, kv_heads=4)
    ids = torch.randint(1, 128, (1, 60), generator=seeded(1))
    outs = []
    for warm in (NEVER, 0):
        monkeypatch.setattr(uncompiled, "WARM", warm)
        torch._dynamo.reset()
        step = torch.compile(
            model.forward, backend="xquant", dynamic=False, options={"config": config_of("xquant-2.2")}
        )
        more = dict(max_cache_len=64) if kind is StaticCache else {}
        cache = kind(config=model.config, **more)
        plan = [(model.forward, 45), (step, 1), *[(model.forward, 1)] * 14]
        outs.append(run_steps(plan, ids, cache))
    assert calls.count("attend") > 20
    assert relative_error(outs[1], outs[0]) < 1e-5
