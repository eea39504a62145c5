"""Latent attention: a cached latent that keys and values are projected from, beside a rotary key that heads share."""

from __future__ import annotations

import copy

import pytest
import torch
from dynamo_graphs import SHAPE, buffers, decode_sites, first_graph, fresh, roles, sites_of, tiny
from rewrites import count
from stepping import interpreted, logits_of, relative_error, run_steps
from transformers import DynamicCache, StaticCache

from xquant_fx import XQuantCache, XQuantConfig, ops
from xquant_fx.cache.growing import STORED_KV
from xquant_fx.compiler.detection import detect_graph
from xquant_fx.compiler.options import parse
from xquant_fx.plan.buffer_plan import ROTARY_BITS

sdpa = torch.nn.functional.scaled_dot_product_attention
FULL = XQuantConfig.preset("full")
LOW = XQuantConfig(k_bits=2, v_bits=3, k_group_size=8, residual_length=8, sink_tokens=2, rollback_tokens=8)
IDS = torch.randint(3, 64, (2, 44), generator=torch.Generator().manual_seed(3))
STEPS = [1, 1, 12, *[1] * 10]
CACHES = {
    "XQuantCache": lambda model, config: XQuantCache(model.config, 48, config),
    "StaticCache": lambda model, config: StaticCache(model.config, max_cache_len=48),
    "DynamicCache": lambda model, config: DynamicCache(config=model.config),
}


@pytest.fixture(scope="module")
def model():
    return tiny("deepseek_v3", num_hidden_layers=1)


def logits(model, step, cache, sizes=STEPS):
    return run_steps([(model.forward, 10), *((step, tokens) for tokens in sizes)], IDS, cache)


def stored(cache):
    """(specs of what the last layer calls keys, values)."""
    layer = cache.layers[-1]
    assert isinstance(layer.keys, STORED_KV) and isinstance(layer.values, STORED_KV)
    return layer.keys.spec, layer.values.spec


@pytest.mark.parametrize("kind, attention", [*((kind, "sdpa") for kind in CACHES), ("StaticCache", "eager")])
def test_roles_come_from_data_flow(kind, attention):
    """transformers calls the latent keys, and the rotary part of keys values."""
    model = tiny("deepseek_v3", attention)
    for site in decode_sites(model, CACHES[kind](model, LOW)):
        assert (site.reason, site.has_cache, site.is_latent, site.key_is_rotary) == ("", True, True, True)
        if kind != "DynamicCache":
            assert roles(site) == ("values", "keys")


# Buffers that are taken over are in test_hand_written_latents, our cache in test_decode_attends_to_latents.
@pytest.mark.parametrize(
    ("kind", "sizes"),
    [("DynamicCache", [1] * 6), *(pytest.param(kind, STEPS, marks=pytest.mark.slow) for kind in CACHES)],
)
def test_exact_at_16_bits(model, kind, sizes):
    step = torch.compile(model.forward, backend=interpreted(**({} if kind == "XQuantCache" else {"preset": "full"})))
    cache = CACHES[kind](model, FULL)
    expected = logits(model, model.forward, StaticCache(model.config, max_cache_len=48), sizes)
    assert relative_error(logits(model, step, cache, sizes), expected) < 1e-6
    assert [spec.bits for spec in stored(cache)] == [16, 16]


@pytest.mark.parametrize("kind", ["XQuantCache", pytest.param("StaticCache", marks=pytest.mark.slow), "DynamicCache"])
def test_what_is_stored(model, kind):
    """The latent per token, the rotary key per channel and with more bits: alike in all caches, and seen in results."""
    cache, compiled = (
        CACHES[kind](model, LOW),
        torch.compile(model.forward, backend=interpreted(seen := [], config=LOW)),
    )
    result = logits(model, model.forward if kind == "XQuantCache" else compiled, cache)
    latent, rotary = stored(cache)
    assert (latent.role, latent.scheme, latent.bits, latent.shape[3]) == ("value", "per_token_rotated", 3, 16)
    assert (rotary.role, rotary.scheme, rotary.bits, rotary.shape[3]) == ("key", "per_channel_ranked", ROTARY_BITS, 8)
    assert {count(graph, ops.DECODE) for graph in seen} == (set() if kind == "XQuantCache" else {0, 1})
    full = logits(model, model.forward, StaticCache(model.config, max_cache_len=48))
    assert 1e-3 < relative_error(result, full) < 0.1


def test_decode_attends_to_latents(model):
    """Steps are fused, a chunk of 12 tokens is not; eager code computes keys and values of each head."""
    plan = [(model.forward, 10), *((model.forward, tokens) for tokens in (1, 12, 1, 1, 2))]
    eager = run_steps(plan, IDS, XQuantCache(model.config, 48, LOW))
    step = torch.compile(model.forward, backend=interpreted(seen := []), dynamic=False)
    fused = run_steps([plan[0], *((step, tokens) for _, tokens in plan[1:])], IDS, XQuantCache(model.config, 48, LOW))
    assert relative_error(fused, eager) < 1e-5
    counted = [(count(graph, ops.DECODE), count(graph, ops.LOAD), "new_empty" in str(graph.graph)) for graph in seen]
    assert counted == [(1, 1, False), (0, 2, True), (1, 1, False)]


def test_inductor_and_greedy_text():
    model = tiny("deepseek_v3", num_hidden_layers=1)
    expected = model.generate(IDS[:1, :12], max_new_tokens=12, do_sample=False)
    other = copy.deepcopy(model)
    other.compile(backend="xquant", options={"preset": "full"})
    assert torch.equal(other.generate(IDS[:1, :12], max_new_tokens=12, do_sample=False), expected)


def test_life_of_the_cache(model):
    """Saved, forked, cropped and reset, layers keep what their two sides are stored as."""
    cache = XQuantCache(model.config, 48, LOW)
    logits_of(model, IDS[:, :20], cache)
    specs, other = stored(cache), XQuantCache(model.config, 48, LOW)
    other.load_state_dict(cache.state_dict())
    assert stored(other) == specs == stored(cache.fork())
    expected = logits_of(model, IDS[:, 20:24], cache)
    assert torch.equal(logits_of(model, IDS[:, 20:24], other), expected)
    cache.crop(-4)
    assert torch.equal(logits_of(model, IDS[:, 20:24], cache), expected)
    cache.reset()
    logits_of(model, IDS[:, :20], cache)
    assert stored(cache) == specs


def test_full_heads_of_the_same_config_are_keys_and_values(model):
    """An older transformers caches what is projected from the latents: shapes tell."""
    cache = XQuantCache(model.config, 48, LOW)
    cache.update(torch.randn(1, 4, 5, 16), torch.randn(1, 4, 5, 8), 0)
    key, value = cache.layers[0].keys.spec, cache.layers[0].values.spec
    assert (key.role, value.role, key.bits, value.bits) == ("key", "value", 2, 3)


# Hand-written steps: q, k, v [1, 2, 1, 8], buffers [1, 2, 16, 8].

W = torch.randn(2, 8, 8, generator=torch.Generator().manual_seed(0)) / 3


def one_latent(q, k, v, keys, values, pos):
    """Keys and values are both projected from one buffer."""
    keys[:, :, pos] = k
    return sdpa(q, keys @ W[0], torch.nn.functional.linear(keys, W[1]))


def rotated_when_read(q, k, v, keys, values, pos):
    keys[:, :, pos], values[:, :, pos] = k, v
    angle = torch.arange(16)[:, None] / torch.arange(1, 5)
    half = torch.cat([-keys[..., 4:], keys[..., :4]], -1)
    return sdpa(q, keys * angle.cos().repeat(1, 2) + half * angle.sin().repeat(1, 2), values)


def put_together(q, k, v, keys, values, pos):
    """The values' latent and the keys' own part, written into a tensor of both."""
    keys[:, :, pos], values[:, :, pos] = k, v
    whole = keys.new_empty(1, 2, 16, 16)
    whole[..., :8].copy_(values @ W[0])
    whole[..., 8:] = keys
    return sdpa(torch.cat([q, q], -1), whole, values @ W[1])


def values_make_a_mask(q, k, v, keys, values, pos):
    keys[:, :, pos], values[:, :, pos] = k, v
    return sdpa(q, keys, values, attn_mask=(values @ W[0, :, :1]).mT)


def norm_of_a_latent(q, k, v, keys, values, pos):
    keys[:, :, pos], values[:, :, pos] = k, v
    latent = keys * (keys.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt()
    return torch.softmax(q @ (latent @ W[0]).mT, -1) @ (values + latent @ W[1])


HANDMADE = {
    one_latent: (["value"], True, False),
    rotated_when_read: (["key", "value"], True, False),
    put_together: (["key", "value"], True, True),
    values_make_a_mask: (["key", "value"], False, False),
    norm_of_a_latent: (["key", "value"], True, False),
}


@pytest.mark.parametrize("step", HANDMADE, ids=lambda step: step.__name__)
@pytest.mark.parametrize("bits", [16, 3])
def test_hand_written_latents(step, bits):
    found, is_latent, key_is_rotary = HANDMADE[step]
    torch.manual_seed(0)
    tokens = [fresh() for _ in range(16)]
    (site,) = sites_of(step, *tokens[0], *buffers(), torch.tensor([0]))
    assert (site.reason, site.is_latent, site.key_is_rotary) == ("", is_latent, key_is_rotary)
    options = dict(k_bits=bits, v_bits=bits, k_group_size=4, residual_length=4, sink_tokens=0, rollback_tokens=8)
    torch._dynamo.reset()
    compiled = torch.compile(step, backend=interpreted(**options), dynamic=False)
    mine, theirs = buffers(), buffers()
    with torch.no_grad():
        results = [
            (compiled(*x, *mine, torch.tensor([at])), step(*x, *theirs, torch.tensor([at])))
            for at, x in enumerate(tokens)
        ]
    error = relative_error(*(torch.stack(side) for side in zip(*results, strict=True)))
    assert error < 1e-6 if bits == 16 else 1e-4 < error < 0.3
    assert [t.spec.role for t in mine if isinstance(t, STORED_KV)] == found
    assert site.key_write.buffer.meta["example_value"].shape == SHAPE


def test_three_buffers_are_left_alone():
    def step(q, k, v, keys, values, third, pos):
        for buffer, x in ((keys, k), (values, v), (third, k)):
            buffer[:, :, pos] = x
        return sdpa(q, keys * 2 + third, values)

    (site,) = sites_of(step, *fresh(), *buffers(), torch.zeros(SHAPE), torch.tensor([3]))
    assert site.reason == "keys and values are computed from 3 buffers" and site.has_cache


# Latents and a rotary key for all of three heads: q [1, 3, q, 5 + 8], buffers [1, 1, 16, 8], values of 6 channels.

ROWS = torch.randn(3 * (5 + 6), 8, generator=torch.Generator().manual_seed(1)) / 3
linear = torch.nn.functional.linear


def made(latent, rows=ROWS, size=11):
    return linear(latent, rows).view(1, 16, 3, size).transpose(1, 2)


def split(latent):
    return made(latent).split([5, 6], -1)


def shared(rotary):
    return rotary.expand(-1, 3, -1, -1)


def joined(q, rotary, latent, mask):
    k, v = split(latent)
    return sdpa(q, torch.cat([k, shared(rotary)], -1), v, mask)


def rotary_part_first(q, rotary, latent, mask):
    k, v = made(latent)[..., :5], made(latent)[..., 5:]
    return sdpa(q.roll(8, -1), torch.cat([shared(rotary), k], dim=3), v, mask.float().log(), scale=0.3)


def written_into_a_tensor(q, rotary, latent, mask):
    k, v = split(latent)
    keys = k.new_empty(1, 3, 16, 13)
    keys[..., 5:] = rotary
    keys[..., :5].copy_(k)
    return sdpa(q, keys, v)


def a_layer_each(q, rotary, latent, mask):
    flat = latent.flatten(0, 1)
    return sdpa(q, torch.cat([made(flat, ROWS[:15], 5), shared(rotary)], -1), made(latent, ROWS[15:], 6), mask)


ABSORBED = (joined, rotary_part_first, written_into_a_tensor, a_layer_each)


def appending(attend):
    def step(q, k, v, rotary, latent, pos):
        rotary[:, :, pos], latent[:, :, pos] = k, v
        return attend(q, rotary, latent, torch.arange(16) <= pos[:, None])

    return step


def three_heads(tokens=1):
    """q, k, v of one step, and two buffers."""
    return (
        torch.randn(1, 3, tokens, 13),
        *torch.randn(2, 1, 1, tokens, 8),
        torch.zeros(1, 1, 16, 8),
        torch.zeros(1, 1, 16, 8),
    )


@pytest.mark.parametrize("attend", ABSORBED, ids=lambda attend: attend.__name__)
def test_absorbed(attend, monkeypatch):
    monkeypatch.delitem(ops.DECODE_KERNELS, "cpu")  # plain torch: nothing to compile
    options = dict(k_bits=3, v_bits=3, k_group_size=4, residual_length=4, sink_tokens=2, rollback_tokens=8)
    torch.manual_seed(0)
    step, results, steps = appending(attend), [], [three_heads() for _ in range(12)]
    for disable in ([], ["fuse_decode"]):
        torch._dynamo.reset()
        compiled = torch.compile(step, backend=interpreted(seen := [], disable=disable, **options), dynamic=False)
        stores = three_heads()[3:]
        with torch.no_grad():
            results.append([compiled(*x[:3], *stores, torch.tensor([at])) for at, x in enumerate(steps)])
        assert count(seen[-1], ops.DECODE) == (not disable)
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


def test_absorbed_latents_of_a_window_that_grows(monkeypatch):
    """Scores of the latents that are kept get to where the op has these tokens."""
    monkeypatch.delitem(ops.DECODE_KERNELS, "cpu")

    def step(q, r, c, past):
        rotary, latent = (torch.cat(pair, 2) for pair in zip(past, (r, c), strict=True))
        k, v = linear(latent, ROWS).view(1, -1, 3, 11).transpose(1, 2).split([5, 6], -1)
        seen = torch.arange(rotary.shape[2])[None] > 2
        return sdpa(q, torch.cat([k, shared(rotary)], -1), v, seen), (rotary[:, :, -31:], latent[:, :, -31:])

    config = XQuantConfig(k_bits=3, v_bits=3, k_group_size=4, residual_length=4, rollback_tokens=8)
    torch.manual_seed(0)
    results, steps = [], [three_heads(tokens)[:3] for tokens in (50, *[1] * 4)]
    for disable in ([], ["fuse_decode"]):
        torch._dynamo.reset()
        backend = interpreted(seen := [], disable=disable, config=config.replace(sliding_windows=True))
        compiled, past, out = torch.compile(step, backend=backend), torch.zeros(2, 1, 1, 0, 8), []
        with torch.no_grad():
            for x in steps:
                result, past = compiled(*x, past)
                out.append(result)
        results.append(out)
        assert count(seen[-1], ops.DECODE) == (not disable)
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


def half(attend):
    """``attend`` with keys and values given as functions of what is stored."""
    return lambda q, rotary, latent, mask: attend(q, *split(latent), shared(rotary), latent, mask)


def overlapping(q, k, v, r, latent, mask):
    keys = k.new_empty(1, 3, 16, 13)
    keys[..., :5], keys[..., 4:12] = k, r
    return sdpa(q, keys, v)


def with_zeros(q, k, v, r, latent, mask):
    keys = k.new_zeros(1, 3, 16, 14)
    keys[..., :5], keys[..., 5:13] = k, r
    return sdpa(torch.nn.functional.pad(q, (0, 1)), keys, v)


def changed_weights(q, k, v, r, latent, mask):
    rows = ROWS * 1.0
    k, v = made(latent, rows).split([5, 6], -1)
    rows.mul_(2.0)
    return sdpa(q, torch.cat([k, r], -1), v)


UNFUSED = {
    "a bias": (
        lambda q, k, v, r, c, m: sdpa(
            q, torch.cat([k, r], -1), linear(c, ROWS, ROWS[:, 0]).view(1, 16, 3, 11).transpose(1, 2)[..., 5:]
        ),
        "not by linear layers",
    ),
    "a norm": (lambda q, k, v, r, c, m: sdpa(q, torch.cat([k, r], -1), split(c * c.abs())[1]), "not by linear layers"),
    "channels before heads": (
        lambda q, k, v, r, c, m: sdpa(
            q, torch.cat([k, r], -1), linear(c, ROWS[:18]).view(1, 16, 6, 3).permute(0, 3, 1, 2)
        ),
        "not by linear layers",
    ),
    "keys that are scaled": (lambda q, k, v, r, c, m: sdpa(q, torch.cat([k * 2, r], -1), v), "not by linear layers"),
    "three parts": (
        lambda q, k, v, r, c, m: sdpa(q, torch.cat([k[..., :2], r, k[..., 2:]], -1), v), "not by linear layers",
    ),
    "keys that are read once more": (
        lambda q, k, v, r, c, m: sdpa(q, x := torch.cat([k, r], -1), v) + x.sum(), "",
    ),
    "parts that overlap": (overlapping, "not by linear layers"),
    "zeros between": (with_zeros, "not by linear layers"),
    "written out": (
        lambda q, k, v, r, c, m: torch.softmax(q @ torch.cat([k, r], -1).mT, -1) @ v, "no scaled_dot_product_attention",
    ),
    "weights that are changed": (changed_weights, "mul_ changes in place"),
}  # fmt: skip


def found_in(step, tokens=1):
    """Why the attention of ``step`` reads dequantized keys and values, or why it stays as it is."""
    gm, inputs = first_graph(step, *three_heads(tokens), torch.arange(tokens))
    with torch.no_grad():
        (site,) = detect_graph(gm, inputs, parse(None, {"k_group_size": 4, "residual_length": 4})).sites
    assert site.form is not None or site.dequantized or site.reason
    return site.dequantized or site.reason


@pytest.mark.parametrize("name", UNFUSED)
def test_not_absorbed(name):
    attend, word = UNFUSED[name]
    assert found_in(appending(joined)) == ""
    reason = found_in(appending(half(attend)))
    assert reason and word in reason, reason


def test_latents_are_projected_after_they_are_appended():
    def step(q, k, v, rotary, latent, pos):
        keys, values = split(latent)
        rotary[:, :, pos], latent[:, :, pos] = k, v
        return sdpa(q, torch.cat([keys, shared(rotary)], -1), values)

    assert "before" in found_in(step)
    assert "more than 8 query tokens" in found_in(appending(joined), 9)
