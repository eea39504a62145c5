"""memory_report against bytes counted a second way, and the bits per element really takes."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from dynamo_graphs import tiny
from numeric import seeded
from states import layers_of, range_config
from transformers import DynamicCache, LlamaConfig, Qwen2Config

from xquant_fx import CacheStateError, XQuantCache, XQuantConfig, memory_report
from xquant_fx.cache.convert import quantize_in_place
from xquant_fx.cache.kv_tensor import QuantizedKV
from xquant_fx.reports.memory import MemoryReport

SMALL = range_config(k_group_size=8, residual_length=16)
PRESETS = ("full", "kivi-4", "kivi-2", "asymkv-1.5", "xquant-paper", "xquant", "xquant-1bit")


def llama(layers: int = 4, heads: int = 2, dim: int = 32) -> LlamaConfig:
    return LlamaConfig(
        num_hidden_layers=layers, num_attention_heads=2 * heads, num_key_value_heads=heads, head_dim=dim,
        hidden_size=2 * heads * dim,
    )  # fmt: skip


@torch.no_grad()
def fill(cache: XQuantCache, config: Any, steps: list[int], dtype: torch.dtype, batch: int = 1) -> XQuantCache:
    """Give every layer random keys and values, as a model's layers do one after the other."""
    shape = batch, config.num_key_value_heads, 1, config.head_dim
    for number, tokens in enumerate(steps):
        for layer in cache.layers:
            k, v = (
                torch.randn(*shape[:2], tokens, shape[3], dtype=dtype, generator=seeded(number + i)) for i in (0, 99)
            )
            layer.update(k, v)
    return cache


def storages(holder: Any, seen: dict[int, Any], found: dict[int, int]) -> dict[int, int]:
    """Address to bytes of every storage that can be reached from ``holder``."""
    if id(holder) in seen:
        return found
    seen[id(holder)] = holder
    if isinstance(holder, torch.Tensor) and not isinstance(holder, QuantizedKV):
        found[holder.untyped_storage().data_ptr()] = holder.untyped_storage().nbytes()
    elif isinstance(holder, dict | list | tuple | set):
        for item in holder.values() if isinstance(holder, dict) else holder:
            storages(item, seen, found)
    elif hasattr(holder, "__dict__") and not isinstance(holder, type):
        storages(vars(holder), seen, found)
    return found


def reachable_bytes(cache: XQuantCache) -> int:
    """Everything the cache keeps alive."""
    return sum(storages(cache, {}, {}).values())


def parts_by_hand(cache: XQuantCache, steps: list[int]) -> MemoryReport:
    """From the formulas of the layouts alone: bytes per layer of each part, then added up."""
    config, tokens = cache.xquant_config, sum(steps)
    count = len(cache.quantized_layers)
    total = dict.fromkeys(("codes", "scales", "residual_windows", "sinks", "other"), 0)
    first = cache.quantized_layers[0]
    batch, heads, dim, size = first.batch_size, first.num_heads, first.k_head_dim, first.dtype.itemsize
    room = first.max_cache_len
    for i in range(count):
        for side, bits, share in (
            ("key", config.k_bits, config.share_keys_from), ("value", config.v_bits, config.share_values_from)
        ):  # fmt: skip
            r = config.given_residual(side)
            total["other"] += 16  # tokens stored, and the furthest ever
            if bits == 16:
                total["codes"] += batch * heads * room * dim * size
                continue
            unit = r if side == "key" else 32 // bits
            padded = math.ceil(room / unit) * unit + unit
            groups = padded // config.k_group_size * dim if side == "key" else padded
            if not (share is not None and i % 2 == 1 and i >= math.floor(share * count)):
                words = math.ceil(dim * bits / 32) * padded if side == "key" else padded * bits // 32 * dim
                total["codes"] += 4 * batch * heads * words
            total["scales"] += 2 * batch * heads * groups
            total["residual_windows"] += batch * heads * (r + config.rollback_tokens) * dim * size
            total["sinks"] += bool(config.sink_tokens) * batch * heads * (config.sink_tokens + 1) * dim * size
    total["other"] += 8 * batch + 4 + 8 * count  # padding, the fault flag, and Hugging Face's token counters
    elements = 2 * count * batch * heads * dim
    return MemoryReport(
        **total, zero_points=total["scales"], full_bytes=elements * room * size, elements=elements * tokens
    )


def test_windows_of_two_lengths_are_counted() -> None:
    settings, config = SMALL.replace(k_residual_length=24, v_residual_length=9), llama()
    cache = fill(XQuantCache(config, 70, config=settings), config, [50, 1], torch.float32, 1)
    report = memory_report(cache)
    assert report == parts_by_hand(cache, [50, 1]) and report.total_bytes == reachable_bytes(cache)


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize(("dtype", "batch", "sinks"), [(torch.bfloat16, 1, 0), (torch.float32, 3, 2)])
def test_every_byte_is_counted(name: str, dtype: torch.dtype, batch: int, sinks: int) -> None:
    settings = XQuantConfig.preset(name).replace(k_group_size=8, residual_length=16, sink_tokens=sinks)
    config, steps = llama(), [50, 1]
    cache = fill(XQuantCache(config, 70, config=settings), config, steps, dtype, batch)
    report = memory_report(cache)
    assert report == parts_by_hand(cache, steps)
    assert report.total_bytes == reachable_bytes(cache) == sum(report.parts.values())
    assert report.full_bytes == 2 * 4 * batch * 2 * 70 * 32 * dtype.itemsize
    assert report.elements == 2 * 4 * batch * 2 * 51 * 32
    assert report.ratio == report.full_bytes / report.total_bytes
    assert report.bits_per_element == 8 * report.total_bytes / report.elements


@pytest.mark.parametrize(
    ("name", "most"), [pytest.param("xquant", 1.75, marks=pytest.mark.slow), ("xquant-1bit", 1.35)]
)
def test_true_bits_per_element_of_a_long_context(name: str, most: float) -> None:
    """At 32,768 tokens, head_dim 128 and a bfloat16 model: codes, scales, zero points, windows, everything."""
    config, tokens = llama(layers=8, heads=1, dim=128), 32768
    cache = XQuantCache(config, tokens, config=XQuantConfig.preset(name))
    fill(cache, config, [tokens - 1, 1], torch.bfloat16)
    report = memory_report(cache)
    assert report.elements == 2 * 8 * tokens * 128
    assert 8 * reachable_bytes(cache) / report.elements == report.bits_per_element <= most
    assert report.ratio == pytest.approx(16 / report.bits_per_element)


def test_ordinary_layers_count_in_full() -> None:
    """Sliding-window layers stay as they are."""
    config = Qwen2Config(
        num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, hidden_size=64, sliding_window=16,
        use_sliding_window=True, layer_types=["full_attention", "sliding_attention"] * 2,
    )  # fmt: skip
    config.head_dim = 16
    cache = fill(XQuantCache(config, 60, config=SMALL), config, [30, 1], torch.float32)
    report = memory_report(cache)
    sliding = [t for layer in cache.layers[1::2] for t in (layer.keys, layer.values)]
    quantized = [state.owned.values() for state in cache.states]
    assert len(quantized) == 4
    mine = sum(t.numel() * t.itemsize for owned in quantized for t in owned) + cache.group.start.numel() * 8 + 4
    plain = sum(t.numel() for t in sliding)
    assert report.total_bytes == mine + 4 * plain + 4 * 8 == reachable_bytes(cache)
    assert report.full_bytes == 4 * (2 * 2 * 2 * 60 * 16 + plain)
    assert report.elements == 2 * 2 * 2 * 31 * 16 + plain


def test_states_of_linear_attention_count_in_full() -> None:
    model = tiny("qwen3_next")
    cache = XQuantCache(model.config, 60, config=SMALL)
    with torch.no_grad():
        model(torch.arange(3, 33)[None], past_key_values=cache)
    report = memory_report(cache)
    linear = cache.layers[0]
    states = [t for kind in (linear.conv_states, linear.recurrent_states) for t in kind.values() if t is not None]
    assert len(states) == 2
    assert report.total_bytes == reachable_bytes(cache)
    assert report.full_bytes == 2 * 2 * 60 * 8 * 4 + sum(t.nbytes for t in states)
    assert report.elements == 2 * 2 * 30 * 8 + sum(t.numel() for t in states)


def test_a_given_padding_counts() -> None:
    config, mask = llama(), torch.ones(1, 20, dtype=torch.int64)
    with_padding, without = (XQuantCache(config, 70, config=SMALL, padding_mask=m) for m in (mask, None))
    reports = [memory_report(fill(cache, config, [20], torch.float32)) for cache in (with_padding, without)]
    assert reports[0].total_bytes == reachable_bytes(with_padding) == reports[1].total_bytes + 8
    assert reports[0].full_bytes == reports[1].full_bytes


def test_a_module_with_quantized_buffers() -> None:
    """A buffer that two modules or names share counts once."""
    shape = (1, 2, 40, 16)
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Module())
    states = layers_of(SMALL, shape, torch.float16)[0]
    for side, state in zip(("key", "value"), states, strict=True):
        buffer = torch.zeros(shape, dtype=torch.float16)
        model[1].register_buffer(side, buffer)
        quantize_in_place(buffer, state)
        state.store(torch.randn(1, 2, 20, 16, dtype=torch.float16), torch.arange(20))
    model[0].same = model[1].key
    report = memory_report(model)
    owned = [t for state in states for t in state.owned.values()]
    assert report.total_bytes == sum(t.numel() * t.itemsize for t in owned) + 8 + 4
    assert report.full_bytes == 2 * 2 * 40 * 16 * 2 and report.elements == 2 * 2 * 20 * 16


def test_an_empty_cache_has_no_bits_per_element() -> None:
    config = llama()
    cache = fill(XQuantCache(config, 70, config=SMALL), config, [20], torch.float32)
    cache.reset()
    report = memory_report(cache)
    assert report.elements == 0 and report.bits_per_element == math.inf and report.total_bytes > 0


def test_nothing_quantized_is_an_error() -> None:
    config = llama()
    for holder in (XQuantCache(config, 70), DynamicCache(config=config), torch.nn.Linear(2, 2)):
        with pytest.raises(CacheStateError, match=f"{type(holder).__name__} holds no quantized KV buffer"):
            memory_report(holder)


def test_the_table_shows_every_part_and_the_total() -> None:
    config = llama()
    cache = fill(XQuantCache(config, 70, config=SMALL.replace(sink_tokens=1)), config, [50], torch.float32)
    report = memory_report(cache)
    text = re.sub(r"\s+", " ", str(report))
    for name, size in {**report.parts, "total": report.total_bytes}.items():
        assert re.search(rf"{name.replace('_', ' ')}\W+{size:,}\b", text), name
    assert f"{report.ratio:.2f} times" in text and f"{report.bits_per_element:.3f} bits" in text


def test_a_cache_that_takes_more_than_in_full_precision() -> None:
    config = llama()
    report = memory_report(fill(XQuantCache(config, 8, config=SMALL), config, [5], torch.float32))
    assert report.ratio < 1 and f"quantized takes {1 / report.ratio:.2f} times as much" in re.sub(
        r"\s+", " ", str(report)
    )
