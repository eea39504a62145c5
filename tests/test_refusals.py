"""What the backend refuses, warns of or passes on untouched."""

from __future__ import annotations

import gc
import logging
import operator
import weakref

import pytest
import torch
from dynamo_graphs import buffers, first_graph, fresh, tiny
from rewrites import CONFIG, SHAPE, Rewrites, assign, quantized_layers, run_both, sdpa, two_layers
from stepping import interpreted
from torch._dynamo.exc import BackendCompilerFailed, UncapturedHigherOrderOpError
from transformers import DynamicCache

import xquant_fx.warn_once as warn_once
from xquant_fx import (
    CacheStateError,
    ConfigError,
    NotRewrittenError,
    UnsupportedWriteError,
    XQuantCache,
    XQuantConfig,
)
from xquant_fx.compiler.backend import compile_graph
from xquant_fx.compiler.options import parse
from xquant_fx.passes.vocabulary import is_in_place

#: Numbers in all tokens but the first: neither an empty buffer nor a full one.
SOME = torch.arange(SHAPE[2], dtype=torch.float32)[:, None].expand(SHAPE)


def copied(q, k, v, layers, pos):
    layers[0][0].copy_(layers[0][0] * 2 + SOME)


def whole(q, k, v, layers, pos):
    layers[0][0][:, :, :] = SOME


def one_head(q, k, v, layers, pos):
    layers[0][0][:, 0] = k[:, :1]


def scaled(q, k, v, layers, pos):
    layers[0][0].mul_(2)


def added(q, k, v, layers, pos):
    buffer = layers[0][0]
    buffer += 1


def through_a_view(q, k, v, layers, pos):
    layers[0][0].transpose(1, 2).mul_(2)


def through_a_part(q, k, v, layers, pos):
    layers[0][0].chunk(2, dim=1)[0].zero_()


def other_dimension(q, k, v, layers, pos):
    layers[0][0].index_copy_(1, pos, k.expand(1, 1, SHAPE[2], SHAPE[3]))


def by_mask(q, k, v, layers, pos):
    layers[0][0][:, :, torch.arange(SHAPE[2]) == pos] = k


def into_out(q, k, v, layers, pos):
    torch.mul(q.new_ones(SHAPE), 2.0, out=layers[0][0])


def together(q, k, v, layers, pos):
    torch._foreach_mul_([layers[0][0], layers[0][1]], 2.0)


@torch.library.custom_op("xquant_test::double", mutates_args=("x",))
def double(x: torch.Tensor) -> None:
    x.mul_(2)


def by_an_activation(q, k, v, layers, pos):
    torch.nn.functional.relu(layers[0][0], inplace=True)


def by_an_op_of_ones_own(q, k, v, layers, pos):
    torch.ops.xquant_test.double(layers[0][0])


def after_a_view(q, k, v, layers, pos):
    seen = layers[0][0][:, :, :8]
    assign(*layers[0], k, v, pos)
    q += seen.sum()


WRITES = [
    copied, whole, one_head, scaled, added, through_a_view, through_a_part, other_dimension, by_mask, into_out,
    together, by_an_activation, by_an_op_of_ones_own, after_a_view,
]  # fmt: skip


def cases():
    for where in ("eager", "compiled"):
        for write in WRITES:
            if (where, write) != ("eager", after_a_view):  # eagerly a slice shows what is written later
                yield pytest.param(write, where, id=f"{write.__name__}-{where}")


@pytest.mark.parametrize("write, where", list(cases()))
def test_unsupported_writes_name_the_layer(write, where):
    def step(q, k, v, layers, pos):
        if write is other_dimension:
            k = k[:, :1, :1]
        write(q, k, v, layers, pos)
        return sdpa(q, *layers[0])

    args = (*fresh(), quantized_layers(), torch.tensor([0]))
    with torch.no_grad():
        if where == "eager":
            with pytest.raises(UnsupportedWriteError, match="layer 0 key"):
                step(*args)
            assert args[3][0][0].state.length == 0
        else:
            gm, inputs = first_graph(step, *args)
            with pytest.raises(UnsupportedWriteError, match="layer 0 key"):
                Rewrites()(gm, inputs)


def test_an_append_in_a_region_compiled_by_itself_is_refused(monkeypatch):
    """The passes do not look into it, so its writes would be lost."""
    model = tiny("llama")
    kind = type(model.model.layers[0])
    monkeypatch.setattr(kind, "forward", torch.compiler.nested_compile_region(kind.forward))
    cache, ids = XQuantCache(model.config, 32, config=CONFIG), torch.arange(3, 9)[None]
    with torch.no_grad():
        model(ids, past_key_values=cache)
        step = torch.compile(model.forward, backend=Rewrites(), dynamic=False)
        # torch refuses by itself, while it traces: tensor subclasses (2.11), and that keys and values share a tensor,
        # which is how Dynamo knows the buffers of one cache.
        refused = r"Input-to-input aliasing detected at nodes .*keys|Expected FakeTensor, got <class '.*QuantizedKV'>"
        with pytest.raises((UncapturedHigherOrderOpError, AssertionError), match=refused):
            step(ids[:, :1], past_key_values=cache)


def test_copies_may_be_changed():
    def step(q, k, v, layers, pos):
        keys, values = layers[0]
        before = keys.clone().add_(1)
        assign(keys, values, k, v, pos)
        q += before.sum() + keys.repeat(1, 2, 1, 1).mul_(2).sum()
        return sdpa(q, keys, values)

    mine, theirs = run_both(step, [5, 1], Rewrites())
    torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-6)


#: The window of the tiny Gemma 3, 12 tokens, is longer than what a quantized layer keeps as it is.
NO_WINDOWS = dict(k_group_size=2, residual_length=2, rollback_tokens=8, sliding_windows=False)


def test_strict_raises_with_the_reason(monkeypatch):
    warn_once.forget()
    model = tiny("gemma3_text")
    cache = DynamicCache(config=model.config)
    ids = torch.arange(3, 9)[None]
    gm, inputs = first_graph(model.forward, ids, past_key_values=cache)
    with torch.no_grad(), pytest.raises(NotRewrittenError, match=r"1 KV cache.*\n.*sliding_windows of the config"):
        Rewrites(strict=True, **NO_WINDOWS)(gm, inputs)


def test_warnings_come_once_a_reason(monkeypatch, caplog):
    warn_once.forget()
    model = tiny("gemma3_text")
    ids = torch.arange(3, 9)[None]
    step = torch.compile(model.forward, backend=Rewrites(**NO_WINDOWS), dynamic=False)
    with caplog.at_level(logging.WARNING, logger="xquant_fx"), torch.no_grad():
        for _ in range(2):
            torch._dynamo.reset()
            step(ids, past_key_values=DynamicCache(config=model.config))
    records = [r for r in caplog.records if r.name.startswith("xquant_fx")]
    assert len(records) == 1 and records[0].levelno == logging.WARNING
    assert "stays in full precision: sliding_windows of the config is False" in records[0].getMessage()


def test_options_must_agree_with_the_cache():
    def step(q, k, v, layers, pos):
        return two_layers(q, k, v, layers, pos)

    gm, inputs = first_graph(step, *fresh(), quantized_layers(), torch.tensor([0]))
    with torch.no_grad():
        with pytest.raises(ConfigError, match="options differ from the config of the XQuantCache"):
            Rewrites(k_bits=4)(gm, inputs)
        for options in ({}, {"config": CONFIG}, {"strict": True}):
            assert callable(Rewrites(**options)(gm, inputs))


def test_gradients_are_refused():
    gm, inputs = first_graph(two_layers, *fresh(), quantized_layers(), torch.tensor([0]))
    with torch.enable_grad(), pytest.raises(CacheStateError, match=r"torch\.no_grad"):
        Rewrites()(gm, inputs)


def test_ordinary_buffers_stay_under_gradients(monkeypatch):
    warn_once.forget()

    def step(q, k, v, keys, values, pos):
        assign(keys, values, k, v, pos)
        return sdpa(q, keys, values)

    gm, inputs = first_graph(step, *fresh(), *buffers(), torch.tensor([0]))
    seen = Rewrites()
    with torch.enable_grad():
        seen(gm, inputs)
        assert seen.made == [gm] and seen.inputs[0] is inputs  # compiled as it is
        with pytest.raises(NotRewrittenError, match="gradients are enabled"):
            Rewrites(strict=True)(gm, inputs)
    with torch.no_grad():
        seen(gm, inputs)
    assert seen.made == [gm]  # taken over instead


def test_buffers_that_carry_gradients_say_so():
    """A step without no_grad has written to them; and gradients are off now."""

    def step(q, k, v, keys, values, pos):
        assign(keys, values, k, v, pos)
        return sdpa(q, keys, values)

    q, k, v = fresh()
    keys, values = buffers()
    step(q, k.requires_grad_(), v, keys, values, torch.tensor([0]))
    gm, inputs = first_graph(step, q, k.detach(), v, keys, values, torch.tensor([1]))
    with torch.no_grad(), pytest.raises(NotRewrittenError, match=r"keys carry gradients: .*torch\.no_grad"):
        Rewrites(strict=True)(gm, inputs)


def shared_step(q, k, v, keys, values, other, pos):
    assign(keys, values, k, v, pos)
    return sdpa(q, keys, values) + other.sum()


@pytest.mark.parametrize("how", ["a view", "viewed"])
def test_buffers_that_share_memory_are_left_alone(how):
    """Another tensor would go on showing what the buffer held before."""
    keys, values = buffers()
    other = keys.view(-1) if how == "viewed" else torch.zeros(1)
    keys = torch.cat([keys, keys]).chunk(2)[0] if how == "a view" else keys
    gm, inputs = first_graph(shared_step, *fresh(), keys, values, other, torch.tensor([3]))
    seen = Rewrites()
    with torch.no_grad():
        seen(gm, inputs)
        assert seen.made == [gm]
        reason = "is a view of another tensor" if how == "a view" else "shares the buffer's memory"
        with pytest.raises(NotRewrittenError, match=reason):
            Rewrites(strict=True)(gm, inputs)


def test_a_dropped_cache_is_freed():
    """Compiled steps keep nothing of it alive."""
    layers, pos = quantized_layers(), torch.tensor([0])
    step = torch.compile(two_layers, backend=interpreted(), dynamic=False)
    with torch.no_grad():
        step(*fresh(), quantized_layers(), pos)  # the one that is compiled for may stay with Dynamo
        step(*fresh(), layers, pos)
        codes = weakref.ref(layers[0][0].state.owned["codes"])
        step(*fresh(), quantized_layers(), pos)
    del layers
    gc.collect()
    assert codes() is None


def test_graphs_without_a_cache_go_to_the_compiler_as_they_are():
    model = tiny("llama")
    gm, inputs = first_graph(model.forward, torch.arange(3, 9)[None], use_cache=False)
    calls = []
    result = compile_graph(gm, inputs, parse(None, None), lambda *args: calls.append(args) or gm.forward)
    ((graph, example_inputs, _, settings),) = calls
    assert graph is gm and example_inputs is inputs and settings is None and result == gm.forward


def test_ops_in_place():
    """By what they are called, or told; ``and_`` has its underscore for another reason."""
    graph = torch.fx.Graph()
    x, functional = graph.placeholder("x"), torch.nn.functional
    found = {
        (name, len(args), *kwargs.items()): is_in_place(make(target, args, kwargs))
        for name, make, target, args, kwargs in (
            ("and_", graph.call_function, operator.and_, (x, x), {}),
            ("or_", graph.call_function, operator.or_, (x, x), {}),
            ("iand", graph.call_function, operator.iand, (x, x), {}),
            ("ilshift", graph.call_function, operator.ilshift, (x, 1), {}),
            ("relu", graph.call_function, functional.relu, (x,), {}),
            ("relu", graph.call_function, functional.relu, (x, True), {}),
            ("relu", graph.call_function, functional.relu, (x,), {"inplace": True}),
            ("relu", graph.call_function, functional.relu, (x,), {"inplace": False}),
            ("dropout", graph.call_function, functional.dropout, (x, 0.5, True, True), {}),
            ("torch.relu_", graph.call_function, torch.relu_, (x,), {}),
            ("torch.relu", graph.call_function, torch.relu, (x,), {}),
            ("add_", graph.call_method, "add_", (x, x), {}),
            ("__iadd__", graph.call_method, "__iadd__", (x, x), {}),
            ("__and__", graph.call_method, "__and__", (x, x), {}),
        )
    }
    assert [key for key, written in found.items() if written] == [
        ("iand", 2), ("ilshift", 2), ("relu", 2), ("relu", 1, ("inplace", True)), ("dropout", 4), ("torch.relu_", 1),
        ("add_", 2), ("__iadd__", 2),
    ]  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("compiled", [False, True])
def test_keys_of_64_bits_are_refused_where_they_would_be_quantized(tiny_llama, compiled):
    """There are no kernels for them; uncompiled code would find out after some steps."""
    model, ids = tiny_llama(layers=2, dtype=torch.float64), torch.arange(1, 10)[None]
    step = torch.compile(model.forward, backend=interpreted()) if compiled else model
    with pytest.raises(
        (ConfigError, BackendCompilerFailed),
        match=r"layer 0: keys are quantized .* got torch.float64",
    ):
        step(ids, past_key_values=XQuantCache(model.config, 64, CONFIG))
    want = model(ids).logits[:, -1]
    cache = XQuantCache(model.config, 64, XQuantConfig.preset("full"))
    step(ids[:, :8], past_key_values=cache)
    torch.testing.assert_close(step(ids[:, 8:], past_key_values=cache).logits[:, -1], want)


@torch.no_grad()
def test_an_export_that_would_keep_the_cache_is_refused(tiny_llama):
    """torch says "Unable to cast NotImplemented to Tensor", or exports a program that begins anew at each call."""
    model, ids = tiny_llama(layers=2), torch.arange(1, 10)[None]

    class Stepping(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model, self.cache = model, XQuantCache(model.config, 64, CONFIG)

        def forward(self, ids):
            return self.model(ids, past_key_values=self.cache, use_cache=True).logits

    step = Stepping()
    for tokens in (ids, ids[:, :1]):  # an empty cache, and one that holds tokens
        with pytest.raises(CacheStateError, match=r"^layer 0: torch.export\(strict=False\) would make this"):
            torch.export.export(step, (tokens,), strict=False)
        step(ids)
