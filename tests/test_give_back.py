"""Buffers that were taken over and turn out to be used otherwise: given back, with a warning, and right."""

from __future__ import annotations

import logging

import pytest
import torch
from rewrites import quantized_layers, sdpa
from stepping import interpreted, logits_of, relative_error
from torch._dynamo.exc import BackendCompilerFailed
from transformers import MistralConfig, MistralForCausalLM, StaticCache

import xquant_fx.warn_once as warn_once
from xquant_fx.cache.convert import dequantize_in_place
from xquant_fx.cache.kv_tensor import QuantizedKV
from xquant_fx.errors import CacheStateError, UnsupportedWriteError

SIZES = dict(
    vocab_size=99, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, sliding_window=12,
)  # fmt: skip
EIGHT_BITS = dict(preset="xquant", k_bits=8, v_bits=8, k_group_size=4, residual_length=4, share_values_from=None)


@pytest.mark.parametrize("options", [pytest.param({}, marks=pytest.mark.slow), EIGHT_BITS])
def test_windows_that_fill_in_mid_generation(options, caplog):
    """Every layer slides: before its window is full it looks like any cache."""
    warn_once.forget()
    torch.manual_seed(0)
    model = MistralForCausalLM(MistralConfig(**SIZES)).eval()
    ids = torch.randint(3, 99, (1, 18), generator=torch.Generator().manual_seed(1))
    step = torch.compile(model.forward, backend=interpreted(**options))
    caches = [StaticCache(config=model.config, max_cache_len=64) for _ in range(2)]
    with torch._dynamo.config.patch(recompile_limit=64), caplog.at_level(logging.WARNING, logger="xquant_fx"):
        for cache in caches:
            logits_of(model.forward, ids[:, :5], cache)
        for p in range(5, 18):
            got, want = (logits_of(f, ids[:, p : p + 1], c) for f, c in zip((step, model.forward), caches, strict=True))
            assert relative_error(got, want) < (0.02 if options else 1e-6)
            assert isinstance(caches[0].layers[0].keys, QuantizedKV) == (p < 12)
    assert "window or buffer of 12 tokens is within the residual window" in caplog.text
    assert "what was stored was dequantized" in caplog.text


def test_strict_refuses_to_give_back():
    def step(q, k, v, keys, values, pos, is_last: bool):
        keys[:, :, pos], values[:, :, pos] = k, v
        if is_last:
            keys.mul_(2)
        return sdpa(q, keys, values)

    x, buffers = torch.randn(3, 1, 2, 1, 8), [torch.zeros(1, 2, 32, 8) for _ in range(2)]
    compiled = torch.compile(step, backend=interpreted(strict=True))
    with torch.no_grad():
        compiled(*x, *buffers, torch.tensor([0]), False)
        with pytest.raises(Exception, match="mul_ is not a way to append tokens"):
            compiled(*x, *buffers, torch.tensor([1]), True)
        assert isinstance(buffers[0], QuantizedKV) and buffers[0].state.length == 1


def test_a_quantized_cache_of_ones_own_is_never_given_back():
    def step(keys):
        keys.mul_(2)

    ((keys, _), _) = quantized_layers()
    with torch.no_grad(), pytest.raises(BackendCompilerFailed, match="not a way to append"):
        torch.compile(step, backend=interpreted())(keys)
    assert isinstance(keys, QuantizedKV)


def test_dequantized_in_place():
    """The object stays; tokens are dequantized, and there are zeros behind them."""
    ((keys, _), _) = quantized_layers()
    keys[:, :, torch.arange(20)] = torch.randn(1, 2, 20, 8)
    keys.state.group.drop()
    held, dense = [keys], keys.dense()
    with torch.inference_mode():
        dequantize_in_place(keys)
    assert type(held[0]) is torch.Tensor and not held[0].is_inference()
    assert torch.equal(held[0][:, :, :20], dense[:, :, :20]) and not held[0][:, :, 20:].any()
    assert held[0].untyped_storage().nbytes() == held[0].nbytes


def taken_over(count=2):
    """Buffers that a compiled step has taken over, and what they hold."""

    def step(x, keys, values, pos):
        keys[:, :, pos], values[:, :, pos] = x, x
        return sdpa(x, keys, values)

    buffers = [torch.zeros(1, 2, 32, 8) for _ in range(count)]
    compiled = torch.compile(step, backend=interpreted(preset="full"))
    with torch.no_grad():
        for pos in range(3):
            compiled(torch.randn(1, 2, 1, 8), *buffers, torch.tensor([pos]))
    assert all(isinstance(buffer, QuantizedKV) for buffer in buffers)
    return buffers, [buffer.dequantize() for buffer in buffers]


def in_place(x):
    x.zero_()
    return x.sum()


def test_a_cache_of_few_tokens_says_that_it_takes_more_memory(caplog):
    def step(x, keys, values, pos):
        keys[:, :, pos], values[:, :, pos] = x, x
        return sdpa(x, keys, values)

    for length, told in ((1024, 0), (32, 1), (16, 1)):
        buffers = [torch.zeros(1, 2, length, 16) for _ in range(2)]
        with torch.no_grad():
            torch.compile(step, backend=interpreted())(torch.randn(1, 2, 1, 16), *buffers, torch.tensor([0]))
        stored = sum(buffer.live.spec.stored_bytes for buffer in buffers)
        assert (stored > sum(buffer.live.spec.full_bytes for buffer in buffers)) == bool(told)
        assert caplog.text.count("bytes quantized") == told
    assert "room for 32 tokens takes" in caplog.text and "8,192 in full precision" in caplog.text


def test_copies_of_zeros_begin_anew_and_others_are_refused():
    """What ``load_state_dict`` does with a checkpoint whose cache was empty, and with another one."""
    for zeros in (torch.zeros(1, 2, 32, 8), torch.zeros(()), torch.zeros(1, 2, 32, 8, dtype=torch.float64)):
        (keys, values), before = taken_over()
        with torch.no_grad():
            keys.copy_(zeros)
            assert isinstance(keys, QuantizedKV) and not keys.dequantize().any()
            for numbers in (before[1], torch.full((1, 2, 32, 8), torch.nan), torch.ones(())):
                with pytest.raises(UnsupportedWriteError, match=r"copy_.* is not a way to append tokens"):
                    values.copy_(numbers)
        assert torch.equal(values.dequantize(), before[1])


@pytest.mark.parametrize("view", [torch.detach, lambda keys: keys[:]])
def test_a_view_is_not_given_back_in_the_place_of_its_buffer(view):
    """The graph would write to what nobody holds."""
    (keys, _), (before, _) = taken_over()
    with torch.no_grad():
        with pytest.raises(UnsupportedWriteError, match="a view of it was passed"):
            torch.compile(in_place, backend=interpreted())(view(keys))
        assert isinstance(keys, QuantizedKV) and torch.equal(keys.dequantize(), before)
        assert torch.compile(in_place, backend=interpreted())(keys) == 0
    assert type(keys) is torch.Tensor and not keys.any()


@pytest.mark.parametrize(
    "view", [torch.detach, lambda keys: keys[:], lambda keys: keys[:, :, :2], lambda keys: keys[:, :, 1]]
)
@pytest.mark.parametrize(
    "use", [torch.Tensor.sum, torch.Tensor.zero_, torch.Tensor.clone, lambda x: x.copy_(torch.ones(x.shape))]
)
def test_views_that_are_left_of_what_was_given_back_say_so(view, use):
    (keys, values), before = taken_over()
    old = view(keys)
    with torch.no_grad():
        torch.compile(in_place, backend=interpreted())(values)
        assert type(keys) is torch.Tensor and torch.equal(keys, before[0])
        with pytest.raises(
            (CacheStateError, UnsupportedWriteError), match=r"in full precision by now|nothing was written"
        ):
            use(old)
    assert torch.equal(keys, before[0])


@pytest.mark.parametrize("read", [lambda k, x: torch.cat([k, x], 2), lambda k, x: sdpa(x, *[torch.cat([k, x], 2)] * 2)])
def test_a_buffer_is_read_where_something_is_put_behind_it(read):
    """It is no cache that grows."""
    (keys, _), (before, _) = taken_over()
    x = torch.randn(1, 2, 1, 8)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(read, backend=interpreted())(keys, x), read(before, x))
    assert isinstance(keys, QuantizedKV)


def test_compiled_code_is_passed_the_buffer_and_no_part_of_it():
    (keys, _), (before, _) = taken_over()
    compiled = torch.compile(lambda k: k + 1, backend=interpreted())
    with torch.no_grad():
        with pytest.raises(BackendCompilerFailed, match="is tokens 0 to 3 of a quantized buffer, and a graph needs"):
            compiled(keys[:, :, :4])
        torch.testing.assert_close(compiled(keys[:, :, :4].dequantize()), before[:, :, :4] + 1)
        torch.testing.assert_close(
            torch.compile(lambda k: k[:, :, :4] + 1, backend=interpreted())(keys), before[:, :, :4] + 1
        )
