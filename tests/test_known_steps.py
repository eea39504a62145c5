"""Steps of a few tokens whose number Dynamo leaves open: each is a graph of its number, fused as any step."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from stepping import interpreted

from xquant_fx import XQuantCache, XQuantConfig

pytest_plugins = ["plain_torch"]


CONFIG = XQuantConfig.preset("xquant-2.2")


class Both:
    """A cache that is written to by a compiled step, and one by the model itself."""

    def __init__(self, model: Any, step: Any, length: int) -> None:
        self.model, self.step = model, step
        self.plain = XQuantCache(model.config, length, config=CONFIG)
        self.cache = copy.deepcopy(self.plain)

    def prompt(self, ids: torch.Tensor, step: Any) -> None:
        """Tokens before the steps, into the second cache by ``step``."""
        self.model(ids, past_key_values=self.plain)
        step(ids, past_key_values=self.cache)

    def check(self, piece: torch.Tensor, **more: Any) -> None:
        """A step of these tokens, whose logits are the same; ``more`` is for the compiled one."""
        expected = self.model(piece, past_key_values=self.plain).logits
        found = self.step(torch.tensor(piece.tolist()), past_key_values=self.cache, **more).logits  # no longer strides
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def ids_of(tokens: int) -> torch.Tensor:
    return torch.randint(3, 128, (1, tokens), generator=torch.Generator().manual_seed(0))


def numbers_of(graphs: list[Any]) -> list[Any]:
    """Those among the inputs that are left open: with one, layers would not be compiled once for all."""
    inputs = [node.meta["example_value"] for graph in graphs for node in graph.graph.find_nodes(op="placeholder")]
    return [each for each in inputs if isinstance(each, torch.SymInt)]


@pytest.mark.usefixtures("plain_torch")
@torch.no_grad()
def test_steps_of_a_few_tokens_are_fused_whatever_their_number(tiny_llama) -> None:
    graphs, ids = list[Any](), ids_of(360)
    model = tiny_llama(layers=1, head_dim=32)
    step = torch.compile(model.forward, backend=interpreted(graphs, config=CONFIG, self_check=False))
    both = Both(model, step, 512)
    both.prompt(ids[:, :300], step)
    at, seen = 300, []
    for tokens in (1, 5, 3, 5):
        before = len(graphs)
        both.check(ids[:, at : at + tokens], logits_to_keep=tokens)  # as assisted decoding has it
        at += tokens
        seen.append(len(graphs) - before)
    assert seen == [1, 1, 1, 0]
    assert all(any("decode_attention" in str(node.target) for node in graph.graph.nodes) for graph in graphs[-3:])
    assert not numbers_of(graphs[-3:])


@pytest.mark.usefixtures("plain_torch")
@torch.no_grad()
def test_another_length_of_caches_is_known(tiny_llama) -> None:
    """From the second length on Dynamo takes it for one that varies, though the graph is for one alone."""
    graphs, ids = list[Any](), ids_of(41)
    model = tiny_llama(layers=1, head_dim=32)
    step = torch.compile(model.forward, backend=interpreted(graphs, config=CONFIG, self_check=False))
    for length in (64, 96, 128):
        both = Both(model, step, length)
        both.prompt(ids[:, :40], model)
        both.check(ids[:, 40:])
        assert both.cache.layers[0].max_cache_len == length
    assert len(graphs) == 3 and not numbers_of(graphs)
