"""options={"self_check": True}: a rewritten graph that computes something else is not used, and nothing is changed."""

from __future__ import annotations

import copy
import dataclasses
import logging

import pytest
import torch
from dynamo_graphs import fresh
from rewrites import SHAPE, Rewrites, assign, count, quantized_layers, sdpa
from torch._dynamo.exc import BackendCompilerFailed
from torch._dynamo.utils import counters

from xquant_fx import explain, ops
from xquant_fx.cache.growing import GrowingKV
from xquant_fx.cache.kv_tensor import QuantizedKV
from xquant_fx.compiler.differences import beyond_rounding
from xquant_fx.compiler.options import parse
from xquant_fx.passes import pipeline, walk_scores
from xquant_fx.warn_once import forget

pytest_plugins = ["plain_torch"]
SIZES = (5, 1, 1)


def written_out(q, k, v, keys, values, pos):
    """One layer whose scores are scaled."""
    assign(keys, values, k, v, pos)
    seen = torch.arange(keys.shape[2]) <= pos[:, None]
    return torch.softmax((q @ keys.mT * 0.3).masked_fill(~seen, -torch.inf), -1) @ values


def concatenated(q, k, v, keys, values, pos):
    """The same, grown by concatenation."""
    keys, values = torch.cat([keys, k], 2), torch.cat([values, v], 2)
    return torch.softmax(q @ keys.mT * 0.3, -1) @ values, keys, values


@pytest.fixture(autouse=True)
def warnings(caplog, plain_torch):
    forget()
    counters.clear()
    caplog.set_level(logging.WARNING, "xquant_fx")
    yield lambda: [record.message for record in caplog.records]
    forget()


def scale_is_wrong(monkeypatch):
    """The row of forms that knows scales takes each for one that is 3 percent larger."""

    def wrong(node, found, scene):
        taken = row.take(node, found, scene)
        return None if taken is None else (taken[0], taken[1].replace(scale=taken[1].scale * 1.03))

    (row,) = (row for row in walk_scores.ROWS if row.name == "scale")
    rows = tuple(dataclasses.replace(r, take=wrong) if r is row else r for r in walk_scores.ROWS)
    monkeypatch.setattr(walk_scores, "ROWS", rows)


def stores_are_wrong(monkeypatch):
    """A pass that has appends store something else."""

    def wrong(gm, context):
        for node in list(gm.graph.nodes):
            if node.target in (ops.STORE, ops.STORE_BORROWED):
                with gm.graph.inserting_before(node):
                    x = gm.graph.call_function(torch.mul, (node.kwargs["x"], 1.5))
                    x.meta.update(node.kwargs["x"].meta)
                node.kwargs = {**node.kwargs, "x": x}
        return 0

    at = [each.name for each in pipeline.PASSES].index("fuse_decode")
    passes = (*pipeline.PASSES[:at], pipeline.Pass("wrong", wrong), *pipeline.PASSES[at:])
    monkeypatch.setattr(pipeline, "PASSES", passes)


def run(function, buffers, seen: Rewrites, sizes=SIZES):
    """Results of the last step, with the passes and eagerly on copies of ``buffers``."""
    torch.manual_seed(0)
    theirs, at = copy.deepcopy(buffers), 0
    compiled = torch.compile(function, backend=seen, dynamic=False)
    with torch.no_grad():
        for tokens in sizes:
            args, pos = fresh(tokens), torch.arange(at, at + tokens)
            out, right = compiled(*args, *buffers, pos), function(*args, *theirs, pos)
            at += tokens
            if isinstance(out, tuple):
                (out, *buffers), (right, *theirs) = out, right
    return out, right, buffers, theirs


def ordinary():
    return [torch.zeros(SHAPE), torch.zeros(SHAPE)]


def nothing():
    return [torch.zeros(*SHAPE[:2], 0, SHAPE[3]) for _ in range(2)]


KINDS = {
    "quantized": (written_out, lambda: list(quantized_layers()[0])),
    "taken over": (written_out, ordinary),
    "growing": (concatenated, nothing),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_right_graph_is_used(kind, warnings):
    """Nothing is warned of but small caches, and these are what they are without the check."""
    function, make = KINDS[kind]
    seen, plain = Rewrites(self_check=True), Rewrites()
    out, _, buffers, _ = run(function, make(), seen)
    torch._dynamo.reset()
    checked, refused = (counters["xquant"].pop(name) for name in ("self_check", "self_check refused"))
    counted = dict(counters["xquant"])
    counters.clear()
    same, _, others, _ = run(function, make(), plain)
    assert checked >= 1 and not refused and counted == dict(counters["xquant"])
    assert all("bytes quantized" in warning for warning in warnings())
    assert torch.equal(out, same) and count(seen.made[-1], ops.DECODE) == 1
    for mine, theirs in zip(buffers, others, strict=True):
        assert isinstance(mine, QuantizedKV | GrowingKV)
        for name, tensor in mine.live.owned.items():
            assert torch.equal(tensor, theirs.live.owned[name]), name


@pytest.mark.parametrize("kind", KINDS)
def test_a_wrong_form_is_given_up(kind, warnings, monkeypatch):
    scale_is_wrong(monkeypatch)
    function, make = KINDS[kind]
    wrong, _, _, _ = run(function, make(), Rewrites())
    torch._dynamo.reset()
    out, right, _, _ = run(function, make(), seen := Rewrites(self_check=True))
    assert beyond_rounding("", wrong, right) and not beyond_rounding("", out, right)
    assert (count(seen.made[-1], ops.DECODE), count(seen.made[-1], ops.LOAD)) == (0, 2)
    assert counters["xquant"]["self_check refused"] >= 1
    (warning,) = (w for w in warnings() if "self_check" in w)
    assert "its result differs from the program's by 0.0" in warning and "(relative), more than 0.0001" in warning
    torch._dynamo.reset()
    with pytest.raises(BackendCompilerFailed, match="self_check: its result differs"):
        run(function, make(), Rewrites(self_check=True, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_a_wrong_pass_is_refused(kind, warnings, monkeypatch):
    stores_are_wrong(monkeypatch)
    function, make = KINDS[kind]
    out, right, buffers, theirs = run(function, make(), seen := Rewrites(self_check=True))
    assert not beyond_rounding("", out, right)
    if kind == "taken over":  # or rather not
        assert all(type(buffer) is torch.Tensor for buffer in buffers) and torch.equal(buffers[0], theirs[0])
    else:
        assert seen.made == [] and all(isinstance(buffer, QuantizedKV | GrowingKV) for buffer in buffers)
    assert len(warned := [w for w in warnings() if "self_check: attention 0" in w]) >= 1, warned
    torch._dynamo.reset()
    with pytest.raises(BackendCompilerFailed, match="self_check: attention 0"):
        run(function, make(), Rewrites(self_check=True, strict=True))


def test_the_attention_that_differs_is_named(warnings, monkeypatch):
    """A fault in the second layer is not taken for one of the third, which it makes wrong, too."""
    layers = quantized_layers() + quantized_layers()

    def three(q, k, v, pos):
        for i, (keys, values) in enumerate(layers[:3]):
            assign(keys, values, k, v, pos)
            q = torch.softmax(q @ keys.mT * 0.3, -1) @ values if i == 1 else sdpa(q, keys, values)
        return q

    scale_is_wrong(monkeypatch)
    with torch.no_grad():
        torch.compile(three, backend=(seen := Rewrites(self_check=True)))(*fresh(1), torch.arange(1))
    assert count(seen.made[0], ops.DECODE) == 2
    (warning,) = (w for w in warnings() if "self_check" in w)
    assert "[1][0] reads dequantized" in warning


def test_explain_says_it(monkeypatch):
    keys, values = quantized_layers()[0]
    args = (*fresh(3), keys, values, torch.arange(3))
    scale_is_wrong(monkeypatch)
    assert explain(written_out, *args).sites[0].dequantized == ""
    (site,) = explain(written_out, *args, options={"self_check": True}).sites
    assert site.rewritten and site.dequantized.startswith("self_check: its result differs from the program's by")
    stores_are_wrong(monkeypatch)
    (site,) = explain(written_out, *args, options={"self_check": True}).sites
    assert not site.rewritten and site.reason.startswith("self_check: attention 0")
    (site,) = explain(written_out, *args[:3], *ordinary(), args[-1], options={"self_check": True}).sites
    assert not site.rewritten and site.reason.startswith("self_check: attention 0")
    assert keys.live.length == 0


def test_what_cannot_be_checked_is_said(warnings):
    def communicates(q, k, v, keys, values, pos):
        x = torch.cond(q.sum() > 0, lambda x: x.sin(), lambda x: x.cos(), (q,))
        return written_out(x, k, v, keys, values, pos)

    run(communicates, list(quantized_layers()[0]), seen := Rewrites(self_check=True))
    assert count(seen.made[-1], ops.DECODE) == 1
    (warning,) = warnings()
    assert warning.startswith("self_check: a graph could not be checked: it runs graphs of its own")


def test_the_option():
    assert parse(None, {"self_check": True}).self_check and not parse(None, None).self_check
    with pytest.raises(ValueError, match="self_check must be True or False, got 1"):
        parse(None, {"self_check": 1})


@pytest.mark.parametrize(
    ("mine", "theirs", "differs"),
    [
        (torch.ones(3), torch.ones(3) * 1.00001, False),
        (torch.ones(3), torch.ones(3) * 1.001, True),
        (torch.ones(3), torch.tensor([1.0, 1.0, torch.nan]), False),
        (torch.tensor([1.0, torch.nan]), torch.ones(2), True),
        (torch.ones(3), torch.ones(3, dtype=torch.float64), True),
        (torch.ones(3).bfloat16(), torch.ones(3).bfloat16() * 1.01, False),
        (torch.tensor([1]), torch.tensor([2]), False),
        (3, 4, True),
        (torch.zeros(2), torch.zeros(2), False),
    ],
)
def test_rounding(mine, theirs, differs):
    assert bool(beyond_rounding("it", mine, theirs)) == differs


def test_buffers_of_several_lengths(warnings):
    """Caches that grow by a longer buffer: the length of the second is a symbol of the graph."""
    compiled = torch.compile(written_out, backend=Rewrites(self_check=True))
    with torch.no_grad():
        for length in (32, 48):
            buffers = [torch.zeros(*SHAPE[:2], length, SHAPE[3]) for _ in range(2)]
            out = compiled(*fresh(1), *buffers, torch.arange(1))
            assert isinstance(buffers[0], QuantizedKV) and not bool(out.isnan().any())
    assert not any("self_check" in w for w in warnings())


def test_vmap_is_not_looked_into(warnings):
    def rows(q, k, v, keys, values, pos):
        assign(keys, values, k, v, pos)
        return torch.vmap(sdpa)(q, keys, values)

    out, right, _, _ = run(rows, ordinary(), Rewrites(self_check=True), sizes=(5, 1))
    torch.testing.assert_close(out, right)
    assert any("could not be checked: it runs inside torch.vmap" in w for w in warnings())
