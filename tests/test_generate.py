"""Every documented way in really reaches the backend: calls and rewritten sites are counted."""

from __future__ import annotations

import pytest
import torch
from stepping import interpreted
from transformers import CompileConfig, StaticCache
from transformers.cache_utils import StaticLayer

import xquant_fx.compiler.backend
from xquant_fx import XQuantCache, XQuantConfig
from xquant_fx.cache.kv_tensor import QuantizedKV
from xquant_fx.ops import STORE, STORE_BORROWED

CONFIG = XQuantConfig.preset("xquant").replace(k_group_size=8, residual_length=16)
PROMPT = torch.randint(1, 128, (3, 21), generator=torch.Generator().manual_seed(5))
NEW = 31  # keys are quantized with the prompt and twice after it
ROOM = 128  # as in test_cache_life.py, so that kernels are compiled once for both


@pytest.fixture
def model(tiny_llama):
    return tiny_llama(layers=2)


@pytest.fixture
def graphs(monkeypatch):
    """Rewritten graphs, in the order they were compiled; Inductor is left out."""
    seen: list = []

    def run(gm, inputs, request, settings):
        seen.append(gm)
        return gm.forward

    monkeypatch.setattr(xquant_fx.compiler.backend, "compile_by_inductor", run)
    return seen


def rewritten_sites(gm) -> int:
    """Layers whose keys and values the graph stores quantized."""
    return sum(node.target in (STORE, STORE_BORROWED) for node in gm.graph.nodes) // 2


def generate(model, prompt=PROMPT[:1], **kwargs):
    return model.generate(prompt, max_new_tokens=NEW, do_sample=False, **kwargs)


def new_cache(model, **kwargs):
    return XQuantCache(model.config, max_cache_len=ROOM, config=CONFIG, **kwargs)


def compile_config(**kwargs) -> CompileConfig:
    config = CompileConfig(backend="xquant", **kwargs)
    config._compile_all_devices = True  # Hugging Face compiles on accelerators only, unless told
    return config


def test_model_compile_then_generate(model, graphs):
    want = generate(model, past_key_values=new_cache(model), disable_compile=True)
    assert graphs == []
    model.compile(backend="xquant")
    for _ in range(3):  # a new cache each time, the same graph
        assert torch.equal(generate(model, past_key_values=new_cache(model)), want)
    assert [rewritten_sites(gm) for gm in graphs] == [2]


def test_compile_config_then_generate(model, graphs):
    want = generate(model, past_key_values=new_cache(model), disable_compile=True)
    for _ in range(2):
        got = generate(model, past_key_values=new_cache(model), compile_config=compile_config())
        assert torch.equal(got, want)
    assert [rewritten_sites(gm) for gm in graphs] == [2]


def test_torch_compile_wrapper_does_not_reach_generate(model, graphs):
    """What the README warns of: generate() of the wrapper runs the model it wraps."""
    wrapped = torch.compile(model, backend="xquant")
    generate(wrapped, past_key_values=new_cache(model))
    assert graphs == []
    with torch.no_grad():
        cache = new_cache(model)
        wrapped(PROMPT[:1], past_key_values=cache)
        wrapped(PROMPT[:1, :1], past_key_values=cache)
    assert [rewritten_sites(gm) for gm in graphs] == [2]


def test_static_cache_passed_by_the_user(model, graphs):
    """The prompt is in full precision until the first compiled step takes the cache over."""
    want = generate(model, past_key_values=new_cache(model), disable_compile=True)
    for _ in range(2):
        cache = StaticCache(model.config, max_cache_len=ROOM)
        options = {"config": CONFIG}
        got = generate(model, past_key_values=cache, compile_config=compile_config(mode=None, options=options))
        assert torch.equal(got, want)
        assert all(isinstance(layer.keys, QuantizedKV) for layer in cache.layers)
    assert [rewritten_sites(gm) for gm in graphs] == [2]


def test_cache_implementation_static(model, graphs):
    kwargs = dict(cache_implementation="static", compile_config=compile_config(mode=None, options={"config": CONFIG}))
    first, second = generate(model, **kwargs), generate(model, **kwargs)
    assert torch.equal(first, second)
    assert torch.equal(first, generate(model, past_key_values=new_cache(model), disable_compile=True))
    assert [rewritten_sites(gm) for gm in graphs] == [2]


def test_left_padding_keeps_rows_apart(model, graphs):
    """A padded batch of three: compiled equals eager, and padding stays out of the scales."""
    lengths = [21, 15, 9]
    mask = torch.tensor([[0] * (21 - n) + [1] * n for n in lengths])
    ids = PROMPT * mask
    model.compile(backend="xquant")
    cache = new_cache(model, padding_mask=mask)
    got = generate(model, ids, attention_mask=mask, past_key_values=cache)
    twin = new_cache(model, padding_mask=mask)
    eager = generate(model, ids, attention_mask=mask, past_key_values=twin, disable_compile=True)
    assert torch.equal(got, eager)
    assert cache.group.start.tolist() == [0, 6, 12]
    scale = cache.layers[0].keys.state.tensor("zero")
    assert not torch.equal(scale[2], without_mask(model, ids, mask)[2])


def without_mask(model, ids, mask):
    cache = new_cache(model)
    generate(model, ids, attention_mask=mask, past_key_values=cache, disable_compile=True)
    return cache.layers[0].keys.state.tensor("zero")


def test_beam_search(model, graphs):
    want = generate(model, past_key_values=new_cache(model), disable_compile=True, num_beams=3)
    model.compile(backend="xquant")
    assert torch.equal(generate(model, past_key_values=new_cache(model), num_beams=3), want)
    assert [rewritten_sites(gm) for gm in graphs] == [2]


def test_chunked_prefill(model, graphs):
    kwargs = dict(prefill_chunk_size=10)
    want = generate(model, past_key_values=new_cache(model), disable_compile=True, **kwargs)
    got = generate(model, past_key_values=new_cache(model), compile_config=compile_config(), **kwargs)
    assert torch.equal(got, want)


def test_a_conversation_goes_on_in_the_same_cache(model, graphs):
    outs = []
    for compiled in (False, True):
        cache = new_cache(model)
        kwargs = dict(compile_config=compile_config()) if compiled else dict(disable_compile=True)
        turn = model.generate(PROMPT[:1], max_new_tokens=14, do_sample=False, past_key_values=cache, **kwargs)
        turn = torch.cat([turn, PROMPT[1:2, :7]], 1)
        outs.append(model.generate(turn, max_new_tokens=14, do_sample=False, past_key_values=cache, **kwargs))
    assert torch.equal(*outs)


@pytest.mark.skipif(not hasattr(StaticLayer, "crop"), reason="assisted decoding takes static caches from 5.24 on")
@pytest.mark.parametrize("quantized", [True, False])
def test_assisted_decoding_rolls_the_cache_back(tiny_llama, graphs, monkeypatch, quantized):
    """Candidates from the prompt itself, up to 8 a step; a 16-bit cache writes what it writes without them."""
    model, removed = tiny_llama(layers=2), []
    crop = XQuantCache.crop
    monkeypatch.setattr(XQuantCache, "crop", lambda cache, tokens: (removed.append(tokens), crop(cache, tokens))[1])
    config = CONFIG if quantized else XQuantConfig.preset("full")
    prompt, caches = PROMPT[:1].repeat(1, 2), [XQuantCache(model.config, 128, config) for _ in range(2)]
    model.compile(backend="xquant")
    want = generate(model, prompt, past_key_values=caches[0])
    got = generate(model, prompt, past_key_values=caches[1], prompt_lookup_num_tokens=8)
    assert got.shape == want.shape
    assert quantized or torch.equal(got, want)
    assert -8 <= min(removed) < 0
    assert {state.length for state in caches[1].states} == {int(caches[1].get_seq_length())}
    assert graphs


def test_own_loop_with_a_counted_backend(model):
    calls: list = []
    step = torch.compile(model, backend=interpreted(calls, preset="kivi-4", k_group_size=8, residual_length=16))
    cache = StaticCache(model.config, max_cache_len=ROOM)
    with torch.no_grad():
        model(PROMPT[:1], past_key_values=cache)
        for _ in range(5):
            step(PROMPT[:1, :1], past_key_values=cache)
    assert [rewritten_sites(gm) for gm in calls] == [2]
    assert cache.layers[0].keys.spec.bits == 4
