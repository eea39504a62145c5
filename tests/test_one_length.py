"""Lengths of quantized caches: those that are equal are one symbol to Dynamo, all others have their own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from dynamo_graphs import SMALL
from stepping import interpreted, relative_error
from test_later_prompts import graphs, ids_of, one
from test_sliding_windows import WINDOW, model_of
from test_untraced import own_backends  # noqa: F401 - a fixture of all tests here
from torch import Tensor
from torch._dynamo.utils import counters
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from xquant_fx import XQuantCache, XQuantConfig
from xquant_fx.compiler import untraced
from xquant_fx.compiler.backend import compile_graph
from xquant_fx.compiler.options import parse
from xquant_fx.compiler.tracing_time import watch_tracing

CONFIG = XQuantConfig.preset("xquant-2.2").replace(k_group_size=4, residual_length=4)


class Run:
    """A model that is compiled, and how many numbers each of its graphs has left open, by their symbols."""

    def __init__(self, model: Any = None, config: XQuantConfig = CONFIG) -> None:
        torch._dynamo.reset()
        torch.manual_seed(0)
        self.model = model or LlamaForCausalLM(LlamaConfig(**SMALL)).eval()
        self.symbols: list[int] = []
        inside = interpreted(self_check=False, config=config)

        def backend(gm: Any, inputs: list[Any], **_: Any) -> Any:
            self.symbols.append(len({str(x.node.expr) for x in inputs_of(gm) if isinstance(x, torch.SymInt)}))
            return compile_graph(gm, inputs, parse(None, {"config": config}), lambda graph, *_: graph.forward)

        watch_tracing(backend)
        untraced.leave_prompts_untraced(backend, inside.asked)
        self.call = torch.compile(self.model.forward, backend=backend)
        counters.clear()

    @torch.no_grad()
    def __call__(self, ids: Tensor, cache: Any) -> Tensor:
        return self.call(ids, past_key_values=cache).logits


def inputs_of(gm: Any) -> list[Any]:
    return [node.meta["example_value"] for node in gm.graph.find_nodes(op="placeholder")]


def test_a_cache_that_grows_has_one() -> None:
    run = Run()
    for tokens in (20, 31):
        run(ids_of(tokens), cache := DynamicCache(config=run.model.config))
        for _ in range(3):
            run(one(), cache)
    assert run.symbols == [1] and graphs() == 1


def test_a_second_length_has_one() -> None:
    run = Run()
    for room in (64, 96, 80):
        run(ids_of(20), cache := XQuantCache(run.model.config, room, CONFIG)), run(one(), cache)
    # Without one, each of the four buffers would have its own. The second of an int: max_cache_len of a layer.
    assert run.symbols[0] == 0 and run.symbols[1] <= 2


def test_windows_have_their_own() -> None:
    """They are as long as all tokens until they are full. What transformers asks then has three graphs, not more."""
    run = Run(model_of("Gemma3Text"), XQuantConfig.preset("full"))
    run(ids_of(WINDOW - 3), cache := DynamicCache(config=run.model.config))
    run(one(), cache)
    made = graphs()
    out = [run(one(), cache) for _ in range(6)]
    assert graphs() <= made + 3 and cache.get_seq_length() == WINDOW + 4
    with torch.no_grad():
        run.model(ids_of(WINDOW - 3), past_key_values=(plain := DynamicCache(config=run.model.config)))
        expected = [run.model(one(), past_key_values=plain).logits for _ in range(7)][1:]
    assert relative_error(torch.cat(out, 1), torch.cat(expected, 1)) < 1e-5


def test_what_is_equal_by_chance_is_traced_once_more() -> None:
    """Two caches of one call, as long when they are first seen, and later not."""
    run = Run()
    run(ids_of(20), first := DynamicCache(config=run.model.config)), run(one(), first)
    run(ids_of(20), second := DynamicCache(config=run.model.config)), run(one(), second)
    before = graphs()

    def both(ids: Tensor, first: Any, second: Any) -> Tensor:
        return run.model(ids, past_key_values=first).logits + run.model(ids, past_key_values=second).logits

    call = torch.compile(both, backend=interpreted(self_check=False, config=CONFIG))
    with torch.no_grad():
        call(one(), first, second)
        run.call(one(), past_key_values=first)
        for _ in range(3):
            call(one(), first, second)
    assert graphs() - before <= 2 and (first.get_seq_length(), second.get_seq_length()) == (26, 25)


def test_a_size_that_somebody_marked_stays_marked() -> None:
    """And is told of, if it turns out to be a number."""
    run = Run()
    run(ids_of(20), cache := XQuantCache(run.model.config, 64, CONFIG))

    def read(keys: Tensor) -> Tensor:
        return keys.sum() if keys.shape[2] == 64 else keys.sum() + 1

    keys = cache.layers[0].keys
    torch._dynamo.mark_dynamic(keys, 2)
    with pytest.raises(Exception, match=r"marked|dynamic"), torch.no_grad():
        backend = interpreted(self_check=False, config=CONFIG)
        watch_tracing(backend)
        torch.compile(read, backend=backend)(keys)
