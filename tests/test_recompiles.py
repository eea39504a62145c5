"""Which decode steps are compiled anew: those of another shape, and no others."""

from __future__ import annotations

import copy
import pickle
import re
from typing import Any

import pytest
import torch
from dynamo_graphs import SMALL
from fast_and_slow import fast_but
from numeric import seeded
from stepping import interpreted
from torch import Tensor
from torch._dynamo.utils import counters
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache

from xquant_fx import XQuantCache, XQuantConfig


def prompt(tokens: int, batch: int = 1) -> Tensor:
    return torch.randint(3, 64, (batch, tokens), generator=seeded(tokens))


class Steps:
    """A model whose steps are compiled, and the graphs that Inductor would have got."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model, self.graphs = LlamaForCausalLM(LlamaConfig(**SMALL)).eval(), list[Any]()
        self.step = torch.compile(self.model.forward, backend=interpreted(self.graphs, self_check=False), dynamic=False)

    def cache(self, length: int = 32) -> XQuantCache:
        config = XQuantConfig.preset("xquant-1bit").replace(k_group_size=4, residual_length=4)
        return XQuantCache(self.model.config, max_cache_len=length, config=config)

    @torch.no_grad()
    def run(self, cache: XQuantCache, ids: Tensor, count: int = 2) -> int:
        """An uncompiled prompt and ``count`` steps; how many graphs there are now."""
        self.model(ids, past_key_values=cache)
        token = torch.ones(ids.shape[0], 1, dtype=torch.long)  # not ids[:, -1:], whose strides tell of the prompt
        for _ in range(count):
            self.step(token, past_key_values=cache)
        return len(self.graphs)


def guarded(step: Any, layer: int) -> set[str]:
    """Attributes of one layer of the cache that are looked at before each step, to tell whether its graph fits."""
    while not (found := torch._dynamo.eval_frame._debug_get_cache_entry_list(step.__code__)):
        step = step.__wrapped__
    (entry,) = found
    return set(re.findall(rf"source=L\S+\.layers\[{layer}\]\.(\w+),", str(entry.guard_manager)))


def test_steps_are_compiled_once_per_shape() -> None:
    steps = Steps()
    cache = steps.cache()
    assert steps.run(cache, prompt(5), count=6) == 1
    expected = {"keys", "values", "cumulative_length", "is_initialized", "leads", "__dict__"}
    # Each costs time in every step, in every layer. Transformers 5.17 asks for one more.
    assert guarded(LlamaForCausalLM.forward, 1) - {"is_sliding"} == expected
    cache.reset()
    assert steps.run(cache, prompt(11)) == 1  # another prompt, of another length
    assert steps.run(steps.cache(), prompt(7)) == 1  # another cache of the same config
    assert steps.run(steps.cache(), prompt(5, batch=2)) == 2
    assert steps.run(steps.cache(length=48), prompt(5)) == 3
    assert steps.run(cache.fork(), prompt(3)) == 3 and steps.run(steps.cache(), prompt(9, batch=2)) == 3


def test_generate_compiles_its_step_once() -> None:
    """Prompts of other lengths on the same cache: Dynamo traces the second for all lengths, and no third."""
    torch._dynamo.reset()
    counters.clear()
    steps, seen = Steps(), []
    steps.model.compile(backend=interpreted(steps.graphs, self_check=False))
    cache = steps.cache(length=48)
    for tokens in (5, 11, 7):
        cache.reset()
        steps.model.generate(
            prompt(tokens), past_key_values=cache, max_new_tokens=4, do_sample=False, eos_token_id=None
        )
        seen.append((len(steps.graphs), counters["stats"]["unique_graphs"]))
    assert seen == [(1, 2), (1, 3), (1, 3)]


CACHES = {
    "XQuantCache": lambda steps: steps.cache(),
    "StaticCache": lambda steps: StaticCache(steps.model.config, max_cache_len=32),
    "DynamicCache": lambda steps: DynamicCache(config=steps.model.config),
}


@pytest.mark.parametrize("kind", fast_but(CACHES, ["StaticCache"]))
def test_copies_run_the_graphs_of_the_original(kind: str) -> None:
    """Guards tell which tensors of a cache are one object: were it others in a copy, no graph would fit it."""
    steps = Steps()
    cache = CACHES[kind](steps)
    graphs = steps.run(cache, prompt(5))
    with torch.no_grad():
        for copied in (copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))):
            steps.step(torch.ones(1, 1, dtype=torch.long), past_key_values=copied)
    assert len(steps.graphs) == graphs
