"""Hand-written models in the style of gpt-fast: KV buffers of a module, written by indexed assignment."""

from __future__ import annotations

import pytest
import torch
from reference_cache import ReferenceLayer, Side
from stepping import interpreted, relative_error
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from xquant_fx import XQuantConfig, memory_report
from xquant_fx.cache.kv_tensor import QuantizedKV

LAYERS, HEADS, KV_HEADS, DIM, MAX_LEN = 4, 4, 2, 16, 96
CONFIG = XQuantConfig.preset("xquant").replace(k_group_size=8, residual_length=16, share_keys_from=0)


class KVCache(nn.Module):
    def __init__(self):
        super().__init__()
        for name in ("k_cache", "v_cache"):
            self.register_buffer(name, torch.zeros(1, KV_HEADS, MAX_LEN, DIM), persistent=False)

    def update(self, input_pos, k, v):
        self.k_cache[:, :, input_pos] = k
        self.v_cache[:, :, input_pos] = v
        return self.k_cache, self.v_cache


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.wqkv = nn.Linear(HEADS * DIM, (HEADS + 2 * KV_HEADS) * DIM, bias=False)
        self.wo = nn.Linear(HEADS * DIM, HEADS * DIM, bias=False)
        self.kv_cache = KVCache()

    def forward(self, x, mask, input_pos):
        b, s, _ = x.shape
        q, k, v = self.wqkv(x).split([HEADS * DIM, KV_HEADS * DIM, KV_HEADS * DIM], dim=-1)
        q, k, v = (t.view(b, s, -1, DIM).transpose(1, 2) for t in (q, k, v))
        k, v = self.kv_cache.update(input_pos, k, v)
        k, v = (t.repeat_interleave(HEADS // KV_HEADS, dim=1) for t in (k, v))
        y = scaled_dot_product_attention(q, k, v, attn_mask=mask[..., : k.shape[2]])
        return self.wo(y.transpose(1, 2).reshape(b, s, -1))


class Decoder(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(64, HEADS * DIM)
        self.position = nn.Embedding(MAX_LEN, HEADS * DIM)
        self.layers = nn.ModuleList(Attention() for _ in range(LAYERS))
        self.register_buffer("causal", torch.ones(MAX_LEN, MAX_LEN, dtype=torch.bool).tril(), persistent=False)

    def forward(self, ids, input_pos):
        mask = self.causal[None, None, input_pos]
        x = self.embed(ids) + self.position(input_pos)
        for layer in self.layers:
            x = x + layer(torch.nn.functional.layer_norm(x, x.shape[-1:]), mask, input_pos)
        return x @ self.embed.weight.T


class ReferenceKV:
    """Stands in for KVCache: the independent reference, grown and padded to MAX_LEN."""

    def __init__(self, layer: ReferenceLayer):
        self.layer = layer

    def update(self, input_pos, k, v):
        return self.layer.update(k, v)


def decode(model, step, sizes, ids, flush=lambda: None):
    out, at = [], 0
    with torch.no_grad():
        for i, n in enumerate(sizes):
            call = model if i == 0 else step
            out.append(call(ids[:, at : at + n], torch.arange(at, at + n)))
            flush()
            at += n
    return torch.cat(out, 1)


def reference_run(sizes, ids, config):
    model, made = Decoder(), []
    for i, layer in enumerate(model.layers):
        k_lower = made[i - 1].key if i % 2 and config.k_bits < 16 else None
        v_lower = made[i - 1].value if i % 2 and i >= LAYERS // 2 and config.v_bits < 16 else None
        key = Side("key", config.k_bits, config, k_lower, None)
        made.append(ReferenceLayer(key, Side("value", config.v_bits, config, v_lower, None)))
        del layer.kv_cache
        layer.kv_cache = ReferenceKV(made[-1])

    def flush():
        for layer in made:
            layer.flush()

    return decode(model, model, sizes, ids, flush)


@pytest.fixture
def ids():
    return torch.randint(0, 64, (1, MAX_LEN), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("compiled", [pytest.param(False, marks=pytest.mark.slow), True])
def test_buffers_are_taken_over_and_equal_the_reference(ids, compiled):
    """The prompt is written uncompiled; the first compiled step quantizes what the buffers hold."""
    model, sizes = Decoder(), [21] + [1] * 60
    graphs: list = []
    backend = "xquant" if compiled else interpreted(graphs, config=CONFIG)
    options = {"options": {"config": CONFIG}} if compiled else {}
    step = torch.compile(model, backend=backend, dynamic=False, **options)
    got = decode(model, step, sizes, ids)
    assert relative_error(got, reference_run(sizes, ids, CONFIG)) < 1e-4
    assert compiled or len(graphs) == 1
    caches = [layer.kv_cache for layer in model.layers]
    assert all(isinstance(t, QuantizedKV) for c in caches for t in (c.k_cache, c.v_cache))
    assert caches[1].k_cache.state.lower is caches[0].k_cache.state
    assert caches[1].v_cache.state.lower is None and caches[3].v_cache.state.lower is caches[2].v_cache.state
    report = memory_report(model)
    assert report.full_bytes == 2 * LAYERS * KV_HEADS * MAX_LEN * DIM * 4 and report.ratio > 1.5


@pytest.mark.parametrize("preset", ["full", "xquant-1bit"])
def test_appends_to_slices_of_known_positions(preset):
    """Whose bounds are Python numbers: each step is a graph of its own."""

    def step(q, k, v, keys, values, a):
        keys[:, :, a : a + q.shape[2]] = k
        values[:, :, a : a + q.shape[2]] = v
        mask = torch.arange(32) <= torch.arange(a, a + q.shape[2])[:, None]
        return torch.nn.functional.scaled_dot_product_attention(q, keys, values, attn_mask=mask)

    compiled = torch.compile(step, backend=interpreted(preset=preset), dynamic=False)
    mine, theirs = ([torch.zeros(1, 2, 32, 8) for _ in range(2)] for _ in range(2))
    at, seed = 0, torch.Generator().manual_seed(0)
    with torch.no_grad():
        for new in (5, 1, 1, 2):
            q, k, v = torch.randn(3, 1, 2, new, 8, generator=seed)
            torch.testing.assert_close(compiled(q, k, v, *mine, at), step(q, k, v, *theirs, at))
            at += new
    assert isinstance(mine[0], QuantizedKV) and mine[0].state.length == at


def test_sixteen_bits_change_nothing(ids):
    sizes = [21] + [1] * 40
    plain, model = Decoder(), Decoder()
    step = torch.compile(model, backend=interpreted(preset="full"), dynamic=False)
    assert relative_error(decode(model, step, sizes, ids), decode(plain, plain, sizes, ids)) < 1e-6


def test_starting_over_at_position_zero(ids):
    model, sizes = Decoder(), [21] + [1] * 30
    step = torch.compile(model, backend=interpreted(config=CONFIG), dynamic=False)
    first = decode(model, step, sizes, ids)
    second = decode(model, step, sizes, ids)  # the buffers still hold the first text; the prompt is eager
    assert relative_error(second, first) < 1e-5


def test_a_jump_of_the_position_is_an_error_not_zeros(ids):
    model = Decoder()
    step = torch.compile(model, backend=interpreted(config=CONFIG), dynamic=False)
    decode(model, step, [21, 1, 1], ids)
    with torch.no_grad(), pytest.raises(RuntimeError, match="appended"):
        step(ids[:, :1], torch.tensor([40]))
