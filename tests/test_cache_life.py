"""The whole life of a cache: each turn gives the right result or a sentence that says what to do, eager and compiled.

Compiled steps run the rewritten graph op by op (no Inductor), of a decoder that is written here, as Dynamo reads it in
no time. Eager ones are a random Llama's; 16 bits where results must be those of plain transformers, small windows where
it is the life of quantized tokens that matters.
"""

from __future__ import annotations

import copy
import logging
import multiprocessing.reduction
import pickle
import threading

import numpy as np
import pytest
import torch
from plain_decoder import Decoder
from stepping import interpreted, logits_of, relative_error
from transformers import DynamicCache, Gemma2Config, Gemma2ForCausalLM, StaticCache

import xquant_fx.warn_once as warn_once
from xquant_fx import ArgumentError, CacheStateError, ConfigError, XQuantCache, XQuantConfig
from xquant_fx.cache.group import MANY_STEPS

pytest_plugins = ["plain_torch"]

FULL = XQuantConfig.preset("full")
SMALL = XQuantConfig.preset("xquant").replace(k_group_size=8, residual_length=16)
IDS = torch.randint(3, 128, (3, 80), generator=torch.Generator().manual_seed(5))
TOLERANCE = 1e-5


@pytest.fixture
def model(request, tiny_llama):
    compiles = request.node.callspec.params.get("how") == "compiled" if hasattr(request.node, "callspec") else False
    return Decoder().eval() if compiles or "decoder" in request.node.name else tiny_llama(layers=2)


def new(model, config=SMALL, length=128, **kwargs) -> XQuantCache:
    return XQuantCache(model.config, length, config, **kwargs)


def compiled(model):
    return torch.compile(model.forward, backend=interpreted(), dynamic=False)


def generate(model, prompt, cache, tokens=20, **kwargs):
    return model.generate(prompt, past_key_values=cache, max_new_tokens=tokens, do_sample=False, **kwargs)


def interrupt(*args):
    raise KeyboardInterrupt


def broken_off(step, model, layer, ids, cache, **kwargs):
    """A step that Ctrl-C ends in front of ``layer``."""
    hook = getattr(model, "model", model).layers[layer].register_forward_pre_hook(interrupt)
    torch._dynamo.reset()  # which does not look at hooks
    with pytest.raises(KeyboardInterrupt):
        logits_of(step, ids, cache, **kwargs)
    hook.remove()
    torch._dynamo.reset()


STEPS = pytest.mark.parametrize("how", ["eager", "compiled"])


def stepper(how, model):
    return model.forward if how == "eager" else compiled(model)


# What a step must fit.


@STEPS
def test_after_reset_any_batch_and_dtype(model, how, attended_by):
    """As a new cache, in the old memory where it fits."""
    step, cache, before = stepper(how, model), new(model), 0
    parts = (slice(0, 30), slice(30, 31), slice(31, 34) if how == "eager" else slice(31, 32))
    for rows in (1, 3, 3):
        cache.reset()
        twin, states = new(model), [id(state) for state in cache.states]
        for part in parts:
            got, want = (logits_of(s, IDS[:rows, part], c) for s, c in ((step, cache), (model.forward, twin)))
            assert relative_error(got, want) < TOLERANCE
        assert (states == [id(state) for state in cache.states]) == (rows == before)
        before = rows
    model.bfloat16()
    cache.reset()
    logits_of(step, IDS[:1, :20], cache)
    assert {state.spec.dtype for state in cache.states} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("kind", "how"),
    [
        ("xquant", "eager"),
        ("xquant", "compiled"),
        ("taken over", "eager"),
        pytest.param("taken over", "compiled", marks=pytest.mark.slow),
    ],
)
def test_another_batch_or_dtype_is_refused_by_a_decoder_in_a_sentence(model, how, kind):
    cache = new(model) if kind == "xquant" else StaticCache(model.config, max_cache_len=128)
    logits_of(model.forward, IDS[:1, :20], cache)
    logits_of(over := compiled(model), IDS[:1, :1], cache)
    step = over if how == "compiled" else model.forward
    lengths = [layer.keys.state.length for layer in cache.layers]
    with pytest.raises(CacheStateError, match=r"^layer 0.*this cache holds 1 row, the step has 3: make a cache for 3"):
        logits_of(step, IDS[:, :1], cache)
    assert [layer.keys.state.length for layer in cache.layers] == lengths
    if how == "compiled" and torch.__version__ < "2.12":
        return  # no compiled step of that torch notices (docs/versions.md)
    model.bfloat16()
    with pytest.raises(
        CacheStateError, match=r"^layer 0.*holds torch.float32, the step has torch.bfloat16: make the ca"
    ):
        logits_of(step, IDS[:1, :1], cache)


@STEPS
def test_a_prompt_longer_than_the_cache(model, how):
    cache = new(model, length=16)
    with pytest.raises(CacheStateError, match=r"^layer 0: a step of 21 tokens does not fit into a cache of 16"):
        logits_of(stepper(how, model), IDS[:1, :21], cache)
    assert logits_of(model.forward, IDS[:1, :16], cache).shape[1] == 16


def refused(dtype=torch.float32, keys=1, values=1, batch=1):
    """Keys and values that do not fit what ``test_what_a_compiled_append_refuses_is_not_counted`` stores."""
    return torch.ones(batch, 2, keys, 16).to(dtype), torch.ones(batch, 2, values, 16).to(dtype)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (refused(torch.bfloat16), "holds torch.float32, the step has torch.bfloat16"),
        (refused(batch=2), "holds 1 row, the step has 2"),
        (refused(keys=70, values=70), "the cache is full"),
        (refused(values=2), "one position per token"),
        ((refused()[0], refused(torch.bfloat16)[1]), "values: this cache holds torch.float32"),
    ],
)
def test_what_a_compiled_append_refuses_is_not_counted(tiny_llama, given, message) -> None:
    """Neither by the cache nor by its buffers: the next step goes on as if nothing had been."""
    torch._dynamo.reset()
    cache, good = XQuantCache(tiny_llama(layers=1).config, 64, SMALL), refused()
    append = torch.compile(lambda k, v: cache.update(k, v, 0), backend=interpreted(self_check=False), dynamic=False)
    with torch.no_grad():
        cache.update(*refused(keys=9, values=9), 0)
        append(*good)
        with pytest.raises(CacheStateError, match=f"^layer 0.*{message}"):
            append(*given)
        assert cache.get_seq_length() == 10
        append(*good)
    assert [cache.get_seq_length(), *(state.length for state in cache.states)] == [11, 11, 11]


def test_a_cache_left_elsewhere_is_named_in_a_compiled_append(tiny_llama) -> None:
    torch._dynamo.reset()
    cache, good = XQuantCache(tiny_llama(layers=1).config, 64, SMALL), refused()
    cache.update(*good, 0)
    cache.to("meta")
    append = torch.compile(lambda k, v: cache.update(k, v, 0), backend=interpreted(), dynamic=False)
    with pytest.raises(CacheStateError, match=r"^layer 0 keys: this cache is on meta, the step on cpu: move it"):
        append(*good)


@pytest.mark.parametrize("how", ["eager", "compiled"])
@pytest.mark.parametrize("emptied", [0, 1])
def test_a_layer_that_was_emptied_alone(model, how, emptied) -> None:
    """It must not take a step for a prompt."""
    cache = new(model)
    logits_of(model, IDS[:1, :20], cache)
    cache.layers[emptied].reset()
    with pytest.raises(CacheStateError, match=f"layer {emptied} holds no tokens, layer {1 - emptied} does"):
        logits_of(compiled(model) if how == "compiled" else model, IDS[:1, 20:21], cache)


def test_a_refused_step_leaves_the_cache_as_it_was(model):
    """Gradients are refused when the first layer stores; the next try finds an empty cache."""
    cache = new(model)
    with pytest.raises(CacheStateError, match="no gradient"):
        model(IDS[:1, :20], past_key_values=cache)
    assert cache.get_seq_length() == 0
    want = logits_of(model.forward, IDS[:1, :20], new(model))
    assert torch.equal(logits_of(model.forward, IDS[:1, :20], cache), want)
    with pytest.raises(CacheStateError, match="no gradient"):
        model(IDS[:1, :1], past_key_values=cache)
    assert cache.get_seq_length() == 20 and {state.length for state in cache.states} == {20}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_mask_as_wide_as_the_cache_on_the_first_prompt(tiny_llama, attention):
    model = tiny_llama(layers=2, attn_implementation=attention)
    mask = torch.ones(16, 16).tril().bool()[None, None]
    wide = torch.nn.functional.pad(mask, (0, 48))
    additive = attention == "eager"
    want = logits_of(model.forward, IDS[:1, :16], None)
    for given in (mask, wide):
        given = torch.zeros(given.shape).masked_fill(~given, -1e9) if additive else given
        got = logits_of(model.forward, IDS[:1, :16], new(model, FULL, 64), attention_mask=given)
        assert relative_error(got, want) < TOLERANCE


@STEPS
def test_inference_mode_and_then_not(model, how):
    step, cache, sizes = stepper(how, model), new(model), (30, 1, 1, 1)  # a group is quantized at the 32nd

    def run(cache, *modes):
        out, at = [], 0
        for size, mode in zip(sizes, modes, strict=True):
            with mode():
                out.append(step(IDS[:1, at : at + size], past_key_values=cache).logits.clone())
            at += size
        return torch.cat(out, 1)

    inside, outside = torch.inference_mode, torch.no_grad
    want = run(new(model), *[outside] * 4)
    assert relative_error(run(cache, inside, inside, outside, inside), want) < TOLERANCE
    with inside():
        cache.reset()
        made_inside = new(model)
        copied = copy.deepcopy(cache)
    for again in (cache, made_inside, copied):
        assert relative_error(run(again, outside, inside, outside, outside), want) < TOLERANCE
        again.crop(-1)
        again.reorder_cache(torch.tensor([0]))


# Padding.


@pytest.mark.parametrize("empty", [XQuantCache.reset, lambda cache: cache.crop(-cache.get_seq_length())])
def test_padding_is_forgotten_by_reset_and_by_a_crop_to_nothing(model, empty):
    mask = torch.ones(1, 40, dtype=torch.long)
    mask[0, :25] = 0
    runs = []
    for padding in (None, mask):
        cache = new(model, padding_mask=padding)
        logits_of(model.forward, IDS[:1, :40], cache)
        empty(cache)
        logits_of(model.forward, IDS[1:2, :40], cache)
        runs.append(logits_of(model.forward, IDS[1:2, 40:41], cache))
    assert torch.equal(*runs)
    with pytest.raises(CacheStateError, match="holds one already: reset"):
        cache.set_padding_mask(mask)
    empty(cache)
    cache.set_padding_mask(mask)
    logits_of(model.forward, IDS[:1, :40], cache)
    assert cache.group.start.tolist() == [25]


@STEPS
def test_padding_of_another_prompt_is_refused(model, how):
    step = stepper(how, model)
    mask = torch.tensor([[0] * 30 + [1] * 10])
    with pytest.raises(CacheStateError, match="begins with 30 tokens of padding, and the first step brings 20"):
        logits_of(step, IDS[:1, :20], new(model, padding_mask=mask))
    cache = new(model, padding_mask=mask)
    logits_of(step, IDS[:1, :35], cache)
    with pytest.raises(CacheStateError, match="padding_mask is 40 tokens wide, the prompt had 35"):
        logits_of(step, IDS[:1, 35:36], cache)
    cache.reset()
    logits_of(step, IDS[:1, :35], cache)
    with pytest.raises(CacheStateError, match="padding_mask is 40 tokens wide, the first step brings 45"):
        logits_of(step, IDS[:1, :45], new(model, padding_mask=mask))


def test_left_padding_of_very_different_lengths_in_chunks(model):
    mask = torch.tensor([[0] * (40 - n) + [1] * n for n in (40, 25, 33)])
    ids, want = IDS[:, :40] * mask, generate(model, IDS[:, :40] * mask, None, attention_mask=mask)
    for kwargs in ({}, dict(prefill_chunk_size=16)):
        cache = new(model, FULL, padding_mask=mask)
        assert torch.equal(generate(model, ids, cache, attention_mask=mask, **kwargs), want)
        assert cache.group.start.tolist() == [0, 15, 7]


@pytest.mark.parametrize("mask", [[[0, 1]], torch.ones(3), torch.tensor([[1, 0, 1]]), torch.ones(0, 4)])
def test_masks_that_are_no_left_padding(model, mask):
    with pytest.raises(ConfigError, match="padding_mask must be"):
        new(model, padding_mask=mask)


# Steps that break off.


@STEPS
def test_an_interrupted_step_is_told_and_taken_back(model, how):
    step, cache = stepper(how, model), new(model)
    logits_of(model.forward, IDS[:1, :30], cache)
    logits_of(step, IDS[:1, 30:31], cache)
    twin = cache.fork()
    broken_off(step, model, 1, IDS[:1, 31:32], cache)
    for again in (step, model.forward):
        with pytest.raises(
            CacheStateError, match=r"^layer 0 holds 32 keys, layer 1 31: a step was interrupted.*crop\(-1\)"
        ):
            logits_of(again, IDS[:1, 31:32], cache)
    cache.crop(-1)
    want = logits_of(model.forward, IDS[:1, 31:32], twin)
    assert relative_error(logits_of(step, IDS[:1, 31:32], cache), want) < TOLERANCE


def test_an_interrupted_chunk_that_is_too_long_to_go_back(model):
    cache = new(model)
    logits_of(model.forward, IDS[:1, :20], cache)
    broken_off(model.forward, model, 1, IDS[:1, 20:60], cache)
    with pytest.raises(CacheStateError, match="reset"):
        logits_of(model.forward, IDS[:1, 20:60], cache)
    with pytest.raises(CacheStateError, match="at most 20 tokens"):
        cache.crop(-40)
    cache.reset()
    assert torch.equal(logits_of(model.forward, IDS[:1], cache), logits_of(model.forward, IDS[:1], new(model)))


def test_an_interrupted_chunk_of_a_padded_prompt(model):
    """The mask is not blamed for it, and counts on where ``crop`` goes back to."""
    mask = torch.tensor([[1] * 29, [0] * 8 + [1] * 21])
    runs = []
    for broken in (False, True):
        cache = new(model, padding_mask=mask)
        logits_of(model.forward, IDS[:2, :12], cache)
        if broken:
            broken_off(model.forward, model, 1, IDS[:2, 12:24], cache)
            with pytest.raises(CacheStateError, match=r"a step was interrupted in between; crop\(-12\)"):
                logits_of(model.forward, IDS[:2, 12:24], cache)
            cache.crop(-12)
        runs.append([logits_of(model.forward, IDS[:2, a:b], cache) for a, b in ((12, 24), (24, 29), (29, 30))])
    assert all(torch.equal(*pair) for pair in zip(*runs, strict=True))


@pytest.mark.parametrize(
    ("layer", "how"),
    [(0, "eager"), (1, "eager"), pytest.param(0, "compiled", marks=pytest.mark.slow), (1, "compiled")],
)
def test_an_interrupted_first_prompt(model, how, layer):
    """In front of layer 1 some layers are allocated and some are not."""
    step, cache, mask = stepper(how, model), new(model), torch.tensor([[1] * 20, [0] * 8 + [1] * 12])
    broken_off(model.forward, model, layer, IDS[:2, :20], cache, attention_mask=mask)
    if layer:
        with pytest.raises(
            CacheStateError, match="layer 1 holds no tokens, layer 0 does: the first step was interrupt"
        ):
            logits_of(step, IDS[:2, :20], cache, attention_mask=mask)
        cache.reset()
    twin = new(model)
    for ids in (IDS[:2, :20], IDS[:2, 20:21]):
        got, want = (logits_of(s, ids, c, attention_mask=mask) for s, c in ((step, cache), (model.forward, twin)))
        assert relative_error(got, want) < TOLERANCE
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)


@pytest.mark.parametrize(
    ("kind", "at"),
    [
        ("xquant", 1),
        pytest.param("xquant", 4, marks=pytest.mark.slow),
        pytest.param("taken over", 1, marks=pytest.mark.slow),
        ("taken over", 4),
    ],
)
def test_a_compiled_step_of_a_decoder_that_breaks_off_between_kernels(model, at, kind):
    """As Ctrl-C does it in the code that Inductor makes."""
    from xquant_fx.compiler.backend import compile_graph
    from xquant_fx.compiler.options import parse

    stores, config = [-100], SMALL.replace(share_values_from=None)

    class Breaking(torch.fx.Interpreter):
        def run_node(self, n):
            stores[0] += "quantize_store" in str(n.target)
            if stores[0] == at:
                raise KeyboardInterrupt
            return super().run_node(n)

    def backend(gm, inputs, **_):
        return compile_graph(gm, inputs, parse(None, {"config": config}), lambda g, *rest: Breaking(g).run)

    step = torch.compile(model.forward, backend=backend, dynamic=False)
    cache = new(model, config) if kind == "xquant" else StaticCache(model.config, max_cache_len=128)
    logits_of(step if at == 1 else model.forward, IDS[:1, :20], cache)
    logits_of(step, IDS[:1, 20:21], cache)
    logits_of(step, IDS[:1, 21:22], cache)
    twin, stores[0] = copy.deepcopy(cache), 0
    with pytest.raises(KeyboardInterrupt):
        logits_of(step, IDS[:1, 22:23], cache)
    stores[0] = -100
    for again in (step, model.forward) if kind == "xquant" else (step,):
        with pytest.raises(
            CacheStateError, match="a compiled step was interrupted; all layers hold 22 tokens at least"
        ):
            logits_of(again, IDS[:1, 22:23], cache)
    if kind == "xquant":
        cache.crop(22 - cache.get_seq_length())
        want = logits_of(model.forward, IDS[:1, 22:23], twin)
        assert relative_error(logits_of(step, IDS[:1, 22:23], cache), want) < TOLERANCE
    cache.reset()
    again, want = (logits_of(model.forward, IDS[:1, :20], c) for c in (cache, new(model, config)))
    assert relative_error(again, want) < TOLERANCE


@pytest.mark.parametrize("channels", [16, 8])
def test_the_first_layer_allocates_for_all(model, channels):
    """So that what stays lies together. A layer of another shape allocates its own, in the same cache."""
    cache = XQuantCache(model.config, max_cache_len=64, config=XQuantConfig.preset("kivi-4"))
    cache.update(*torch.randn(2, 1, 2, 9, 16), 0)
    below, layer = cache.layers[:2]
    before = layer.keys
    assert before is not None and not layer.is_initialized and layer.get_seq_length() == 0
    cache.update(*torch.randn(2, 1, 2, 9, channels), 1)
    assert (layer.keys is before) == (channels == 16) and layer.keys.live.group is below.keys.live.group
    assert layer.keys.shape == (1, 2, 64, channels) and layer.get_seq_length() == 9


def test_someones_own_loop_may_step_through_one_layer(model):
    cache, (k, v) = new(model), torch.randn(2, 1, 2, 4, 16)
    for _ in range(3):
        cache.update(k, v, 0)
    assert cache.states[0].length == 12


# Rows, copies, files.


@STEPS
def test_rows_are_selected_and_repeated(model, how, attended_by):
    step, cache = stepper(how, model), new(model)
    logits_of(model.forward, IDS[:, :40], cache)
    logits_of(step, IDS[:, 40:41], cache)
    for change, rows in (
        (lambda c: c.batch_select_indices(torch.tensor([2, 0, 0])), [2, 0, 0]),
        (lambda c: c.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
        (lambda c: c.batch_select_indices(torch.tensor([False, True, False])), [1]),
    ):
        other, twin = cache.fork(), cache.fork()
        change(other)
        assert other.layers[1].values.state.lower is other.layers[0].values.state
        got = logits_of(step, IDS[rows, 41:42], other)
        assert relative_error(got, logits_of(model.forward, IDS[:, 41:42], twin)[rows]) < TOLERANCE
    with pytest.raises(ArgumentError, match=r"rows must be some of the cache's 3, got \[3\]"):
        cache.batch_select_indices(torch.tensor([3]))


@STEPS
def test_one_prompt_several_continuations(model, how):
    step, prompt, fresh = stepper(how, model), new(model), new(model)
    for cache in (prompt, fresh):
        logits_of(model.forward, IDS[:1, :40], cache)
    # Keys are quantized at the 48th token.
    wants = [logits_of(model.forward, IDS[1:2, t : t + 1], fresh) for t in range(40, 58)]
    for copied in (prompt.fork(), copy.deepcopy(prompt), pickle.loads(pickle.dumps(prompt))):
        gots = [logits_of(step, IDS[1:2, t : t + 1], copied) for t in range(40, 58)]
        assert relative_error(torch.cat(gots, 1), torch.cat(wants, 1)) < TOLERANCE
        assert prompt.get_seq_length() == 40 and copied.get_seq_length() == 58


def gemma():
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, sliding_window=16,
    )  # fmt: skip
    return Gemma2ForCausalLM(config).eval()


@pytest.mark.parametrize("kind", ["decoder", "with a sliding window"])
def test_saved_without_pickle_and_loaded(kind):
    safetensors = pytest.importorskip("safetensors.torch")
    model = Decoder() if kind == "decoder" else gemma()
    cache = new(model)
    logits_of(model.forward, IDS[:2, :40], cache)
    logits_of(model.forward, IDS[:2, 40:41], cache)
    saved = safetensors.save(cache.state_dict())
    other = new(model)
    other.load_state_dict(safetensors.load(saved))
    for t in range(41, 45):
        assert torch.equal(*(logits_of(model.forward, IDS[:2, t : t + 1], c) for c in (cache, other)))
    if kind == "decoder":
        got = logits_of(compiled(model), IDS[:2, 45:46], other)
        assert relative_error(got, logits_of(model.forward, IDS[:2, 45:46], cache)) < TOLERANCE
    assert other.to("cpu") is other


def test_what_cannot_be_saved_or_loaded(model):
    cache = new(model)
    with pytest.raises(CacheStateError, match="all its layers hold tokens"):
        cache.state_dict()
    logits_of(model.forward, IDS[:1, :20], cache)
    tensors = cache.state_dict()
    for other, words in (
        (new(model, FULL), "another plan"),
        (new(model, length=64), "max_cache_len and layers must be"),
    ):
        with pytest.raises(ArgumentError, match=words):
            other.load_state_dict(tensors)
        assert not other.states
    del tensors["layers.1.key.ring"]
    with pytest.raises(ArgumentError, match=r"'layers.1.key.ring' of \[1, 2, 36, 16\], torch.float32 .* got none"):
        new(model).load_state_dict(tensors)
    with pytest.raises(ArgumentError, match=r"nothing that XQuantCache\.state_dict"):
        new(model).load_state_dict({"a": torch.zeros(1)})


# The ways out of a tensor.

ESCAPES = {
    "data_ptr": lambda t: t.data_ptr(),
    "to_dlpack": lambda t: torch.utils.dlpack.to_dlpack(t),
    "untyped_storage": lambda t: t.untyped_storage().data_ptr(),
    "storage": lambda t: t.storage(),
    "from_dlpack": torch.from_dlpack,
    "np.from_dlpack": np.from_dlpack,
    "share_memory_": lambda t: t.share_memory_(),
    "pin_memory": lambda t: t.pin_memory(),
    "numpy": lambda t: t.numpy(force=True),
    "asarray": np.asarray,
    "tolist": lambda t: t.tolist(),
    "apply_": lambda t: t.apply_(lambda a: a),
    "data": lambda t: setattr(t, "data", torch.zeros(1)),
}


@pytest.mark.parametrize("way", ESCAPES)
def test_ways_to_memory_that_is_not_there(model, way):
    cache = new(model)
    logits_of(model.forward, IDS[:1, :20], cache)
    for tensor in (cache.layers[0].keys, cache.layers[1].values.transpose(1, 2), cache.layers[0].keys[:, :, 3]):
        with pytest.raises(CacheStateError, match=r"^layer [01] (keys|values): codes are stored.*dequantize\(\)"):
            ESCAPES[way](tensor)


def test_ways_out_that_work(model):
    safetensors = pytest.importorskip("safetensors.torch")
    cache = new(model)
    logits_of(model.forward, IDS[:1, :20], cache)
    keys = cache.layers[0].keys
    with pytest.raises(CacheStateError, match="dequantize"):
        safetensors.save({"keys": keys})
    for tensor in (keys, keys[:, :, 3]):
        with pytest.raises(RuntimeError, match="data pointer"):  # what C++ code asks for
            torch._C._to_dlpack(tensor)
    dense = keys.dequantize()
    assert type(dense) is torch.Tensor and dense.shape == keys.shape and dense.data_ptr()
    for begin, end in ((0, 0), (7, 7), (18, 24), (30, 33)):  # of 20 tokens
        assert torch.equal(keys[:, :, begin:end].dequantize(), dense[:, :, begin:end])
    view = keys.transpose(1, 2)
    for copied in (copy.deepcopy(view), pickle.loads(pickle.dumps(view)), view.dequantize()):
        assert torch.equal(copied, dense.transpose(1, 2))
    assert multiprocessing.reduction.ForkingPickler.dumps(view)


# Taking tokens back.


def test_assisted_decoding_and_prompt_lookup_with_their_own_defaults(tiny_llama):
    """20 candidates a step. 16 bits write what is written without them; quantized ones go on to the end."""
    model, assistant = tiny_llama(layers=2), tiny_llama(layers=1)
    assistant.generation_config.assistant_confidence_threshold = 0.0
    assert assistant.generation_config.num_assistant_tokens in (None, 20)
    prompt, cropped = IDS[:1, :12].repeat(1, 3), []
    want = generate(model, prompt, new(model, FULL), 30)
    for kwargs in (dict(assistant_model=assistant), dict(prompt_lookup_num_tokens=20)):
        assert torch.equal(generate(model, prompt, new(model, FULL), 30, **kwargs), want)
        cache = new(model)
        crop = cache.crop
        cache.crop = lambda tokens, crop=crop: (cropped.append(tokens), crop(tokens))  # type: ignore[method-assign]
        generate(model, prompt, cache, 30, **kwargs)
        assert {state.length for state in cache.states} == {int(cache.get_seq_length())}
    assert -20 <= min(cropped) < -8


def test_more_candidates_than_can_be_taken_back(model, no_compiler):
    prompt, length = IDS[:1, :40].repeat(1, 2), 256
    with pytest.raises(
        CacheStateError, match=r"at most 20 tokens.*num_assistant_tokens or prompt_lookup_num_tokens to 20"
    ):
        generate(model, prompt, new(model, SMALL, length), 30, prompt_lookup_num_tokens=30)
    generate(model, prompt, new(model, SMALL.replace(rollback_tokens=30), length), 30, prompt_lookup_num_tokens=30)


def test_layers_that_cannot_go_back_say_so_first():
    model = gemma()
    with pytest.raises(CacheStateError, match=r"assisted decoding and prompt lookup.*FullPrecisionWindow"):
        generate(model, IDS[:1, :12].repeat(1, 3), new(model), prompt_lookup_num_tokens=4)


@pytest.mark.parametrize(
    ("how", "back"),
    [("eager", 9), ("eager", 20), ("compiled", 9), pytest.param("compiled", 20, marks=pytest.mark.slow)],
)
def test_a_rollback_beyond_a_step_is_exact(model, how, back, attended_by):
    step, cache, twin = stepper(how, model), new(model), new(model)
    for c in (cache, twin):
        logits_of(model.forward, IDS[:1, :30], c)
    logits_of(step, IDS[1:2, : back - 8], cache)
    logits_of(step, IDS[1:2, back - 8 : back], cache)
    cache.crop(-back)
    for part in (*(slice(t, t + 1) for t in range(30, 45)), slice(45, 70)):
        one = step if part.stop <= 45 else model.forward  # many tokens at once need no graph of their own
        got, want = (logits_of(s, IDS[:1, part], c) for s, c in ((one, cache), (model.forward, twin)))
        assert relative_error(got, want) < TOLERANCE


# How people use it.


def test_a_chat_over_many_turns(model):
    talks = []
    for cache in (new(model, FULL), DynamicCache(config=model.config)):
        turn = IDS[:1, :10]
        for i in range(4):
            turn = torch.cat([generate(model, turn, cache, 6), IDS[1:2, 5 * i : 5 * i + 5]], 1)
        talks.append(turn)
    assert torch.equal(*talks)


def test_a_streamer_that_stops_in_the_middle(model):
    class Stop:
        left = 6

        def put(self, tokens):
            self.left -= 1
            if not self.left:
                raise KeyboardInterrupt

    ends = []
    for cache in (new(model, FULL), DynamicCache(config=model.config)):
        with pytest.raises(KeyboardInterrupt):
            generate(model, IDS[:1, :20], cache, streamer=Stop())
        stored = int(cache.get_seq_length())
        ends.append(generate(model, IDS[:1, : stored + 1], cache))
    assert stored > 20 and torch.equal(*ends)


def test_two_threads_with_prompts_of_a_decoder_each(model):
    """Both are compiled, and both allocate, at once."""
    step = compiled(model)
    logits_of(step, IDS[:1, :20], new(model))
    wants = [logits_of(model.forward, IDS[i : i + 1, :20], new(model)) for i in range(2)]
    got, bar = [None, None], threading.Barrier(2)

    def work(i):
        bar.wait()
        got[i] = logits_of(step, IDS[i : i + 1, :20], new(model))

    for _ in range(3):
        threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert all(relative_error(a, b) < TOLERANCE for a, b in zip(got, wants, strict=True))


def test_many_uncompiled_steps_are_told_once(model, caplog):
    warn_once.forget()
    cache = new(model)
    with caplog.at_level(logging.WARNING, logger="xquant_fx"):
        generate(model, IDS[:1, :10], cache, MANY_STEPS - 2)
        assert not caplog.records
        generate(model, IDS[:1, :10], new(model), MANY_STEPS + 10)
        generate(model, IDS[:1, :10], new(model), MANY_STEPS + 10)
    assert [r.getMessage() for r in caplog.records if "ran uncompiled" in r.getMessage()] == [
        record.getMessage() for record in caplog.records
    ]
    assert len(caplog.records) == 1


def test_caches_of_many_lengths_of_a_decoder_are_told_once(model, caplog):
    warn_once.forget()
    step = compiled(model)
    with caplog.at_level(logging.WARNING, logger="xquant_fx"):
        for length in (33, 34, 35, 36):
            cache = new(model, FULL, length)
            logits_of(model.forward, IDS[:1, :20], cache)
            logits_of(step, IDS[:1, 20:21], cache)
    (record,) = [r for r in caplog.records if "compiled anew" in r.getMessage()]
    assert "[33, 34" in record.getMessage()


@pytest.mark.parametrize("kind", ["xquant", "static"])
def test_freezing_is_refused_with_a_reason(model, kind):
    """A static cache stays as it is, which is told: an error under strict."""
    import torch._inductor.config as inductor_config

    cache = new(model) if kind == "xquant" else StaticCache(model.config, max_cache_len=128)
    logits_of(model.forward, IDS[:1, :20], cache)
    step = torch.compile(model.forward, backend="xquant", options={"strict": kind == "static"})
    with inductor_config.patch(freezing=True), pytest.raises(Exception, match=r"freezing makes the cache a constant"):
        logits_of(step, IDS[:1, :1], cache)


def test_what_the_constructor_takes(model):
    for cache in (
        XQuantCache(model.config, np.int64(64)),
        XQuantCache(config=model.config, max_cache_len=64),
        XQuantCache(model, max_cache_len=64),
    ):
        assert cache.get_max_length() == 64 and len(cache.quantized_layers) == 2
    for wrong in (0, -1, True, 64.0, "64", None, 10**30):
        with pytest.raises(ConfigError, match="max_cache_len must be an integer of 1 to"):
            XQuantCache(model.config, wrong)
    with pytest.raises(ConfigError, match=r"write XQuantCache\(model.config"):
        XQuantCache(SMALL, 64)
