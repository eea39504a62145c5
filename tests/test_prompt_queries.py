"""A prompt's queries reach the keys that it appends: eager, compiled, and over buffers that are taken over."""

from __future__ import annotations

import pytest
import torch
from dynamo_graphs import tiny
from plain_decoder import Decoder
from stepping import interpreted
from torch import Tensor
from torch.fx import Graph, Node
from torch.nn.functional import scaled_dot_product_attention
from transformers import DynamicCache, StaticCache

from xquant_fx import XQuantCache, XQuantConfig
from xquant_fx.cache.kv_tensor import QuantizedKV
from xquant_fx.cache.prompt_keys import PromptKeys
from xquant_fx.passes.early_queries import compute_queries_early

SMALL = XQuantConfig(k_group_size=8, residual_length=8, sink_tokens=0)


pytestmark = pytest.mark.usefixtures("all_traced")


def energies(model, ids: Tensor, compiled: bool) -> list[Tensor]:
    cache = XQuantCache(model.config, 64, SMALL)
    step = torch.compile(model.forward, backend="xquant") if compiled else model.forward
    with torch.no_grad():
        step(ids, past_key_values=cache)
    return [state.owned["energy"] for state in cache.states if state.spec.role == "key"]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_of_a_cold_prompt(attention: str) -> None:
    """The mean square over tokens and the heads of a group, however attention is written and run."""
    model, seen = tiny("llama", attention, max_position_embeddings=64), []
    ids = torch.randint(3, 60, (2, 30), generator=torch.Generator().manual_seed(0))

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            if func in (scaled_dot_product_attention, torch.matmul) and args[0].shape[-1] == args[1].shape[-2 + (
                func is scaled_dot_product_attention)]:  # fmt: skip
                seen.append(args[0])
            return func(*args, **(kwargs or {}))

    eager, compiled = (energies(model, ids, c) for c in (False, True))
    with torch.no_grad(), Watch():
        model(ids)
    queries = [q for q in seen if q.shape[2] == 30 and q.shape[3] == eager[0].shape[2]]
    assert len(eager) == len(compiled) == 2 and len(queries) >= 2
    for layer, energy in enumerate(eager):
        expected = queries[layer].square().mean(2).unflatten(1, (energy.shape[1], -1)).mean(2)
        torch.testing.assert_close(energy, expected)
        torch.testing.assert_close(compiled[layer], expected)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_of_a_cache_that_grows(attention: str) -> None:
    """Which is quantized behind each attention: its query is still there then."""
    model = tiny("llama", attention, max_position_embeddings=64)
    ids, cache = torch.randint(3, 60, (2, 30)), DynamicCache(config=model.config)
    options = {"config": SMALL, "strict": True}
    with torch.no_grad():
        torch.compile(model.forward, backend="xquant", options=options)(ids, past_key_values=cache)
    found = [layer.keys.live.owned["energy"] for layer in cache.layers]
    for mine, expected in zip(found, energies(model, ids, compiled=False), strict=True):
        torch.testing.assert_close(mine, expected)


def test_of_buffers_that_are_taken_over() -> None:
    def step(q: Tensor, k: Tensor, v: Tensor, pos: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        keys.index_copy_(2, pos, k)
        values.index_copy_(2, pos, v)
        return scaled_dot_product_attention(q, keys, values)

    keys, values = torch.zeros(1, 2, 64, 16), torch.zeros(1, 2, 64, 16)
    q, k, v = torch.randn(3, 1, 2, 30, 16)
    options = {"k_group_size": 8, "residual_length": 8}
    with torch.no_grad():
        torch.compile(step, backend="xquant", options=options)(q, k, v, torch.arange(30), keys, values)
    assert isinstance(keys, QuantizedKV) and isinstance(values, QuantizedKV)
    torch.testing.assert_close(keys.live.owned["energy"], q.square().mean(2))
    assert "energy" not in values.live.owned


def test_prompt_keys_are_ordinary_keys() -> None:
    seen: list[Tensor] = []
    plain = torch.randn(1, 2, 20, 8)
    keys = PromptKeys.of(plain, seen.append)
    assert type(keys + 1) is Tensor and type(keys.sum()) is Tensor and keys.shape == plain.shape
    repeated = keys[:, :, None].expand(1, 2, 3, 20, 8).reshape(1, 6, 20, 8)
    assert isinstance(repeated, PromptKeys) and torch.equal(repeated, plain.repeat_interleave(3, 1))
    q = torch.randn(1, 6, 20, 8)
    torch.testing.assert_close(q @ repeated.transpose(2, 3), q @ plain.repeat_interleave(3, 1).transpose(2, 3))
    assert len(seen) == 1 and seen[0] is q
    torch.matmul(keys.transpose(2, 3), plain)  # keys are the first operand: no query
    torch.matmul(keys, keys.mT)
    assert len(seen) == 1
    scaled_dot_product_attention(q, key=repeated, value=repeated)
    assert len(seen) == 2


@pytest.mark.parametrize("shape", [(1, 2, 15, 16), (1, 3, 20, 16), (2, 2, 20, 16), (1, 2, 20, 8), (2, 20, 16)])
def test_what_is_no_query_of_these_keys_is_ignored(shape: tuple[int, ...]) -> None:
    model = tiny("llama", "sdpa", max_position_embeddings=64)
    cache = XQuantCache(model.config, 64, SMALL)
    cache.update(torch.randn(1, 2, 20, 16), torch.randn(1, 2, 20, 16), 0)
    state = cache.states[0]
    state.note_queries(torch.rand(shape))
    assert not state.owned["energy"].any()


def test_attention_that_is_compiled_by_itself_shows_its_queries() -> None:
    """As behind a graph break between the append and the attention of a cold prompt."""
    model = tiny("llama", "sdpa", max_position_embeddings=64)
    cache = XQuantCache(model.config, 64, SMALL)
    q, k, v = torch.randn(3, 1, 2, 20, 16)
    keys, values = cache.update(k, v, 0)
    attend = torch.compile(lambda q, k, v: scaled_dot_product_attention(q, k, v, is_causal=True), backend=interpreted())
    with torch.no_grad():
        out = attend(q, keys, values)
    torch.testing.assert_close(out, scaled_dot_product_attention(q, k, v, is_causal=True))
    torch.testing.assert_close(cache.states[0].owned["energy"], q.square().mean(2))


@pytest.mark.parametrize(
    "make", [lambda c: XQuantCache(c, 64, SMALL), lambda c: StaticCache(config=c, max_cache_len=64)]
)
def test_that_is_computed_behind_the_append(make) -> None:
    """A slice of a fused projection, say: what computes it is moved before the append."""
    model = Decoder(2).eval()
    ids = torch.randint(3, 60, (2, 30), generator=torch.Generator().manual_seed(0))
    cache, step = make(model.config), torch.compile(model.forward, backend="xquant", options={"config": SMALL})
    with torch.no_grad():
        for _ in range(2):  # buffers that are not empty are taken over in the second
            step(ids, past_key_values=cache)
            cache.reset()
    found = [layer.keys.live.owned["energy"] for layer in cache.layers]
    assert len(found) == 2 and all(bool(energy.all()) for energy in found)
    torch.testing.assert_close(found, energies(model, ids, compiled=False))


def graph_of(program) -> tuple[Graph, dict[str, Node]]:
    """The graph of ``program(x, keys)``, and its nodes by name."""
    graph = torch.fx.symbolic_trace(program).graph
    for node in graph.nodes:
        node.meta["example_value"] = torch.empty(2, 2, device="meta")
    return graph, {node.name: node for node in graph.nodes}


def later(x, keys):
    keys.add_(x)
    return (x[1:] * 2).relu()


def of_the_append(x, keys):
    return (keys.add_(x) * 2).relu()


def behind_a_write(x, keys):
    keys.add_(x)
    x.mul_(3)
    return (x[1:] * 2).relu()


def that_writes(x, keys):
    keys.add_(x)
    return (x * 2).mul_(2).relu()


@pytest.mark.parametrize(("program", "moved"), [(later, 1), (of_the_append, 0), (behind_a_write, 0), (that_writes, 0)])
def test_what_is_moved_before_the_append(program, moved: int) -> None:
    graph, nodes = graph_of(program)
    before = [node.name for node in graph.nodes]
    assert compute_queries_early(graph, {nodes["add_"]: nodes["relu"]}) == moved
    graph.lint()
    names = [node.name for node in graph.nodes]
    assert names == before if not moved else names.index("relu") < names.index("add_")
