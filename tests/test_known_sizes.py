"""A second batch size: Dynamo leaves the batch open, and it is a number from the first attention on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from dynamo_graphs import open_number
from fast_and_slow import fast_but
from test_later_prompts import OPTIONS, Run, graphs, ids_of, one
from test_untraced import own_backends  # noqa: F401 - a fixture of all tests here
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from transformers import DynamicCache, StaticCache

from xquant_fx import XQuantCache, XQuantConfig
from xquant_fx.passes.known_sizes import name_known_sizes

CACHES: dict[str, Callable[[Any], Any]] = {
    "XQuantCache": lambda config: XQuantCache(
        config, 64, XQuantConfig.preset("xquant-2.2").replace(k_group_size=4, residual_length=4)
    ),
    "StaticCache": lambda config: StaticCache(config, max_cache_len=64),
    "DynamicCache": lambda config: DynamicCache(config=config),
}


@pytest.mark.parametrize("kind", fast_but(CACHES, ["StaticCache"]))
def test_all_layers_are_fused_in_a_batch_of_another_size(kind: str) -> None:
    run = Run(**OPTIONS)
    for batch in (1, 3, 1, 3):
        cache = CACHES[kind](run.model.config)
        run(ids_of(20, batch), cache)
        for _ in range(3):
            run(one(batch), cache)
        assert graphs() <= 2
    assert counters["xquant"]["fuse_decode"] == 2 * len(run.model.model.layers)


def test_known_symbols_become_numbers_of_the_same_memory() -> None:
    env = ShapeEnv()
    batch, tokens = open_number(env, 3, "batch"), open_number(env, 4, "tokens")
    with FakeTensorMode(shape_env=env) as mode:
        x = torch.empty(batch, tokens, 5)
    graph = Graph()
    placeholder, view = graph.placeholder("x"), graph.call_function(torch.Tensor.transpose, ())
    with mode:
        placeholder.meta["example_value"], view.meta["example_value"] = x, x.transpose(1, 2)
    assert not name_known_sizes(graph)
    assert batch == 3  # of which a guard is made
    assert name_known_sizes(graph) == 1
    sizes = view.meta["example_value"].shape
    assert type(sizes[0]) is int and sizes[0] == 3 and isinstance(sizes[2], torch.SymInt)
    assert placeholder.meta["example_value"] is x
    assert view.meta["example_value"].untyped_storage()._cdata == x.untyped_storage()._cdata
    guards = len(env.guards)
    assert not name_known_sizes(graph) and len(env.guards) == guards
