"""The pipeline as data: detection once per graph, counts, dumps, and passes that are switched off."""

from __future__ import annotations

import copy
import dataclasses
import logging
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from dynamo_graphs import fresh, tiny
from rewrites import CONFIG, STORES, Rewrites, count, quantized_layers, two_layers
from torch._dynamo.exc import BackendCompilerFailed
from torch._dynamo.utils import counters
from torch._logging._internal import trace_log
from torch.fx import Graph, GraphModule
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from xquant_fx import ConfigError, XQuantCache, explain, ops
from xquant_fx.compiler.options import parse
from xquant_fx.passes import facts, find_attention, find_writes, pipeline
from xquant_fx.passes.conditions import CONDITIONS
from xquant_fx.passes.dump import text_of
from xquant_fx.passes.graph import call, input_of_size
from xquant_fx.passes.pipeline import FAMILIES, MAY_BE_OFF, PASSES


def steps(seen: Rewrites, sizes=(5, 1)) -> list[torch.Tensor]:
    layers, at, out = quantized_layers(), 0, []
    torch.manual_seed(0)
    compiled = torch.compile(two_layers, backend=seen, dynamic=False)
    with torch.no_grad():
        for tokens in sizes:
            out.append(compiled(*fresh(tokens), layers, torch.arange(at, at + tokens)))
            at += tokens
    return out


@pytest.fixture(autouse=True)
def no_counts():
    counters.clear()


def test_every_pass_is_listed_once():
    names = [each.name for each in PASSES]
    assert names == [each.name for family in FAMILIES.values() for each in family] and len(set(names)) == len(names)
    assert names == [
        "add_state_inputs", "rewrite_growth", "rewrite_slides", "rewrite", "fuse_decode", "fold_rotation",
        "pair_stores", "linear_rows", "verify",
    ]  # fmt: skip
    assert MAY_BE_OFF == ("fuse_decode", "fold_rotation", "pair_stores", "linear_rows", "one_call")


def test_detection_runs_once_per_graph(monkeypatch):
    """Attentions and writes are looked for once in each graph, whatever is done with it."""
    calls = []
    for module, name in ((facts, "find_attention"), (facts, "find_writes")):
        found = getattr(module, name)
        monkeypatch.setattr(module, name, lambda graph, f=found, n=name: (calls.append(n), f(graph))[1])
    steps(seen := Rewrites())
    assert len(seen.given) == 2 and counters["xquant"]["detect"] == 2
    assert sorted(calls) == ["find_attention"] * 2 + ["find_writes"] * 2
    model, ids = tiny("llama"), torch.arange(3, 12)[None]
    cache = XQuantCache(model.config, 32, CONFIG)
    with torch.no_grad():
        model(ids, past_key_values=cache)
    counters.clear()
    calls.clear()
    assert explain(model, ids[:, :1], past_key_values=cache).graphs == 1
    assert counters["xquant"]["detect"] == 1 and len(calls) == 2


def test_nobody_else_looks_for_attention_or_writes():
    """What is found once is handed on: only ``facts`` calls the finders."""
    for finder in (find_attention, find_writes):
        used = [m for n, m in sys.modules.items() if n.startswith("xquant_fx.") and m is not finder]
        name = finder.__name__.rsplit(".", 1)[1]
        users = [m.__name__ for m in used if getattr(m, name, None) is getattr(finder, name)]
        assert users == ["xquant_fx.passes.facts"]


def test_counters_say_what_each_pass_did():
    steps(Rewrites(), sizes=(1,))
    done = dict(counters["xquant"])
    # Two layers whose upper keys and values borrow: 4 buffers, 16 tensors of their own, and what they share.
    assert done["rewrite"] == 4 and done["fuse_decode"] == 2 and done["detect"] == 1
    states = [state for layer in quantized_layers() for state in (layer[0].live, layer[1].live)]
    tensors = {id(t) for state in states for t in state.tensors.values() if t is not None}
    groups = len({id(state.group) for state in states})
    assert done["add_state_inputs"] == len(tensors) - 2 * (groups - 1)


def test_a_graph_without_a_cache_runs_no_pass():
    with torch.no_grad():
        torch.compile(lambda x: x + 1, backend=Rewrites())(torch.ones(2))
    assert dict(counters["xquant"]) == {"normalize": 0, "detect": 1}


def test_dump(tmp_path):
    steps(Rewrites(dump=str(tmp_path / "graphs")), sizes=(1,))
    files = sorted(p.name for p in (tmp_path / "graphs").iterdir())
    assert [name.split("-", 1)[1] for name in files] == [
        "0-detected.txt", "1-after-add_state_inputs.txt", "2-after-rewrite_growth.txt",
        "3-after-rewrite_slides.txt", "4-after-rewrite.txt", "5-after-fuse_decode.txt", "6-after-fold_rotation.txt",
        "7-after-pair_stores.txt", "8-after-linear_rows.txt", "9-after-verify.txt",
    ]  # fmt: skip
    texts = [(tmp_path / "graphs" / name).read_text() for name in files]
    assert ["decode_attention" in text for text in texts] == [False] * 5 + [True] * 5
    assert ["index_copy" in text or "setitem" in text for text in texts] == [True] * 4 + [False] * 6
    assert "float32[1, 2, 1, 8]" in texts[0]


def test_what_has_a_shape_and_is_no_tensor_is_written_by_its_name():
    """A mesh of devices among the inputs of a tensor parallel model."""
    graph = Graph()
    mesh, x = graph.placeholder("mesh"), graph.placeholder("x")
    mesh.meta["example_value"], x.meta["example_value"] = SimpleNamespace(shape=(2,)), torch.zeros(3, 2)
    graph.output((mesh, x))
    lines = text_of(GraphModule({}, graph)).splitlines()
    assert "#" not in lines[0] and lines[1].endswith("# float32[3, 2]")


DUMPED = ("detected", *(f"after-{each.name}" for each in PASSES))


class Artifacts(logging.Handler):
    """The payload of each artifact of torch's trace, by its name."""

    def __init__(self):
        super().__init__()
        self.texts = {}

    def emit(self, record):
        if found := record.metadata.get("artifact"):
            self.texts[found["name"]] = record.payload


def test_structured_trace():
    """The same graphs are artifacts of torch's trace, which tlparse shows."""
    seen = Artifacts()
    trace_log.addHandler(seen)
    try:
        steps(Rewrites(), sizes=(1,))
    finally:
        trace_log.removeHandler(seen)
    texts = [text for name in DUMPED for held, text in seen.texts.items() if held.endswith(name)]
    assert ["decode_attention" in text for text in texts] == [False] * 5 + [True] * 5


def test_nothing_is_written_for_nobody():
    """Tests run as users do: pytest must not listen to that trace, for which graphs become text."""
    assert not trace_log.handlers


@pytest.mark.slow
def test_structured_trace_in_a_file(tmp_path):
    script = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from test_pipeline import steps\nfrom rewrites import Rewrites\nsteps(Rewrites(), sizes=(1,))\n"
    )
    tests = str(Path(__file__).parent)
    done = subprocess.run(
        [sys.executable, "-c", script, tests], env={**os.environ, "TORCH_TRACE": str(tmp_path)},
        capture_output=True, text=True, check=False, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    log = "".join(p.read_text() for p in tmp_path.glob("*.log"))
    for name in DUMPED:
        assert name in log


def test_fusing_switched_off():
    on, off = Rewrites(), Rewrites(disable=["fuse_decode"])
    fused, plain = steps(on), steps(off)
    torch.testing.assert_close(fused, plain, rtol=1e-5, atol=1e-5)
    assert [count(gm, ops.DECODE) for gm in on.made] == [2, 2]
    assert [(count(gm, ops.DECODE), count(gm, ops.LOAD)) for gm in off.made] == [(0, 4)] * 2
    assert counters["xquant"]["fuse_decode"] == 4


def test_explain_knows_what_is_switched_off():
    model, ids = tiny("llama"), torch.arange(3, 12)[None]
    cache = XQuantCache(model.config, 32, CONFIG)
    with torch.no_grad():
        model(ids, past_key_values=cache)
    sites = explain(model, ids[:, :1], past_key_values=copy.deepcopy(cache), options={"disable": ["fuse_decode"]}).sites
    assert [s.dequantized for s in sites] == ["the pass fuse_decode is switched off"] * 2


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"disable": ["rewrite"]},
            r"disable must be a list of passes that may be off, \['fuse_decode', 'fold_rotation', 'pair_stores', "
            r"'linear_rows', 'one_call'\], got",
        ),
        ({"disable": "fuse_decode"}, "disable must be a list"),
        ({"disable": 3}, "disable must be a list"),
        ({"dump": 3}, "dump must be the path of a folder, got 3"),
    ],
)
def test_options_that_make_no_sense(options, words):
    with pytest.raises(ConfigError, match=words):
        parse(None, options)


def sabotaged(monkeypatch, name: str, change) -> None:
    """The pass ``name`` does its work, and ``change(gm, context)`` more."""

    def run(each):
        return lambda gm, context: (each.run(gm, context), change(gm, context))[0]

    passes = tuple(dataclasses.replace(p, run=run(p)) if p.name == name else p for p in PASSES)
    monkeypatch.setattr(pipeline, "PASSES", passes)


def first(gm, *targets):
    return next(node for node in gm.graph.nodes if node.target in targets)


def lose_an_input(gm, context):
    context.state.tensors.pop()


def swap_inputs(gm, context):
    a, b = gm.graph.find_nodes(op="placeholder")[:2]
    b.append(a)


def keep_a_buffer(gm, context):
    buffer = next(iter(context.state.nodes))
    kept = gm.graph.find_nodes(op="placeholder")[-1]
    kept.meta["example_value"] = buffer.meta["example_value"]
    context.state.nodes[kept] = {}


def lose_a_store(gm, context):
    gm.graph.erase_node(first(gm, *STORES))


def store_to_a_copy(gm, context):
    node = first(gm, *STORES)
    with gm.graph.inserting_before(node):
        copy = gm.graph.call_function(torch.clone, (node.kwargs["ring"],))
    node.kwargs = {**node.kwargs, "ring": copy}


def store_too_late(gm, context):
    load, store = first(gm, ops.LOAD), first(gm, *STORES)
    load.append(store)


def another_result(gm, context):
    output = gm.graph.output_node()
    with gm.graph.inserting_before(output):
        result = call(gm.graph, torch.Tensor.double, (output.args[0][0],))
    output.args = ((result, *output.args[0][1:]),)


def forget_a_fusion(gm, context):
    context.fused.popitem()


SABOTAGE = {
    "a stored tensor is not given": ("add_state_inputs", lose_an_input, "inputs were added, and"),
    "inputs in another order": ("add_state_inputs", swap_inputs, "no longer the first ones"),
    "a buffer is left": ("rewrite", keep_a_buffer, "still an input, a QuantizedKV"),
    "a store is lost": ("rewrite", lose_a_store, "appends were rewritten"),
    "a store is lost later": ("fuse_decode", lose_a_store, "appends were rewritten"),
    "what is stored is lost": ("rewrite", store_to_a_copy, "writes its ring to clone, which is no input"),
    "a load before its store": ("rewrite", store_too_late, "reads before"),
    "another dtype": ("fuse_decode", another_result, "result 0 is .*float64.*, in the program's graph"),
    "an attention is not fused": ("fuse_decode", forget_a_fusion, "no fused op has taken the place of"),
    "the last pass": ("verify", another_result, "result 0 is"),
}


@pytest.mark.parametrize("what", SABOTAGE)
def test_a_pass_that_does_wrong_is_named(what, monkeypatch):
    name, change, words = SABOTAGE[what]
    sabotaged(monkeypatch, name, change)
    with pytest.raises(BackendCompilerFailed, match=f"PassError: after the pass {name}: .*{words}"):
        steps(Rewrites(), sizes=(1,))


def test_every_pass_has_conditions_or_none_of_its_own():
    assert set(CONDITIONS) - {""} <= {each.name for each in PASSES}


def test_each_length_of_a_cache_is_an_input_of_its_own():
    """Layers of several windows, where Dynamo passes no lengths."""
    environment, graph = ShapeEnv(), Graph()
    sizes = [environment.create_unbacked_symint() for _ in range(2)]
    graph.placeholder("x").meta["example_value"] = torch.zeros(1)
    found = [input_of_size(graph, size) for size in (*sizes, sizes[0])]
    graph.output(tuple(node for node, _ in found))
    assert [added for _, added in found] == [True, True, False]
    assert GraphModule({}, graph)(torch.zeros(1), 3, 5) == (3, 5, 3)


def test_lengths_have_names_of_their_own_where_inputs_go():
    environment, graph = ShapeEnv(), Graph()
    dropped = graph.placeholder("x")
    graph.placeholder("y").meta["example_value"] = torch.zeros(1)
    first, _ = input_of_size(graph, environment.create_unbacked_symint())
    graph.erase_node(dropped)
    second, _ = input_of_size(graph, environment.create_unbacked_symint())
    graph.output((first, second))
    assert GraphModule({}, graph)(torch.zeros(1), 3, 5) == (3, 5)
