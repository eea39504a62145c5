"""What Dynamo is spared while it traces for this backend: the graph, and what it says of itself, are the same."""

from __future__ import annotations

import contextlib
import importlib
import logging
import sys
import time
import traceback
from typing import Any

import pytest
import torch
from stepping import interpreted
from torch import Tensor, nn
from torch._dynamo import config, guards, output_graph, symbolic_convert, utils
from torch._dynamo.utils import compilation_time_metrics, counters
from torch._dynamo.variables.builder import VariableBuilder
from torch._dynamo.variables.higher_order_ops import LocalMapWrappedHigherOrderVariable
from torch.fx import GraphModule
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from xquant_fx import XQuantCache, xquant_backend
from xquant_fx.cache.growing import GrowingKV
from xquant_fx.compiler import tracing_shortcuts
from xquant_fx.compiler.tracing_shortcuts import _with_classes_once, shortcuts
from xquant_fx.compiler.tracing_time import watch_tracing

SMALL = dict(
    vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
    max_position_embeddings=32,
)  # fmt: skip


def down(x: Tensor, times: int) -> Tensor:
    return down(x + 1, times - 1) if times else (x * 2) + (x * 3)  # two columns of one line


class Deep(nn.Module):
    """Frames that repeat, some more often than Python shows, and one of torch.nn.modules."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.Sequential(nn.Linear(4, 4), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return down(self.parts(x), 2) + down(x, 6)


def told(model: nn.Module, *args: Any, spared: bool) -> list[tuple[str, str]]:
    """Name and stack trace of each node."""
    torch._dynamo.reset()
    found: list[tuple[str, str]] = []

    def backend(gm: Any, inputs: Any) -> Any:
        found.extend((node.name, node.stack_trace) for node in gm.graph.nodes if node.op != "placeholder")
        return gm.forward

    with torch.no_grad():
        if spared:
            with shortcuts():
                torch.compile(model, backend=backend)(*args)
        else:
            torch.compile(model, backend=backend)(*args)
    return found


@pytest.mark.parametrize("model", ["llama", "deep"])
def test_stack_traces_are_the_same(model: str) -> None:
    made = Deep() if model == "deep" else LlamaForCausalLM(LlamaConfig(**SMALL)).eval()
    given = torch.ones(2, 4) if model == "deep" else torch.ones(1, 4, dtype=torch.long)
    spared, whole = (told(made, given, spared=each) for each in (True, False))
    assert spared == whole and any(text.count("File") > 2 for _, text in whole)
    if model == "deep":
        assert any("more time" in text for _, text in whole)


def test_everything_is_put_back() -> None:
    translator = symbolic_convert.InstructionTranslatorBase

    def replaced() -> tuple[Any, ...]:
        kept = (symbolic_convert.get_funcname, translator.is_co_filename_from_nn_modules, VariableBuilder._wrap)
        values = (utils._get_fake_value_impl, VariableBuilder.wrap_symfloat)
        values = (*values, vars(LocalMapWrappedHigherOrderVariable)["should_wrap_in_hop"])
        return (*kept, guards.profile_guard_manager, *values, {**vars(config)}, type(config).__setattr__)

    before = replaced()
    with pytest.raises(KeyError), shortcuts():
        assert output_graph.traceback is not traceback and "verbose" in vars(config) and config.verbose is False
        assert all(now is not then for now, then in zip(replaced()[:7], before[:7], strict=True))
        raise KeyError
    assert replaced() == before and output_graph.traceback is traceback and "verbose" not in vars(config)
    assert output_graph.fx is torch.fx


@pytest.mark.parametrize("shown", [False, True])
def test_guards_are_timed_without_emptying_the_caches(shown: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """But for a log that shows for how long; metrics have a number in any case."""
    emptied, whole = [], guards.profile_guard_manager
    monkeypatch.setattr(guards, "profile_guard_manager", lambda *args: (emptied.append(1), whole(*args))[1])
    logging.getLogger("torch._dynamo.guards.__guards").setLevel(logging.DEBUG if shown else logging.NOTSET)
    try:
        told(Deep(), torch.ones(2, 4), spared=True)
    finally:
        logging.getLogger("torch._dynamo.guards.__guards").setLevel(logging.NOTSET)
    assert len(emptied) == shown
    told(Deep(), torch.ones(2, 4), spared=False)
    assert len(emptied) == 1 + shown


def test_the_time_of_guards_is_theirs() -> None:
    class Guards:
        def check(self, scope: dict[str, int]) -> bool:
            time.sleep(scope["seconds"])
            return True

    assert 1e4 <= tracing_shortcuts._time_of_guards(Guards(), {"seconds": 0.01}, 2) < 1e6


@pytest.mark.parametrize("spared", [True, False])
def test_no_code_is_written_for_a_module_that_is_not_run(spared: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """That of the graph itself is written when it runs."""
    written, whole = [], GraphModule.recompile
    monkeypatch.setattr(GraphModule, "recompile", lambda self: (written.append(type(self).__name__), whole(self))[1])
    told(Deep(), torch.ones(2, 4), spared=spared)
    assert len(written) == 1 + (not spared)
    with shortcuts():
        made = output_graph.fx.GraphModule({}, torch.fx.Graph())
        assert isinstance(made, torch.fx.GraphModule) and isinstance(made, output_graph.fx.GraphModule)
        assert not isinstance(torch.nn.Module(), output_graph.fx.GraphModule)


def test_local_map_is_not_imported_to_ask_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """But where somebody did, Dynamo finds it."""
    name = "torch.distributed.tensor.experimental._func_map"
    local_map, asked = importlib.import_module(name)._local_map_wrapped, LocalMapWrappedHigherOrderVariable
    with shortcuts(), asked.enable():
        assert asked.should_wrap_in_hop(local_map) and not asked.should_wrap_in_hop(down)
    monkeypatch.delitem(sys.modules, name)
    told(Deep(), torch.ones(2, 4), spared=True)
    assert name not in sys.modules


def test_a_verbose_config_stays_so() -> None:
    with config.patch(verbose=True):
        with shortcuts():
            assert config.verbose is True
        assert config.verbose is True
    assert config.verbose is False


def test_settings_that_change_in_a_trace_are_seen() -> None:
    with shortcuts():
        with config.patch(nested_graph_breaks=True):
            assert config.nested_graph_breaks is True
        assert config.nested_graph_breaks is False
    assert config.nested_graph_breaks is False


def test_classes_of_wrap_are_made_once() -> None:
    made: list[type] = []

    def make(numbers: list[int]) -> type:
        class Inner:
            first = numbers

        made.append(Inner)
        return Inner

    once = _with_classes_once(make)
    assert once([1]) is once([2]) and len(made) == 2 and make([1]) is not make([1]) and once is not make


def test_what_a_torch_does_not_have_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(symbolic_convert, "get_funcname")
    with shortcuts():
        assert not hasattr(symbolic_convert, "get_funcname")
    assert not hasattr(symbolic_convert, "get_funcname")


class Scaled(nn.Module):
    """With a number of its own, and one that it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.eps = 0.5

    def forward(self, x: Tensor, times: float) -> Tensor:
        return (x + self.eps) * times


@pytest.mark.parametrize("spared", [True, False])
def test_numbers_of_modules_are_constants_until_they_change(spared: bool) -> None:
    """Under dynamic=True; those that are passed in are open, as they are without us."""
    torch._dynamo.reset()
    model, made = Scaled(), []

    def backend(gm: Any, inputs: Any) -> Any:
        made.append(sum("eps" in node.name for node in gm.graph.find_nodes(op="placeholder")))
        return gm.forward

    step, seen = torch.compile(model, backend=backend, dynamic=True), []
    with shortcuts() if spared else contextlib.nullcontext():
        for eps, times in ((0.5, 2.0), (0.5, 3.0), (0.25, 3.0), (0.125, 4.0), (0.5, 2.0)):
            model.eps, x = eps, torch.randn(3, 2 + len(seen))
            assert torch.equal(step(x, times), (x + eps) * times)
            seen.append(list(made))
    assert seen == ([[0], [0], [0, 1], [0, 1], [0, 1]] if spared else [[1]] * 5)


def test_a_step_of_open_sizes_is_fused_in_a_cache_that_grows() -> None:
    """The scale of its logits is a number of the model's."""
    torch._dynamo.reset()
    counters.clear()
    model, ids = LlamaForCausalLM(LlamaConfig(**SMALL)).eval(), torch.ones(1, 9).long()
    step, cache = torch.compile(model.forward, backend=interpreted(), dynamic=True), DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids, past_key_values=cache)
        for _ in range(2):
            step(ids[:, :1], past_key_values=cache)
    assert all(isinstance(layer.keys, GrowingKV) for layer in cache.layers)
    assert counters["xquant"]["fuse_decode"] == 2


def test_a_model_of_open_sizes_is_traced_once() -> None:
    """Otherwise Dynamo makes inputs of numbers that can be none, and begins anew without those."""
    torch._dynamo.reset()
    watch_tracing(xquant_backend)  # which the reset forgot
    compilation_time_metrics.clear()
    model = LlamaForCausalLM(LlamaConfig(**{**SMALL, "num_hidden_layers": 1})).eval()
    step, ids, made = torch.compile(model.forward, backend="xquant", dynamic=True), torch.ones(1, 9).long(), []
    with torch.no_grad():
        for length in (16, 24):
            cache, other = (XQuantCache(model.config, length) for _ in range(2))
            for each in (cache, other):
                model(ids, past_key_values=each)
            got, want = (f(ids[:, :1], past_key_values=c).logits for f, c in ((step, cache), (model, other)))
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
            made.append(len(compilation_time_metrics["bytecode_tracing"]))
    assert made == [1, 1]
