"""Steps of a few tokens whose number Dynamo leaves open: each is a graph of its number, fused as any step."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from stepping import interpreted

from xquant_fx import XQuantCache, XQuantConfig

pytest_plugins = ["plain_torch"]


@pytest.mark.usefixtures("plain_torch")
@torch.no_grad()
def test_steps_of_a_few_tokens_are_fused_whatever_their_number(tiny_llama) -> None:
    config, graphs = XQuantConfig.preset("xquant-2.2"), list[Any]()
    model = tiny_llama(layers=1, head_dim=32)
    ids = torch.randint(3, 128, (1, 360), generator=torch.Generator().manual_seed(0))
    plain = XQuantCache(model.config, 512, config=config)
    cache = copy.deepcopy(plain)
    step = torch.compile(model.forward, backend=interpreted(graphs, config=config))
    model(ids[:, :300], past_key_values=plain)
    step(ids[:, :300], past_key_values=cache)
    at, seen = 300, []
    for tokens in (1, 5, 3, 5):
        piece, at = ids[:, at : at + tokens], at + tokens
        expected = model(piece, past_key_values=plain).logits
        before = len(graphs)
        # as assisted decoding has it, with no strides of a longer text
        found = step(torch.tensor(piece.tolist()), past_key_values=cache, logits_to_keep=tokens).logits
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
        seen.append(len(graphs) - before)
    assert seen == [1, 1, 1, 0]
    assert all(any("decode_attention" in str(node.target) for node in graph.graph.nodes) for graph in graphs[-3:])
    inputs = [node.meta["example_value"] for graph in graphs[-3:] for node in graph.graph.find_nodes(op="placeholder")]
    assert not any(isinstance(each, torch.SymInt) for each in inputs)  # or layers would not be compiled once for all


@pytest.mark.usefixtures("plain_torch")
@torch.no_grad()
def test_another_length_of_caches_is_known(tiny_llama) -> None:
    """From the second length on Dynamo takes it for one that varies, though the graph is for one alone."""
    config, graphs = XQuantConfig.preset("xquant-2.2"), list[Any]()
    model = tiny_llama(layers=2, head_dim=32)
    ids = torch.randint(3, 128, (1, 41), generator=torch.Generator().manual_seed(0))
    step = torch.compile(model.forward, backend=interpreted(graphs, config=config))
    for length in (64, 96, 128):
        plain = XQuantCache(model.config, length, config=config)
        cache = copy.deepcopy(plain)
        for each in (plain, cache):
            model(ids[:, :40], past_key_values=each)
        expected = model(ids[:, 40:], past_key_values=plain).logits
        found = step(torch.tensor(ids[:, 40:].tolist()), past_key_values=cache).logits
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
        assert cache.layers[0].max_cache_len == length
    assert len(graphs) == 3
    inputs = [node.meta["example_value"] for graph in graphs for node in graph.graph.find_nodes(op="placeholder")]
    assert not any(isinstance(each, torch.SymInt) for each in inputs)  # or layers would be compiled together
