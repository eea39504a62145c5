"""What ``explain`` says of each kind of cache, and that it leaves the caller's cache alone."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch
from dynamo_graphs import FastModel, tiny
from states import range_config
from stepping import interpreted
from transformers import DynamicCache, StaticCache

import xquant_fx.warn_once as warn_once
from xquant_fx import NotRewrittenError, XQuantCache, explain, memory_report, ops
from xquant_fx.cache.kv_tensor import QuantizedKV

CONFIG = range_config(k_bits=2, v_bits=1, share_values_from=0, k_group_size=8, residual_length=8)
IDS = torch.arange(3, 17)[None]
FULL = 2 * 1 * 2 * 32 * 8 * 4  # bytes of a layer: K and V, [1, 2, 32, 8], fp32


@pytest.fixture(autouse=True)
def no_warnings_given_yet(monkeypatch):
    warn_once.forget()


@pytest.fixture(scope="module")
def llama():
    return tiny("llama")


@pytest.fixture(scope="module")
def warm_step(llama):
    """(cache, what is said of a step with it): for what only reads them."""
    cache = filled(llama, XQuantCache(llama.config, 32, CONFIG))
    return cache, explain(llama, IDS[:, :1], past_key_values=cache)


@torch.no_grad()
def filled(model, cache):
    model(IDS, past_key_values=cache)
    return cache


def held_by_states(cache) -> int:
    """Bytes of a cache but for its token counters and what its layers share (padding and the fault flag)."""
    group, report = cache.group, memory_report(cache)
    assert report.total_bytes == sum(report.parts.values())
    counters = sum(layer.cumulative_length.nbytes for layer in cache.layers)
    return report.total_bytes - group.start.nbytes - group.faults.tensor.nbytes - counters


@pytest.mark.parametrize("warm", [False, True])
def test_xquant_cache(llama, warm_step, warm):
    cache = XQuantCache(llama.config, 32, CONFIG)
    cache, found = warm_step if warm else (cache, explain(llama, IDS, past_key_values=cache))
    lower, upper = found.sites
    assert found.graphs == 1
    assert [(s.layer, s.rewritten, s.k_bits, s.v_bits, s.full_bytes) for s in found.sites] == [
        (0, True, 2, 1, FULL),
        (1, True, 2, 1, FULL),
    ]
    assert (lower.partner, lower.key_partner, lower.value_partner, lower.reason) == (None, None, None, "quantized")
    assert (upper.partner, upper.key_partner, upper.value_partner) == (0, None, 0)
    assert upper.reason == "quantized, with the value codes of layer 0"
    assert lower.write == "index_copy_" and lower.read.endswith("scaled_dot_product_attention")
    assert cache.is_initialized == warm  # the caller's cache is as it was
    if warm:
        assert cache.get_seq_length() == IDS.shape[1] == cache.states[0].length
        assert "layers[1].keys" in upper.name
    other = filled(llama, XQuantCache(llama.config, 32, CONFIG))
    assert sum(site.bytes for site in found.sites) == held_by_states(other)


def test_the_callers_cache_is_not_advanced(llama):
    for make in (lambda: XQuantCache(llama.config, 32, CONFIG), lambda: StaticCache(llama.config, max_cache_len=32)):
        cache = filled(llama, make())
        before = copy.deepcopy(cache)
        said = [explain(llama, IDS[:, :1], past_key_values=cache) for _ in range(1 + isinstance(cache, XQuantCache))]
        assert said[0] == said[-1]
        with torch.no_grad():
            ours, theirs = (llama(IDS[:, :1], past_key_values=c).logits for c in (cache, before))
        assert torch.equal(ours, theirs)


def test_static_cache_with_options(llama, warm_step):
    cache = filled(llama, StaticCache(config=llama.config, max_cache_len=32))
    found = explain(llama, IDS[:, :1], past_key_values=cache, options={"config": CONFIG})
    assert found.sites == warm_step[1].sites  # what it is going to be once the next step has taken it over
    assert not isinstance(cache.layers[0].keys, QuantizedKV)


def test_options_decide_for_ordinary_buffers(llama):
    cache = filled(llama, StaticCache(config=llama.config, max_cache_len=32))
    options = {"k_bits": [4, 8], "preset": "asymkv-1.5", "k_group_size": 16, "residual_length": 16}
    sites = explain(llama, IDS[:, :1], past_key_values=cache, options=options).sites
    assert [(s.k_bits, s.v_bits, s.partner) for s in sites] == [(4, 1, None), (8, 1, None)]
    assert sites[0].bytes < sites[1].bytes


def test_cold_static_cache_says_when(llama):
    cache = StaticCache(config=llama.config, max_cache_len=32)
    found = explain(llama, IDS, past_key_values=cache, strict=True)
    for site in found.sites:
        assert not site.rewritten and site.layer is None and site.bytes == site.full_bytes == FULL
        assert site.reason == "keys: the buffer is allocated inside this graph; it is taken over at the next step"
    assert not cache.is_initialized


def test_dynamic_cache(llama):
    cache = DynamicCache(config=llama.config)
    filled(llama, cache)
    found = explain(llama, IDS[:, :1], past_key_values=cache)
    for layer, site in enumerate(found.sites):
        assert (site.layer, site.rewritten, site.k_bits, site.v_bits, site.partner) == (layer, True, 2, 2, None)
        assert (site.write, site.reason, site.dequantized) == ("concatenation", "quantized", "")
        assert f"layers[{layer}].keys" in site.name
    assert cache.get_seq_length() == IDS.shape[1]


def test_strict_raises(llama):
    model = tiny("gemma3_text")
    short = dict(k_group_size=2, residual_length=2, rollback_tokens=8, sliding_windows=False)
    with pytest.raises(NotRewrittenError, match="sliding_windows of the config is False"):
        explain(model, IDS, past_key_values=DynamicCache(config=model.config), options=short, strict=True)


def test_sliding_windows_stay(capsys):
    model = tiny("gemma3_text")
    cache = filled(model, XQuantCache(model.config, 32, CONFIG))
    found = explain(model, IDS[:, :1], past_key_values=cache)
    window, full = found.sites
    assert (window.layer, window.rewritten, window.bytes) == (None, False, FULL * 12 // 32)
    assert window.reason == "window or buffer of 12 tokens is within the residual window, which holds 28"
    assert (full.layer, full.rewritten, full.reason) == (0, True, "quantized")
    found.print()
    assert "1 of 2 attention sites rewritten, in 1 graph(s)" in capsys.readouterr().out
    parts = [layer for layer in cache.layers if not isinstance(layer.keys, QuantizedKV)]
    assert sum(s.bytes for s in found.sites) == held_by_states(cache)
    assert sum(layer.keys.nbytes + layer.values.nbytes for layer in parts) == window.bytes


@pytest.mark.parametrize("warm", [pytest.param(False, marks=pytest.mark.slow), True])  # test_xquant_cache has both
def test_latents_of_a_quantized_cache(warm):
    model = tiny("deepseek_v3")
    cache = XQuantCache(model.config, 32, CONFIG)
    if warm:
        filled(model, cache)
    found = explain(model, IDS[:, :1] if warm else IDS, past_key_values=cache, strict=True)
    assert [(s.layer, s.k_bits, s.v_bits, s.value_partner) for s in found.sites] == [(0, 4, 1, None), (1, 4, 1, 0)]
    latents = "quantized; keys or values are computed from what is stored"
    assert [s.reason for s in found.sites] == [latents, f"{latents}, with the value codes of layer 0"]
    assert all(s.rewritten and ("values" in s.name or not warm) for s in found.sites)  # the rotary part of keys
    other = filled(model, XQuantCache(model.config, 32, CONFIG))
    assert sum(site.bytes for site in found.sites) == held_by_states(other)


@pytest.mark.parametrize(
    ("attention", "loads", "why"),
    [
        ("sdpa", 2, ""),  # the latents alone, once per layer
        ("eager", 4, "keys or values are computed from what is stored (latent attention), and the attention is no "),
    ],
)
def test_what_is_said_of_latents_is_what_compiled_steps_do(attention, loads, why):
    model, calls = tiny("deepseek_v3", attention), []
    step = torch.compile(model.forward, backend=interpreted(calls, strict=True), dynamic=False)
    mine, theirs = (filled(model, XQuantCache(model.config, 32, CONFIG)) for _ in range(2))
    with torch.no_grad():
        for t in range(4, 9):
            got, expected = (f(IDS[:, t : t + 1], past_key_values=c).logits for f, c in ((step, mine), (model, theirs)))
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
    (made,) = calls
    assert sum(node.target in (ops.STORE, ops.STORE_BORROWED) for node in made.graph.nodes) == 4
    assert sum(node.target is ops.LOAD for node in made.graph.nodes) == loads
    ordinary = filled(model, StaticCache(config=model.config, max_cache_len=32))
    for site in explain(model, IDS[:, :1], past_key_values=ordinary, strict=True).sites:
        assert site.rewritten and site.reason == "quantized; keys or values are computed from what is stored"
        assert site.dequantized == why + ("scaled_dot_product_attention" if why else "")


def test_keys_alone_from_a_quantized_buffer(llama):
    keys = filled(llama, XQuantCache(llama.config, 32, CONFIG.replace(rollback_tokens=8))).layers[0].keys

    def step(q, k, v, pos):
        keys.index_copy_(2, pos, k)
        return torch.nn.functional.scaled_dot_product_attention(q, keys, v.exp())

    q, k = (torch.randn(1, 2, 1, 8) for _ in range(2))
    (site,) = explain(step, q, k, torch.randn(1, 2, 32, 8), torch.tensor([14]), strict=True).sites
    assert (site.layer, site.rewritten, site.k_bits, site.v_bits) == (0, True, 2, None)
    assert site.full_bytes == FULL // 2 > site.bytes > 0


def test_buffers_of_a_module_are_put_back():
    model = FastModel()
    ids, config = torch.arange(3, 20)[None], {"config": CONFIG}
    found = explain(model, ids[:, :9], torch.arange(9), options=config)
    assert [(s.layer, s.write, s.rewritten, s.partner) for s in found.sites] == [
        (0, "indexed assignment", True, None),
        (1, "indexed assignment", True, 0),
    ]
    assert found.sites[0].read == "repeat_interleave > scaled_dot_product_attention"
    assert all(not layer.kv_cache.k_cache.any() for layer in model.layers)
    with torch.no_grad():
        torch.compile(model, backend="xquant", options=config)(ids[:, :9], torch.arange(9))  # takes them over
    twin = copy.deepcopy(model)
    again = explain(model, ids[:, 9:10], torch.tensor([9]))
    assert again.sites == found.sites
    assert sum(site.bytes for site in again.sites) == memory_report(model).total_bytes - 12  # start, fault
    with torch.no_grad():
        ours, theirs = (m(ids[:, 9:10], torch.tensor([9])) for m in (model, twin))
    assert torch.equal(ours, theirs) and model.layers[0].kv_cache.k_cache.state.length == 10


def test_graph_breaks(llama):
    def step(ids, cache):
        torch._dynamo.graph_break()
        return llama(ids, past_key_values=cache)

    cache = filled(llama, XQuantCache(llama.config, 32, CONFIG))
    assert [s.layer for s in explain(step, IDS[:, :1], cache).sites] == [0, 1]
    keys, values = cache.layers[0].keys, cache.layers[0].values

    def apart(q, x, pos):
        keys.index_copy_(2, pos, x)
        values.index_copy_(2, pos, x)
        torch._dynamo.graph_break()
        return torch.nn.functional.scaled_dot_product_attention(q, keys, values)

    found = explain(apart, torch.randn(1, 2, 1, 8), torch.randn(1, 2, 1, 8), torch.tensor([14]))
    assert found.graphs == 2
    ((layer, write, rewritten),) = [(s.layer, s.write, s.rewritten) for s in found.sites]
    assert (layer, write, rewritten) == (0, "in another graph", True)


def test_two_attentions_of_one_buffer_count_it_once():
    def step(q, k, v, keys, values, pos):
        keys.index_copy_(2, pos, k)
        values.index_copy_(2, pos, v)
        return sum(torch.nn.functional.scaled_dot_product_attention(x, keys, values) for x in (q, -q))

    q, k, v = (torch.randn(1, 2, 1, 8) for _ in range(3))
    keys, values = torch.zeros(1, 2, 32, 8), torch.zeros(1, 2, 32, 8)
    first, second = explain(step, q, k, v, keys, values, torch.tensor([0]), options={"config": CONFIG}).sites
    assert (first.layer, second.layer) == (0, 0)
    assert first.bytes > 0 and (second.bytes, second.full_bytes) == (0, 0)
    assert not keys.any()


def test_either_name_of_the_argument(llama, warm_step):
    """transformers 5.24 renamed it and takes the old name, too; the prefix it gives to buffers is not printed."""
    cache, said = warm_step
    names = {"cache"} & set(inspect.signature(llama.forward).parameters)
    (printed,) = {str(said), *(str(explain(llama, IDS[:, :1], **{name: cache})) for name in names)}
    assert "layers[0].keys" in printed and "2 of 2 attention sites rewritten" in printed


def test_compiled_models_and_models_without_a_cache(llama):
    cache = filled(llama, XQuantCache(llama.config, 32, CONFIG))
    compiled = torch.compile(llama, backend="xquant")
    assert explain(compiled, IDS[:, :1], past_key_values=cache).sites[1].partner == 0
    for site in explain(llama, IDS, use_cache=False).sites:
        assert not site.rewritten and site.bytes == 0 and "no KV cache is read here" in site.reason


def test_print_has_the_facts(warm_step, capsys):
    found = warm_step[1]
    found.print()
    out = capsys.readouterr().out
    assert out.strip() == str(found).strip()
    assert all(line == line.rstrip() and len(line) <= 140 for line in out.splitlines())
    for word in ("layers[0].keys", "layers[1].keys", "index_copy_", "sdpa", "K bits", "V bits", "codes of", "yes"):
        assert word in out
    for site in found.sites:
        assert f"{site.bytes:,}" in out
    assert "2 of 2 attention sites rewritten, in 1 graph(s)" in out
