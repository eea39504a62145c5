"""Sliding windows of an XQuantCache that stay in full precision live as its quantized layers do."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from stepping import interpreted
from test_sliding_windows import FULL, LENGTH, LOW, close, ids_of, model_of, steps

from xquant_fx import CacheStateError, XQuantCache
from xquant_fx.cache.left import why_kept

STAYS = FULL.replace(sliding_windows=False)
EACH_MODEL = pytest.mark.parametrize("name", ["Mistral", "Gemma3Text"])


def kept(model: Any) -> XQuantCache:
    return XQuantCache(model.config, LENGTH, config=STAYS)


def compiled(model: Any, **options: Any) -> Any:
    return torch.compile(model.forward, backend=interpreted(**options), dynamic=False)


def test_the_backend_does_not_quantize_what_the_cache_leaves() -> None:
    model, ids = model_of("Mistral", num_hidden_layers=1), ids_of(1)
    cache = kept(model)
    got = steps(model, cache, ids, [30, 1], compiled(model, config=LOW))
    with torch.no_grad():
        assert close(got, model(ids[:, :31]).logits)
    layers = [*cache.layers, *copy.deepcopy(cache).layers]
    assert [why_kept(layer.values) for layer in layers] == ["sliding_windows of the config is False"] * 2


@pytest.mark.parametrize(("name", "how"), [("Mistral", "eager"), ("Gemma3Text", "eager"), ("Gemma3Text", "compiled")])
def test_another_batch_after_reset_and_not_before(name: str, how: str) -> None:
    model, ids = model_of(name), ids_of()
    step = compiled(model) if how == "compiled" else model.forward
    cache = kept(model)
    steps(model, cache, ids, [50, 1], step)
    with pytest.raises(CacheStateError, match="this cache holds 2 rows, the step has 1"):
        steps(model, cache, ids[:1], [1], step)
    cache.crop(-cache.get_seq_length())  # all of it: as reset()
    got = steps(model, cache, ids[:1], [20, 1, 1])
    assert close(got, steps(model, kept(model), ids[:1], [20, 1, 1]))
    cache.batch_repeat_interleave(2)
    assert [layer.keys.shape[0] for layer in cache.layers] == [2, 2]


@EACH_MODEL
@pytest.mark.parametrize("tokens", [0, 30, 60])
def test_a_step_that_breaks_off_behind_a_window_is_told(name: str, tokens: int) -> None:
    def interrupt(*args: Any) -> None:
        raise KeyboardInterrupt

    model, ids = model_of(name), ids_of(1)
    cache = kept(model)
    if tokens:
        steps(model, cache, ids, [tokens])
    hook = model.model.layers[1].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        steps(model, cache, ids, [12])
    hook.remove()
    with pytest.raises(CacheStateError, match=f"holds {tokens + 12} tokens, layer 1 behind it {tokens}, .* inter"):
        steps(model, cache, ids, [12])
    cache.reset()
    assert close(steps(model, cache, ids, [12, 1]), steps(model, kept(model), ids, [12, 1]))
