"""Values that are stored rotated: weights that rotate in the place of a step, and what does not allow it."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from dynamo_graphs import tiny
from numeric import seeded
from rewrites import count
from stepping import interpreted, relative_error, run_steps
from torch import Tensor, nn
from transformers import DynamicCache, StaticCache

from xquant_fx import XQuantCache, XQuantConfig, explain, ops
from xquant_fx.cache.folded_weights import Fold, FoldedInputs, folded_weight
from xquant_fx.kernels.rotation import fold_into_columns, fold_into_rows, rotate_values

pytest_plugins = ["plain_torch"]
SHORT = dict(residual_length=16, k_group_size=8, sink_tokens=2)
INSIDE = XQuantConfig(**SHORT)
FOLDED = INSIDE.replace(v_scheme="per_token_folded")
IDS = torch.randint(3, 60, (1, 65), generator=seeded(1))
FEW = 15  # eager steps that plain torch stores; the next one has a kernel compiled


def cache_of(model: nn.Module, config: XQuantConfig = FOLDED) -> XQuantCache:
    return XQuantCache(model.config, 64, config=config)


def steps(model: nn.Module, cache: XQuantCache, step=None, number: int = FEW) -> Tensor:
    """A prefill, then steps of which some quantize a group."""
    return run_steps([(model.forward, 45)] + [(step or model.forward, 1)] * number, IDS, cache)


@pytest.mark.parametrize("dim", [8, 24])
def test_folded_weights_rotate(dim: int) -> None:
    x, layer = torch.randn(5, 7), nn.Linear(7, 3 * dim)
    expected = rotate_values(layer(x).unflatten(1, (3, dim)), False).flatten(1)
    rotated = nn.functional.linear(x, fold_into_rows(layer.weight, dim), fold_into_rows(layer.bias, dim))
    torch.testing.assert_close(rotated, expected)
    taker, v = nn.Linear(3 * dim, 4), torch.randn(5, 3 * dim)
    y = rotate_values(v.unflatten(1, (3, dim)), False).flatten(1)
    assert not torch.allclose(y, v)
    torch.testing.assert_close(nn.functional.linear(y, fold_into_columns(taker.weight, dim), taker.bias), taker(v))


@pytest.mark.parametrize("number", [FEW, pytest.param(19, marks=pytest.mark.slow)])
def test_eager_steps_are_those_of_values_that_are_rotated_inside(number: int) -> None:
    model = tiny("llama")
    folded, inside = cache_of(model), cache_of(model, INSIDE)
    assert relative_error(*(steps(model, cache, number=number) for cache in (folded, inside))) < 1e-4
    ours, theirs = folded.states[1].owned, inside.states[1].owned
    assert not torch.allclose(ours["ring"], theirs["ring"], atol=1e-3), "the window is rotated"
    torch.testing.assert_close(rotate_values(ours["ring"], True), theirs["ring"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(rotate_values(ours["sink"][:, :, :2], True), theirs["sink"][:, :, :2])


@pytest.mark.parametrize("name", [pytest.param("llama", marks=pytest.mark.slow), "phi"])  # the second has biases
def test_steps_with_folded_weights(name: str) -> None:
    """Weights that change afterwards are rotated anew."""
    model, calls = tiny(name), []
    compiled = torch.compile(model.forward, backend=interpreted(calls), dynamic=False)
    ours, cache = steps(model, cache_of(model), compiled), cache_of(model, INSIDE)
    assert relative_error(ours, steps(model, cache)) < 1e-4
    (graph,) = calls
    assert (count(graph, ops.DECODE), count(graph, ops.ROTATE)) == (2, 0)
    folded = [node for node in graph.graph.nodes if node.name.startswith("xquant_folded")]
    assert len(folded) == (6 if name == "phi" else 4)
    with torch.no_grad():
        for layer in model.model.layers:
            attention = layer.self_attn
            attention.v_proj.weight.mul_(1.5)
            (attention.dense if name == "phi" else attention.o_proj).weight.add_(0.1)
    again = steps(model, cache_of(model), compiled)
    assert relative_error(again, steps(model, cache_of(model, INSIDE))) < 1e-4 < relative_error(ours, again)
    assert len(calls) == 1


@pytest.mark.usefixtures("plain_torch")
def test_a_chunk() -> None:
    """More tokens than the window gives back."""
    model = tiny("llama")
    sizes = [20] + [1] * 9  # and one group more
    chunked = torch.compile(model.forward, backend=interpreted(), dynamic=False)
    ours, theirs = (
        run_steps([(model.forward, 25), *((step, n) for n in sizes)], IDS, cache_of(model, config))
        for step, config in ((chunked, FOLDED), (model.forward, INSIDE))
    )
    assert relative_error(ours, theirs) < 1e-4


# Buffers of a fixed length that are taken over are in test_two_attentions_to_one_buffer, too.
@pytest.mark.parametrize("kind", ["growing", pytest.param("static", marks=pytest.mark.slow)])
def test_caches_of_transformers_that_a_step_quantizes(kind: str) -> None:
    model = tiny("llama")
    grows = kind == "growing"
    cache = DynamicCache(config=model.config) if grows else StaticCache(config=model.config, max_cache_len=64)
    step = torch.compile(model.forward, backend=interpreted(v_scheme="per_token_folded", **SHORT))
    taken, expected = steps(model, cache, step), steps(model, cache_of(model, INSIDE))
    assert relative_error(taken[:, 46:], expected[:, 46:]) < 1e-2


def test_left_out_the_op_rotates() -> None:
    model, calls = tiny("llama"), []
    step = torch.compile(model.forward, backend=interpreted(calls, disable=["fold_rotation"]), dynamic=False)
    assert relative_error(steps(model, cache_of(model), step), steps(model, cache_of(model, INSIDE))) < 1e-4
    assert (count(calls[0], ops.DECODE), count(calls[0], ops.ROTATE)) == (2, 4)


def test_copies_belong_to_their_weights() -> None:
    weight, fold = nn.Parameter(torch.randn(16, 8)), Fold(True, 8)
    inputs = FoldedInputs([(1, fold)])
    (copy,) = inputs.of((None, weight))
    assert copy is folded_weight(weight, fold) is inputs.of((None, weight))[0]
    weight.data = torch.randn(16, 8)  # another memory
    assert not torch.equal(inputs.of((None, weight))[0], copy)
    other = nn.Parameter(weight.detach().clone())
    (theirs,) = inputs.of((None, other))
    assert theirs is not copy and torch.equal(theirs, folded_weight(weight, fold))
    assert FoldedInputs([(1, fold)]).of((None, weight))[0] is folded_weight(weight, fold), "two graphs share it"
    weight.data += 1.0  # as PEFT merges adapters: torch counts no write
    (merged,) = FoldedInputs([(1, fold)]).of((None, weight))
    assert torch.equal(merged, fold_into_rows(weight.detach(), 8))
    del merged
    kept = weakref.ref(folded_weight(weight, fold))
    del weight, other, inputs
    gc.collect()
    assert kept() is None


class Tapped(nn.Module):
    """An attention layer of which ``tap`` says what else is done with values or the output."""

    def __init__(self, tap: str) -> None:
        super().__init__()
        self.tap = tap
        self.q, self.k, self.v, self.o = (nn.Linear(32, 32, bias=False) for _ in range(4))

    def forward(self, x: Tensor, keys: Tensor, values: Tensor, pos: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        q, k, v = (f(x).view(1, x.shape[1], 2, 16).transpose(1, 2) for f in (self.q, self.k, self.v))
        if self.tap == "tanh":
            v = v.tanh()
        keys.index_copy_(2, pos, k), values.index_copy_(2, pos, v)
        out = nn.functional.scaled_dot_product_attention(q, keys, values, mask)
        if self.tap == "twice":  # another attention to the same buffers
            other = nn.functional.scaled_dot_product_attention(q.flip(3), keys, values, mask).transpose(1, 2)
            pos = self.k(other.reshape(1, x.shape[1], 32))
        out = out if self.tap == "heads" else out.transpose(1, 2)
        out = out.reshape(1, x.shape[1], 32)
        out = out * 2 if self.tap == "gate" else out
        return self.o(out), v.sum() if self.tap == "used" else pos


REASONS = {
    "tanh": ("new values come from tanh, not from a linear layer",),
    "used": ("new values are used for something else, too",),
    "gate": ("the attention's output goes into mul, not into a linear layer",),
    "heads": (),
    "": (),
}


@pytest.mark.parametrize("tap", REASONS)
def test_what_does_not_allow_it(tap: str) -> None:
    model, cache = Tapped(tap), [torch.zeros(1, 2, 64, 16) for _ in range(2)]
    x, mask = torch.randn(1, 1, 32), torch.ones(1, 1, 1, 64, dtype=torch.bool)
    notes = explain(model, x, *cache, torch.tensor([0]), mask, options=dict(v_scheme="per_token_folded")).sites[0].notes
    why = tuple(f"values are rotated at each step: {reason}" for reason in REASONS[tap])
    assert notes[-len(why) or len(notes) :] == why
    size = 32 * 32 * 4 * (2 - len(why))
    words = f"{2 - len(why)} weights: {size:,} bytes of rotated copies"
    assert notes[0] == f"rotation of values folded into {words}"


@pytest.mark.usefixtures("plain_torch")
def test_two_attentions_to_one_buffer() -> None:
    torch.manual_seed(0)
    model, x, calls = Tapped("twice"), torch.randn(1, 40, 32), []
    outs = []
    for scheme in ("per_token_folded", "per_token_rotated"):
        torch._dynamo.reset()
        step = torch.compile(model, backend=interpreted(calls, v_scheme=scheme, **SHORT), dynamic=False)
        cache, mask = [torch.zeros(1, 2, 64, 16) for _ in range(2)], torch.zeros(1, 1, 1, 64, dtype=torch.bool)
        found = []
        with torch.no_grad():
            for t in range(40):
                mask[..., t] = True
                found += step(x[:, t : t + 1], *cache, torch.tensor([t]), mask)
        outs.append(torch.cat(found))
    assert relative_error(*outs) < 1e-4
    assert [count(graph, ops.ROTATE) for graph in calls] == [0] * len(calls)
    assert [count(graph, ops.DECODE) for graph in calls] == [2] * len(calls)
