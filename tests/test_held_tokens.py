"""Uncompiled attention reads the tokens that a buffer holds, and not all that it has room for, if its mask allows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from dynamo_graphs import SMALL
from numeric import seeded
from stepping import interpreted, relative_error
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM, StaticCache
from transformers.integrations.sdpa_attention import repeat_kv

from xquant_fx import XQuantCache, XQuantConfig
from xquant_fx.cache.held_tokens import HeldTokens
from xquant_fx.cache.kv_tensor import QuantizedKV
from xquant_fx.errors import UnsupportedWriteError

CONFIG = XQuantConfig.preset("xquant-2.2").replace(k_group_size=4, residual_length=4)
ROOM = 256
SIZES = (20, 12, 1, 30, 3, 9)


def model_of(kind: str = "llama", attention: str = "sdpa") -> Any:
    torch.manual_seed(0)
    if kind == "llama":
        return LlamaForCausalLM(LlamaConfig(**SMALL, attn_implementation=attention)).eval()
    more = dict(query_pre_attn_scalar=8, sliding_window=16)
    return Gemma2ForCausalLM(Gemma2Config(**SMALL, **more, attn_implementation="eager")).eval()


def ids_of(tokens: int, batch: int = 1) -> Tensor:
    return torch.randint(3, 64, (batch, tokens), generator=seeded(tokens))


@torch.no_grad()
def run(model: Any, room: int, sizes: tuple[int, ...] = SIZES, batch: int = 1, **more: Any) -> list[Tensor]:
    """Logits of each piece; those of a cache that has ``room``."""
    cache = XQuantCache(model.config, max_cache_len=room, config=CONFIG)
    ids = ids_of(sum(sizes), batch)
    return [model(piece, past_key_values=cache, **more).logits for piece in ids.split(sizes, 1)]


def assert_alike(mine: list[Tensor], theirs: list[Tensor]) -> None:
    assert all(relative_error(*pair) < 1e-5 for pair in zip(mine, theirs, strict=True))


@pytest.mark.parametrize(("kind", "attention"), [("llama", "sdpa"), ("llama", "eager"), ("gemma2", "eager")])
def test_room_makes_no_difference(kind, attention):
    """In sliding windows, too, with attention written out and a padded batch."""
    model = model_of(kind, attention)
    padding = torch.ones(2, sum(SIZES), dtype=torch.int64)
    padding[1, :5] = 0
    tight, wide = (run(model, room, batch=2, attention_mask=padding) for room in (sum(SIZES), ROOM))
    assert_alike(wide, tight)


class KeysRead:
    """How many keys torch's attention reads at least."""

    def __enter__(self) -> KeysRead:
        self.profile = torch.profiler.profile(record_shapes=True)
        self.profile.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.profile.__exit__(*error)
        name = "aten::_scaled_dot_product_flash_attention_for_cpu"
        self.fewest = min(event.input_shapes[1][2] for event in self.profile.events() if event.name == name)


@pytest.mark.parametrize("make", [XQuantCache, StaticCache])
@torch.no_grad()
def test_what_attention_reads(make):
    """Of a `StaticCache` that was taken over, too; of grouped query heads, which the model repeats."""
    model = model_of()
    cache = make(config=model.config, max_cache_len=ROOM) if make is StaticCache else make(model.config, ROOM, CONFIG)
    step = torch.compile(model.forward, backend=interpreted(self_check=False, k_group_size=4, residual_length=4))
    for tokens in (20, 1):
        step(ids_of(tokens), past_key_values=cache)
    assert isinstance(cache.layers[0].keys, QuantizedKV)
    with KeysRead() as read:
        model(ids_of(12), past_key_values=cache)
    assert read.fewest == 33


def filled(tokens: int = 20) -> Any:
    """A cache of two KV heads, and its keys."""
    cache = XQuantCache(model_of().config, max_cache_len=ROOM, config=CONFIG)
    with torch.no_grad():
        model_of()(ids_of(tokens), past_key_values=cache)
    return cache, cache.layers[0].keys


def test_any_other_op_reads_zeros_behind_them():
    _, keys = filled()
    dense = keys.dequantize()
    heads = repeat_kv(keys, 3)
    assert isinstance(heads, HeldTokens) and heads.shape == (1, 6, ROOM, 8)
    assert torch.equal(heads + 0, repeat_kv(dense, 3)) and torch.equal(heads[:, 1, 5], repeat_kv(dense, 3)[:, 1, 5])
    apart = keys[:, :, None]
    assert isinstance(apart, HeldTokens) and torch.equal(apart * 1, dense[:, :, None])
    assert torch.equal(apart.expand(-1, -1, 2, -1, -1).reshape(1, -1, ROOM, 8) + 0, repeat_kv(dense, 2))
    assert torch.equal(keys[:, :, None].reshape(2, ROOM, 8) + 0, dense.reshape(2, ROOM, 8))
    assert torch.equal(keys.unsqueeze(0) + 0, dense.unsqueeze(0))
    assert torch.equal(heads.transpose(2, 3) + 0, repeat_kv(dense, 3).transpose(2, 3))


def test_what_is_repeated_is_what_was_held_then():
    cache, keys = filled()
    heads, dense = repeat_kv(keys, 2), repeat_kv(keys.dequantize(), 2)
    with torch.no_grad():
        model_of()(ids_of(9), past_key_values=cache)
    assert torch.equal(heads + 0, dense)


def test_it_cannot_be_written_to():
    _, keys = filled()
    with pytest.raises(UnsupportedWriteError, match="would be lost"):
        repeat_kv(keys, 2).add_(1)


@pytest.mark.parametrize(
    "mask",
    [
        torch.zeros(1, 1, 12, ROOM),  # shows the zeros behind what is held
        torch.zeros(1, 1, 12, ROOM).masked_fill(torch.arange(ROOM) > 40, float("-inf")),  # some of them
        torch.zeros(1, 1, 12, ROOM).masked_fill(torch.arange(ROOM) >= 20, -1e9),  # hides them, in a manner of speaking
        torch.zeros(1, 1, 12, ROOM).masked_fill(torch.arange(ROOM) >= 20, float("-inf")),
        torch.zeros(1, 1, 1, ROOM).masked_fill(torch.arange(ROOM) >= 20, float("-inf")).expand(1, 4, 12, ROOM),
        torch.arange(ROOM)[None, None, None].expand(1, 1, 12, ROOM) < 15,
        None,
    ],
)
def test_masks_decide(mask):
    cache, keys = filled()
    values, q = cache.layers[0].values, torch.randn(1, 4, 12, 8, generator=seeded(3))
    with KeysRead() as read:
        mine = scaled_dot_product_attention(q, repeat_kv(keys, 2), repeat_kv(values, 2), mask)
    theirs = scaled_dot_product_attention(q, *(repeat_kv(x.dequantize(), 2) for x in (keys, values)), mask)
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)
    hides = mask is not None and bool((mask == float("-inf") if mask.is_floating_point() else ~mask)[..., 20:].all())
    assert read.fewest == (20 if hides else ROOM)


def test_wide_masks_of_ones_own_are_taken():
    """Four dimensions, as wide as the cache: the columns behind the tokens are cut off, or read as before."""
    model = model_of()
    expected = run(model, ROOM)
    cache = XQuantCache(model.config, max_cache_len=ROOM, config=CONFIG)
    at, mine = 0, []
    for piece in ids_of(sum(SIZES)).split(SIZES, 1):
        seen = torch.arange(ROOM)[None] <= torch.arange(at, at + piece.shape[1])[:, None]
        with torch.no_grad():
            mine.append(model(piece, past_key_values=cache, attention_mask=seen[None, None]).logits)
        at += piece.shape[1]
    assert_alike(mine, expected)


def each_layer_compiled(model: Any, **more: Any) -> None:
    for layer in model.model.layers:
        layer.forward = torch.compile(layer.forward, backend=interpreted(self_check=False), **more)


@pytest.mark.parametrize("fullgraph", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_masks_that_uncompiled_code_makes_for_compiled_layers(fullgraph):
    """Which are traced, or not."""
    expected, model = run(model_of(), ROOM), model_of()
    each_layer_compiled(model, fullgraph=fullgraph)
    with torch._dynamo.config.patch(recompile_limit=32):
        assert_alike(run(model, ROOM), expected)


def test_a_graph_break_behind_the_masks():
    expected, model = run(model_of(), ROOM), model_of()
    model.model.layers[0].register_forward_pre_hook(lambda *_: torch._dynamo.graph_break())
    model.forward = torch.compile(model.forward, backend=interpreted(self_check=False))
    assert_alike(run(model, ROOM), expected)


def test_uncompiled_attention_behind_compiled_masks():
    expected, model = run(model_of(), ROOM), model_of()
    for layer in model.model.layers:
        layer.self_attn.forward = torch._dynamo.disable(layer.self_attn.forward)
    model.forward = torch.compile(model.forward, backend=interpreted(self_check=False))
    assert_alike(run(model, ROOM), expected)
