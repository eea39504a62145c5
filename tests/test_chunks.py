"""Chunks of more than 8 tokens, of any number, as turns of a chat are: not compiled for each number."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from transformers import DynamicCache, StaticCache

from xquant_fx import XQuantCache, XQuantConfig

TURNS = [200, 9, 21, 140, 12]  # a prompt of 256 tokens attends by a kernel of its own


def ids() -> Tensor:
    return torch.randint(3, 128, (1, sum(TURNS)), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", [XQuantCache, pytest.param(StaticCache, marks=pytest.mark.slow), DynamicCache])
@torch.no_grad()
@pytest.mark.usefixtures("all_traced")
def test_turns_of_any_length_are_traced_once(tiny_llama, kind) -> None:
    """With codes that do not depend on who filled the cache."""
    counters.clear()
    config = XQuantConfig.preset("kivi-4")
    model = tiny_llama(layers=1, head_dim=32)
    prompt, *turns = ids().split(TURNS, 1)
    plain = XQuantCache(model.config, 512, config=config)
    cache: Any = DynamicCache(config=model.config)
    if kind is not DynamicCache:
        cache = copy.deepcopy(plain) if kind is XQuantCache else StaticCache(model.config, 512)
    step = torch.compile(model.forward, backend="xquant", dynamic=True, options={"config": config})
    model(prompt, past_key_values=plain)
    (model if kind is StaticCache else step)(prompt, past_key_values=cache)
    graphs = []
    for piece in turns:
        expected = model(piece, past_key_values=plain).logits
        torch.testing.assert_close(step(piece, past_key_values=cache).logits, expected, rtol=1e-3, atol=1e-4)
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[1:] == [graphs[1]] * 3  # a StaticCache that was just taken over is traced once more
    assert counters["xquant"]["rewrite"] or counters["xquant"]["rewrite_growth"]
    assert not counters["inductor"] and not counters["xquant"]["one_call"]  # no compiler was asked
