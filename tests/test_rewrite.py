"""What the passes make of a graph: nodes before and after, and numbers equal to the same cache run eagerly."""

from __future__ import annotations

import copy

import pytest
import torch
from dynamo_graphs import FastModel, fresh, tiny
from rewrites import (
    CONFIG,
    STORES,
    Rewrites,
    assign,
    attentions,
    check_rewritten,
    count,
    quantized_layers,
    run_both,
    sdpa,
    two_layers,
)
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, GraphModule
from transformers import StaticCache

from xquant_fx import XQuantCache, ops
from xquant_fx.cache.kv_tensor import QuantizedKV
from xquant_fx.kernels.quantize_store.arguments import StoreArguments
from xquant_fx.kernels.shared_code_load.arguments import LoadArguments
from xquant_fx.passes.trace import fake

pytest_plugins = ["plain_torch"]


def index_copy(keys, values, k, v, pos):
    keys.index_copy_(2, pos, k)
    values.index_copy_(dim=2, index=pos, source=v)


def ellipsis(keys, values, k, v, pos):
    keys[..., pos, :] = k
    values[..., pos, :] = v


def spans(keys, values, k, v, pos):
    keys[:, :, 0:1] = k
    values[:, :, :1] = v


@pytest.mark.parametrize("append", [assign, index_copy, ellipsis, spans], ids=lambda f: f.__name__)
def test_appends_and_reads_become_ops(append):
    seen = Rewrites()
    mine, theirs = run_both(two_layers, [1] if append is spans else [5, 1, 1, 1, 1, 1], seen, append=append)
    torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-6)
    for given, before, made in zip(seen.given, seen.before, seen.made, strict=True):
        assert count(given, *STORES, ops.LOAD) == 0
        assert str(given.graph) == before and made is not given
        assert sum(isinstance(fake(n), QuantizedKV) for n in given.graph.nodes if n.op == "placeholder") == 4
        assert count(made, torch.Tensor.index_copy_, "index_copy_") == 0
        assert not any(node.op == "call_function" and node.target.__name__ == "setitem" for node in made.graph.nodes)
        assert (count(made, ops.STORE), count(made, ops.STORE_BORROWED)) == (2, 2)  # the upper layer borrows
        check_rewritten(made, stores=4, fused=2)


@pytest.mark.usefixtures("plain_torch")
@pytest.mark.parametrize("dynamic", [False, True])
def test_attention_to_a_slice(dynamic):
    def step(q, k, v, layers, pos):
        for keys, values in layers:
            assign(keys, values, k, v, pos)
            q = sdpa(q, keys[:, :, :24], values[:, :, : values.size(2) // 2])
        return q

    seen = Rewrites()
    mine, theirs = run_both(step, [5, 1, 1], seen, dynamic=dynamic)
    torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-6)
    check_rewritten(seen.made[-1], stores=4, fused=2)


def test_positions_of_another_integer_type():
    def step(q, k, v, layers, pos):
        return two_layers(q, k, v, layers, pos.to(torch.int32))

    mine, theirs = run_both(step, [5, 1], Rewrites())
    torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-6)


def test_two_appends_in_one_graph():
    def step(q, k, v, layers, pos):
        keys, values = layers[0]
        stored = keys.index_copy_(2, pos, k)
        values[:, :, pos] = v
        first = sdpa(q, stored, values)
        assign(keys, values, k * 2, v * 2, pos + k.shape[2])
        return first + sdpa(q, keys, values)

    mine, theirs = run_both(step, [3], seen := Rewrites())
    torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-6)
    assert count(seen.made[0], "index_copy_") == 0
    assert [count(seen.made[0], *ops_) for ops_ in (STORES, (ops.LOAD,), (ops.DECODE,))] == [4, 0, 2]


def test_a_pair_shares_one_codes_input():
    seen = Rewrites()
    run_both(two_layers, [5], seen)
    (made,), (inputs,) = seen.made, seen.inputs
    placeholders = made.graph.find_nodes(op="placeholder")
    assert len(placeholders) == len(inputs) == len({id(tensor) for tensor in inputs})
    stores = [StoreArguments.of(node) for node in made.graph.nodes if node.target in STORES]
    lower, upper = (store for store in stores if store.scheme == "per_channel")
    assert lower.codes is upper.codes and lower.scale is not upper.scale
    assert sum("codes" in node.name for node in placeholders) == 2


def test_hand_built_graph():
    keys, values = quantized_layers()[0]
    (q, k, v), pos = fresh(2), torch.arange(2)
    mode, graph = FakeTensorMode(), Graph()
    nodes = []
    for name, tensor in (("q", q), ("k", k), ("v", v), ("keys", keys), ("values", values), ("pos", pos)):
        node = graph.placeholder(name)
        if isinstance(tensor, QuantizedKV):
            node.meta["example_value"] = QuantizedKV(tensor.spec, mode.from_tensor(tensor.anchor))
        else:
            node.meta["example_value"] = mode.from_tensor(tensor)
        nodes.append(node)
    stored = graph.call_method("index_copy_", (nodes[3], 2, nodes[5], nodes[1]))
    graph.call_method("index_copy_", (nodes[4], 2, nodes[5], nodes[2]))
    views = graph.call_method("contiguous", (stored,))  # a read of the write's result
    for node, like in ((stored, keys), (views, keys)):
        node.meta["example_value"] = mode.from_tensor(torch.empty(like.shape))
    graph.output((graph.call_function(sdpa, (nodes[0], views, nodes[4])),))
    gm, seen = GraphModule({}, graph), Rewrites()
    with torch.no_grad():
        inputs = [q, k, v, keys, values, pos]
        (out,) = seen(gm, inputs)(*inputs)
        twin = quantized_layers()[0]
        index_copy(*twin, k, v, pos)
    assert count(gm, "index_copy_") == 2 and count(seen.made[0], "index_copy_") == 0
    check_rewritten(seen.made[0], stores=2, loads=2)  # without fake values nothing is fused
    torch.testing.assert_close(out, sdpa(q, *twin), rtol=0, atol=1e-6)


@pytest.mark.usefixtures("plain_torch")
def test_hugging_face_model():
    model, seen = tiny("gemma3_text"), Rewrites()
    mine = XQuantCache(model.config, 32, CONFIG)
    ids = torch.arange(3, 25)[None]
    step = torch.compile(model.forward, backend=seen, dynamic=False)
    with torch.no_grad():
        model(ids[:, :14], past_key_values=mine)
        theirs = copy.deepcopy(mine)
        for t in (14, 15):
            got = step(ids[:, t : t + 1], past_key_values=mine).logits
            torch.testing.assert_close(got, model(ids[:, t : t + 1], past_key_values=theirs).logits, rtol=0, atol=1e-5)
    made = seen.made[0]
    full_layer = (count(made, *STORES), count(made, ops.LOAD), count(made, ops.DECODE))
    assert full_layer == (2, 0, 1)  # the full layer; the window is as it was
    assert count(made, "copy_") == count(seen.given[0], "copy_") == 2


@pytest.mark.usefixtures("plain_torch")
@pytest.mark.parametrize("sizes", [[12], [3, 9, 1], [20, 8, 13]])
def test_long_chunk_reads_its_own_tokens_and_the_old_window(sizes):
    seen = Rewrites()
    mine, theirs = run_both(two_layers, sizes, seen)
    torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-6)
    for made, tokens in zip(seen.made, sizes, strict=True):
        loads = [node for node in made.graph.nodes if node.target is ops.LOAD]
        assert count(made, torch.clone) == (4 if tokens > 8 else 0)
        for load in loads:
            assert (LoadArguments.of(load).x is not None) == (tokens > 8)
            assert (LoadArguments.of(load).ring.target is torch.clone) == (tokens > 8)


def test_sixteen_bits_have_no_window():
    seen = Rewrites()
    mine, theirs = run_both(two_layers, [12, 1], seen, config=CONFIG.replace(k_bits=16, v_bits=16))
    torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-6)
    assert all(count(made, torch.clone, ops.STORE_BORROWED) == 0 for made in seen.made)


def broken(q, k, v, layers, pos):
    (lower_keys, lower_values), (upper_keys, upper_values) = layers
    assign(lower_keys, lower_values, k, v, pos)
    torch._dynamo.graph_break()
    q = sdpa(q, lower_keys, lower_values)
    assign(upper_keys, upper_values, k, v, pos)
    torch._dynamo.graph_break()
    return sdpa(q, upper_keys, upper_values)


def test_graph_break_between_write_and_read():
    """The first graph only writes, the last one only reads."""
    seen = Rewrites()
    mine, theirs = run_both(broken, [5, 1, 3], seen)
    torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-6)
    stores = [count(made, *STORES) for made in seen.made[:3]]
    reads = [len(attentions(made)) for made in seen.made[:3]]
    assert (stores, reads) == ([2, 2, 0], [0, 1, 1])


def test_eager_steps_after_a_graph_break_are_not_compiled():
    """Dynamo gives up a loop with a graph break in it: nothing of ours may end up in graphs of its own."""

    def loop(q, k, v, layers, pos):
        for keys, values in layers:
            assign(keys, values, k, v, pos)
            torch._dynamo.graph_break()
            q = sdpa(q, keys, values)
        return q

    mine, theirs = run_both(loop, [5, 1], seen := Rewrites())
    torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-6)
    assert [count(made, *STORES) for made in seen.made] == [2, 2, 2, 2]


@pytest.mark.usefixtures("plain_torch")
def test_gpt_fast_from_its_second_step_on():
    model, seen = FastModel(), Rewrites(config=CONFIG)
    step = torch.compile(model, backend=seen, dynamic=False)
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        step(ids[:, :9], torch.arange(9))  # takes the buffers over; nothing is compiled
        assert seen.made == [] and isinstance(model.layers[1].kv_cache.k_cache, QuantizedKV)
        twin = copy.deepcopy(model)
        for t in range(9, 13):
            got = step(ids[:, t : t + 1], torch.tensor([t]))
            torch.testing.assert_close(got, twin(ids[:, t : t + 1], torch.tensor([t])), rtol=0, atol=1e-5)
    assert len(seen.made) == 1
    check_rewritten(seen.made[0], stores=4, fused=2)


@pytest.mark.usefixtures("plain_torch")
def test_cold_static_cache_is_compiled_and_taken_over_later():
    model, seen = tiny("llama"), Rewrites(config=CONFIG)
    cache, ids = StaticCache(config=model.config, max_cache_len=32), torch.arange(3, 20)[None]
    step = torch.compile(model.forward, backend=seen, dynamic=False)
    with torch.no_grad():
        step(ids[:, :9], past_key_values=cache)
        assert seen.made == seen.given
        assert not isinstance(cache.layers[0].keys, QuantizedKV)
        for t in (9, 10):
            step(ids[:, t : t + 1], past_key_values=cache)
    assert isinstance(cache.layers[0].keys, QuantizedKV) and len(seen.made) == 2
    check_rewritten(seen.made[1], stores=4, fused=2)
