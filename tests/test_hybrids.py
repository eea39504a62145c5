"""Hybrids with linear attention: the states of those layers are never touched, the other layers are quantized."""

from __future__ import annotations

import pytest
import torch
from dynamo_graphs import tiny
from stepping import interpreted, relative_error, run_steps
from transformers import DynamicCache, StaticCache

from xquant_fx import CacheStateError, XQuantCache, XQuantConfig
from xquant_fx.cache.growing import STORED_KV

IDS = torch.randint(3, 64, (2, 20), generator=torch.Generator().manual_seed(3))
FULL = XQuantConfig.preset("full")
CACHES = {
    "XQuantCache": lambda config: XQuantCache(config, 32, FULL),
    "StaticCache": lambda config: StaticCache(config, max_cache_len=32),
    "DynamicCache": lambda config: DynamicCache(config=config),
}


def states(layer):
    """All tensors that a layer of linear attention holds, whatever transformers calls them."""
    held = [v for v in vars(layer).values() if isinstance(v, torch.Tensor)]
    nested = [v for v in vars(layer).values() if isinstance(v, list | tuple | dict)]
    inner = [t for v in nested for t in (v.values() if isinstance(v, dict) else v) if isinstance(t, torch.Tensor)]
    return held + inner


# Hybrids in an XQuantCache are in test_layers_with_more.py, too.
@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=() if kind == "DynamicCache" else pytest.mark.slow) for kind in CACHES]
)
def test_states_are_what_eager_code_makes_them(kind):
    model = tiny("qwen3_next")
    options = {} if kind == "XQuantCache" else {"preset": "full"}
    step = torch.compile(model.forward, backend=interpreted(**options))
    mine, theirs = CACHES[kind](model.config), CACHES["StaticCache"](model.config)
    result = run_steps([(model.forward, 9), *[(step, 1)] * 4], IDS, mine)
    expected = run_steps([(model.forward, 9), *[(model.forward, 1)] * 4], IDS, theirs)
    assert relative_error(result, expected) < 1e-5
    linear, full = mine.layers
    pairs = list(zip(states(linear), states(theirs.layers[0]), strict=True))
    assert pairs and all(type(ours) is torch.Tensor for ours, _ in pairs)
    assert all(torch.allclose(ours, other, atol=1e-5) for ours, other in pairs)
    assert isinstance(full.keys, STORED_KV) and isinstance(full.values, STORED_KV)


@pytest.mark.parametrize(
    "change", [lambda c: c.batch_repeat_interleave(2), lambda c: c.batch_select_indices([0]), lambda c: c.to("meta")]
)
def test_layers_of_states_alone_are_named_where_rows_or_devices_change(change):
    model = tiny("qwen3_next")
    cache = XQuantCache(model.config, 32, FULL)
    run_steps([(model.forward, 9)], IDS, cache)
    with pytest.raises(CacheStateError, match=r"only layers of keys and values can be .*\['LinearAttentionLayer'\]"):
        change(cache)
    cache.crop(-9)  # all of it, which is no rolling back
    assert (
        relative_error(*(run_steps([(model.forward, 9)], IDS, c) for c in (cache, XQuantCache(model.config, 32, FULL))))
        < 1e-5
    )
