"""One buffer, several attentions: layers that read another layer's cache, two attentions on one value buffer."""

from __future__ import annotations

import copy
import pickle
import weakref

import pytest
import torch
from dynamo_graphs import SHAPE, SMALL, sites_of
from stepping import interpreted, logits_of, relative_error, run_steps
from test_later_prompts import Run
from test_untraced import own_backends  # noqa: F401 - a fixture of all tests here
from transformers import (
    AutoModelForCausalLM,
    DiffLlamaConfig,
    DynamicCache,
    Gemma4TextConfig,
    StaticCache,
)

from xquant_fx import XQuantCache, XQuantConfig, ops
from xquant_fx.cache.group import Chunk
from xquant_fx.cache.growing import STORED_KV

pytest_plugins = ["plain_torch"]
sdpa = torch.nn.functional.scaled_dot_product_attention
IDS = torch.randint(3, 64, (2, 44), generator=torch.Generator().manual_seed(3))
STEPS = {"gemma4": [1, 1, 12, 1], "diffllama": [1] * 3}
FEW = [1] * 3
OF_16_BITS = dict(k_bits=16, v_bits=16, k_group_size=4, residual_length=4, rollback_tokens=8, sliding_windows=True)
NARROW = dict(k_bits=3, v_bits=3, k_group_size=4, residual_length=4, sink_tokens=0, rollback_tokens=8)
CACHES = {
    "XQuantCache": lambda config: XQuantCache(config, 48, XQuantConfig.preset("full")),
    "StaticCache": lambda config: StaticCache(config, max_cache_len=48),
    "DynamicCache": lambda config: DynamicCache(config=config),
}


def gemma4(**more_fields):
    """Layer 2 reads what the last layer of its type below it stores: layer 1, if all are of one type."""
    fields = dict(SMALL, num_hidden_layers=3, num_kv_shared_layers=1, layer_types=["full_attention"] * 3) | more_fields
    more = dict(global_head_dim=8, vocab_size_per_layer_input=64, hidden_size_per_layer_input=8)
    return Gemma4TextConfig(**fields, **more)


CONFIGS = {"diffllama": lambda: DiffLlamaConfig(**SMALL), "gemma4": gemma4}


@pytest.fixture(scope="module", params=CONFIGS)
def model(request):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIGS[request.param]()).eval()


# Compiled steps on our cache are in test_uncompiled_steps_read_what_compiled_ones_read, those on buffers that are
# taken over in test_hand_written.
@pytest.mark.parametrize(
    ("kind", "few"), [("DynamicCache", True), *(pytest.param(kind, False, marks=pytest.mark.slow) for kind in CACHES)]
)
def test_models_exactly_at_16_bits(model, kind, few):
    calls, sizes = [], FEW if few else STEPS[model.config.model_type.removesuffix("_text")]
    options = {} if kind == "XQuantCache" else {"preset": "full"}
    step = torch.compile(model.forward, backend=interpreted(calls, **options))
    cache = CACHES[kind](model.config)
    mine = run_steps([(model.forward, 10), *((step, n) for n in sizes)], IDS, cache)
    full = CACHES["StaticCache"](model.config)
    theirs = run_steps([(model.forward, 10), *((model.forward, n) for n in sizes)], IDS, full)
    assert relative_error(mine, theirs) < 1e-5
    held = [t for layer in cache.layers for t in (layer.keys, layer.values) if t is not None]
    assert len(held) == 4 and all(isinstance(t, STORED_KV) for t in held)
    appends = sum(node.target is ops.STORE for node in calls[-1].graph.nodes)
    assert appends == 4, "each buffer is appended to once"


# Hand-written: q, k, v [1, 2, 1, 8], buffers [1, 2, 16, 8].


def one_value_buffer(q, k, v, first, second, values, pos):
    for buffer, x in ((first, k), (second, -k), (values, v)):
        buffer[:, :, pos] = x
    return sdpa(q, first, values) - 0.3 * sdpa(q, second, values)


def one_key_buffer(q, k, v, keys, first, second, pos):
    for buffer, x in ((keys, k), (first, v), (second, v * 2)):
        buffer[:, :, pos] = x
    return sdpa(q, keys, first) + sdpa(q * 2, keys, second)


def both_of_another_layer(q, k, v, keys, values, third, pos):
    for buffer, x in ((keys, k), (values, v), (third, v)):
        buffer[:, :, pos] = x
    x = sdpa(q, keys, values)
    return torch.softmax(x @ keys.mT, -1) @ values + sdpa(x, keys, third)


@pytest.mark.usefixtures("plain_torch")
@pytest.mark.parametrize("step", [one_value_buffer, one_key_buffer, both_of_another_layer], ids=lambda s: s.__name__)
@pytest.mark.parametrize("bits", [16, 3])
def test_hand_written(step, bits):
    torch.manual_seed(0)
    tokens = [[torch.randn(1, 2, 1, 8) for _ in range(3)] for _ in range(16)]
    calls = []
    compiled = torch.compile(
        step, backend=interpreted(calls, **{**NARROW, "k_bits": bits, "v_bits": bits}), dynamic=False
    )
    mine, theirs = ([torch.zeros(SHAPE) for _ in range(3)] for _ in range(2))
    with torch.no_grad():
        results = [
            (compiled(*x, *mine, torch.tensor([at])), step(*x, *theirs, torch.tensor([at])))
            for at, x in enumerate(tokens)
        ]
    error = relative_error(*(torch.stack(side) for side in zip(*results, strict=True)))
    assert error < 1e-6 if bits == 16 else 1e-4 < error < 0.4
    assert all(isinstance(t, STORED_KV) for t in mine)
    nodes = [node.target for node in calls[-1].graph.nodes]
    fused = 0 if bits == 16 else 3 if step is both_of_another_layer else 2
    assert (nodes.count(ops.STORE), nodes.count(ops.DECODE)) == (3, fused)


def test_both_roles_are_left_alone():
    """Keys of one attention that are the values of another have no role."""

    def step(q, k, v, keys, values, third, pos):
        for buffer, x in ((keys, k), (values, v), (third, v)):
            buffer[:, :, pos] = x
        return sdpa(q, keys, values) + sdpa(q, values, third)

    x = torch.randn(1, 2, 1, 8)
    first, second = sites_of(step, x, x, x, *(torch.zeros(SHAPE) for _ in range(3)), torch.tensor([3]))
    assert first.reason == second.reason == "keys and values are read from one buffer"
    assert first.has_cache and second.has_cache


def test_life_of_a_cache_with_layers_that_store_nothing():
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(gemma4()).eval()
    cache = XQuantCache(model.config, 48, XQuantConfig(**NARROW))
    logits_of(model, IDS[:, :20], cache)
    other = XQuantCache(model.config, 48, XQuantConfig(**NARROW))
    other.load_state_dict(cache.state_dict())
    assert torch.equal(*(logits_of(model, IDS[:, 20:22], c) for c in (cache, other)))
    both = logits_of(model, IDS[:, 22:23], other)
    cache.batch_select_indices(torch.tensor([1]))
    torch.testing.assert_close(logits_of(model, IDS[1:, 22:23], cache), both[1:], rtol=0, atol=1e-5)
    cache.batch_repeat_interleave(2)
    cache.crop(-1)
    assert cache.get_seq_length() == 22 and cache.layers[0].batch_size == 2


@pytest.mark.usefixtures("plain_torch")
def test_uncompiled_steps_read_what_compiled_ones_read():
    """Layer 2 reads what layer 0 stored, after layer 1 was written to."""
    torch.manual_seed(0)
    types = ["sliding_attention", "full_attention", "sliding_attention"]
    model = AutoModelForCausalLM.from_config(gemma4(layer_types=types, sliding_window=24, initializer_range=0.3)).eval()
    cache = XQuantCache(model.config, 48, XQuantConfig(**NARROW, sliding_windows=True))
    logits_of(model, IDS[:, :20], cache)
    step = torch.compile(model.forward, backend=interpreted(), dynamic=False)
    for at in (20, 21):
        compiled, ids = copy.deepcopy(cache), IDS[:, at : at + 1]
        assert relative_error(*(logits_of(f, ids, c) for f, c in ((model, cache), (step, compiled)))) < 1e-5
    assert not cache.windows_left


def test_windows_that_others_read_behind_a_long_turn():
    """Layer 2 reads what layer 0 gave its own attention: tokens that its window has overwritten by then."""
    kinds = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
    torch.manual_seed(0)
    config = gemma4(num_hidden_layers=4, num_kv_shared_layers=2, layer_types=kinds, sliding_window=16)
    run = Run(AutoModelForCausalLM.from_config(config).eval(), **OF_16_BITS)
    mine, theirs = run.cache(), run.cache()
    with torch.no_grad():
        for ids in IDS.split([11, 1, 1, 1, 10, 9, 1, 10], 1):
            expected = run.model(ids, past_key_values=theirs).logits
            torch.testing.assert_close(run(ids, mine), expected, rtol=1e-4, atol=1e-5)
    assert all(isinstance(layer.keys, STORED_KV) for layer in mine.layers[:2])
    (group,) = {layer.keys.live.group for layer in mine.layers[:2]}
    assert {layer for (layer, _), chunk in group.chunks.items() if chunk.x is not None} <= {0, 1}
    run(IDS[:, :1], mine)
    assert not any(chunk.x is not None for chunk in group.chunks.values())  # nothing is kept that nobody reads


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda chunk: pickle.loads(pickle.dumps(chunk))])
def test_a_copy_of_what_is_read_is_read_by_nobody(copied):
    reader, chunk = torch.zeros(1), Chunk(torch.ones(1, 1, 9, 1), 3, 9)
    chunk.reader = weakref.ref(reader)
    made = copied(chunk)
    assert chunk.is_needed and not made.is_needed and torch.equal(made.x, chunk.x)
