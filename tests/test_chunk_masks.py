"""Masks of uncompiled chunks are as wide as there are tokens, not as the cache has room for; so is what they attend to."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from dynamo_graphs import SMALL
from numeric import seeded
from stepping import interpreted, relative_error
from torch import Tensor
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM

from xquant_fx import XQuantCache, XQuantConfig

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
    model, seen = model_of(kind, attention), []
    model.register_forward_hook(lambda *_: seen.append(1))
    padding = torch.ones(2, sum(SIZES), dtype=torch.int64)
    padding[1, :5] = 0
    tight, wide = (run(model, room, batch=2, attention_mask=padding) for room in (sum(SIZES), ROOM))
    assert_alike(wide, tight)


def test_masks_of_chunks_are_as_wide_as_what_is_held():
    model = model_of()
    cache = XQuantCache(model.config, max_cache_len=ROOM, config=CONFIG)
    assert cache.get_mask_sizes(20, 0) == (20, 0)
    with torch.no_grad():
        model(ids_of(20), past_key_values=cache)
    assert cache.get_mask_sizes(12, 0) == (32, 0)
    assert cache.get_mask_sizes(8, 0) == (ROOM, 0)  # steps have kernels, for which it must not vary
    assert cache.get_mask_sizes(ROOM, 0) == (ROOM, 0)  # more than fits, of which update() speaks


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


@pytest.mark.parametrize("fullgraph", [False, True])
def test_masks_that_uncompiled_code_makes_for_compiled_layers(fullgraph):
    """The layers are traced, and attend to as many tokens as the masks are for."""
    expected, model = run(model_of(), ROOM), model_of()
    each_layer_compiled(model, fullgraph=fullgraph)
    with torch._dynamo.config.patch(recompile_limit=32):
        assert_alike(run(model, ROOM), expected)


def test_a_graph_break_behind_the_masks():
    expected, model = run(model_of(), ROOM), model_of()
    model.model.layers[0].register_forward_pre_hook(lambda *_: torch._dynamo.graph_break())
    model.forward = torch.compile(model.forward, backend=interpreted(self_check=False))
    assert_alike(run(model, ROOM), expected)


def test_uncompiled_attention_behind_compiled_masks(monkeypatch):
    """Masks are for all that there is room for, and so is what it attends to."""
    expected, model = run(model_of(), ROOM), model_of()
    for layer in model.model.layers:
        layer.self_attn.forward = torch._dynamo.disable(layer.self_attn.forward)
    model.forward = torch.compile(model.forward, backend=interpreted(self_check=False))
    assert_alike(run(model, ROOM), expected)


@torch.no_grad()
def test_what_is_told_is_forgotten():
    """By the last layer, by a chunk that broke off and was taken back, and by an emptied cache."""
    model = model_of()
    cache = XQuantCache(model.config, max_cache_len=ROOM, config=CONFIG)
    model(ids_of(20), past_key_values=cache)
    first, last = cache.layers[0], model.model.layers[-1]
    model(ids_of(12), past_key_values=cache)
    assert not first.chunk_width

    def fail(*_: Any) -> None:
        raise KeyError("on purpose")

    hook = last.register_forward_pre_hook(fail)
    with pytest.raises(KeyError):
        model(ids_of(12), past_key_values=cache)
    hook.remove()
    assert first.chunk_width == 44
    cache.crop(32 - cache.get_seq_length())
    assert not first.chunk_width
    cache.get_mask_sizes(12, 0)
    cache.reset()
    assert not first.chunk_width
