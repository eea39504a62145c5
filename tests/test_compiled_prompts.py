"""``compile_prompts``: what lies between attentions of prompts and chunks is compiled, once for all lengths."""

from __future__ import annotations

import logging
import operator
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from dynamo_graphs import SMALL
from fast_and_slow import fast_but
from numeric import seeded
from stepping import interpreted, relative_error
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.fx import Graph, Node
from torch.nn.functional import scaled_dot_product_attention, silu
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache

from xquant_fx import XQuantCache, XQuantConfig
from xquant_fx.cache.growing import GrowingKV
from xquant_fx.compiler import compiled_prompts, untraced
from xquant_fx.compiler.stretches import returned, stretches_of, why_none
from xquant_fx.errors import ConfigError

CONFIG = XQuantConfig.preset("xquant-2.2").replace(k_group_size=4, residual_length=4)
FIELDS = dict(k_group_size=4, residual_length=4)
LAYERS = 3
#: Tokens of prompts and of chunks, and room in the cache, of the last of which Dynamo leaves the length open.
CHATS = [(20, 18, 96), (33, 12, 96), (26, 15, 160)]
CACHES = {
    "XQuantCache": lambda config: XQuantCache(config, max_cache_len=96, config=CONFIG),
    "DynamicCache": lambda config: DynamicCache(config=config),
}


def model_of(**fields: Any) -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**SMALL, "num_hidden_layers": LAYERS, **fields})).eval()


def ids_of(tokens: int, batch: int = 1) -> Tensor:
    return torch.randint(3, 64, (batch, tokens), generator=seeded(tokens))


@pytest.fixture
def own_backends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(untraced, "_backends", [])
    monkeypatch.setattr(untraced, "_misjudged", weakref.WeakSet())


@pytest.fixture(autouse=True)
def counted() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield


def compiled_by(backend: Any, model: Any, **options: Any) -> Any:
    return torch.compile(model.forward, backend=backend, options=options or None)


def op_by_op(**options: Any) -> Any:
    backend = interpreted(self_check=False, compile_prompts=True, **FIELDS, **options)
    untraced.leave_prompts_untraced(backend, backend.asked)
    return backend


@torch.no_grad()
def logits(step: Any, ids: Tensor, cache: Any) -> Tensor:
    return step(ids, past_key_values=cache).logits


@pytest.mark.parametrize("kind", CACHES)
def test_all_lengths_of_prompts_have_one_graph_and_equal_layers_one_function(kind: str, own_backends: None) -> None:
    model = model_of()
    step = compiled_by(op_by_op(), model)
    for tokens in (20, 33, 12):
        mine, theirs = CACHES[kind](model.config), XQuantCache(model.config, max_cache_len=96, config=CONFIG)
        out, expected = logits(step, ids_of(tokens), mine), logits(model, ids_of(tokens), theirs)
        torch.testing.assert_close(out, expected)
        assert counters["stats"]["unique_graphs"] == 1
    # before the first attention, between two, behind the last
    assert counters["xquant"]["stretches of prompts"] == LAYERS + 1
    assert counters["xquant"]["stretches of prompts compiled"] == 3
    if kind == "DynamicCache":
        assert all(isinstance(layer.keys, GrowingKV) for layer in mine.layers)


def test_a_prompt_is_stored_as_by_a_graph_that_runs_op_by_op(own_backends: None) -> None:
    model, traced = model_of(), interpreted(self_check=False, **FIELDS)
    caches = [CACHES["XQuantCache"](model.config) for _ in range(2)]
    for backend, cache in zip((op_by_op(), traced), caches, strict=True):
        torch._dynamo.reset()
        logits(compiled_by(backend, model), ids_of(20), cache)
    assert counters["xquant"]["stretches of prompts"]
    for mine, theirs in zip(*(cache.states for cache in caches), strict=True):
        for name, tensor in theirs.owned.items():
            torch.testing.assert_close(mine.owned[name], tensor)


def chat(step: Any, plain: Any, mine: Any, theirs: Any, first: int, turn: int) -> int:
    """A prompt of ``first`` tokens, a step, a chunk, a step; how many graphs there are for ``step``."""
    ids, at = ids_of(first + turn + 2), 0
    for tokens in (first, 1, turn, 1):
        out = logits(step, ids[:, at : at + tokens], mine)
        traced = counters["stats"]["unique_graphs"]
        expected = logits(plain, ids[:, at : at + tokens], theirs)
        counters["stats"]["unique_graphs"] = traced
        assert relative_error(out, expected) < 1e-5
        at += tokens
    return int(counters["stats"]["unique_graphs"])


@pytest.mark.parametrize("chats", fast_but([CHATS[:2], CHATS], [CHATS]), ids=["one length", "another"])
def test_a_chat_by_inductor(chats: list[tuple[int, int, int]]) -> None:
    model = model_of(num_hidden_layers=2)
    step = compiled_by("xquant", model, compile_prompts=True, **FIELDS)
    graphs = []
    for first, turn, room in chats:
        caches = (XQuantCache(model.config, max_cache_len=room, config=CONFIG) for _ in range(2))
        graphs.append(chat(step, model, *caches, first, turn))
    assert graphs == [3, 3, 6][: len(chats)]


def test_a_number_that_the_program_passes_in() -> None:
    """The last ops are given minus that many: what is compiled is told the number itself."""
    model = model_of(num_hidden_layers=1)
    step = compiled_by("xquant", model, compile_prompts=True, **FIELDS)
    for tokens, keep in ((20, 5), (21, 7), (22, 9)):
        caches = (CACHES["XQuantCache"](model.config) for _ in range(2))
        with torch.no_grad():
            out, expected = (
                each(ids_of(tokens), past_key_values=cache, logits_to_keep=keep).logits
                for each, cache in zip((step, model), caches, strict=True)
            )
        torch.testing.assert_close(out, expected)
    assert counters["stats"]["unique_graphs"] == 2 and counters["xquant"]["stretches of prompts"] == 4


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*CACHES, "StaticCache"])
def test_turns_of_a_chat_by_inductor(kind: str) -> None:
    """Prompt, step, chunk, step, by Inductor; of other lengths nothing is traced or compiled again."""
    model, made = model_of(), {**CACHES, "StaticCache": lambda config: StaticCache(config, max_cache_len=96)}
    step, plain = (compiled_by("xquant", model, compile_prompts=each, **FIELDS) for each in (True, False))
    graphs = [
        chat(step, plain, made[kind](model.config), made[kind](model.config), first, turn)
        for first, turn in ((20, 18), (33, 12), (26, 15))
    ]
    assert graphs[-1] == graphs[-2]
    if kind != "StaticCache":  # whose prompts are plain graphs, which Inductor gets whole
        assert counters["xquant"]["stretches of prompts compiled"] == 6


def test_prompts_run_uncompiled_unless_it_is_asked_for(own_backends: None) -> None:
    model = model_of()
    backend = interpreted(self_check=False, **FIELDS)
    untraced.leave_prompts_untraced(backend, backend.asked)
    logits(compiled_by(backend, model), ids_of(20), CACHES["XQuantCache"](model.config))
    assert not counters["stats"]["unique_graphs"]


def test_a_short_prompt_is_left_as_it_was(own_backends: None) -> None:
    model = model_of()
    logits(compiled_by(op_by_op(), model), ids_of(5), CACHES["XQuantCache"](model.config))
    assert not counters["stats"]["unique_graphs"]


def test_attention_that_is_written_out(own_backends: None) -> None:
    """Of a first prompt it reads ordinary tensors, and is compiled with the rest; queries are noted all the same."""
    model = model_of(attn_implementation="eager")
    mine, theirs = (CACHES["XQuantCache"](model.config) for _ in range(2))
    out = logits(compiled_by(op_by_op(), model), ids_of(20), mine)
    torch.testing.assert_close(out, logits(model, ids_of(20), theirs))
    assert counters["xquant"]["stretches of prompts"]
    for stored, reference in zip(mine.states, theirs.states, strict=True):
        if "energy" in reference.owned:
            torch.testing.assert_close(stored.owned["energy"], reference.owned["energy"])


def test_under_autocast_nothing_is_compiled(own_backends: None, caplog: pytest.LogCaptureFixture) -> None:
    """Nodes between would be compiled as if it were not there."""
    model = model_of()

    def step(ids: Tensor, past_key_values: Any) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return model(ids, past_key_values=past_key_values)

    mine = torch.compile(step, backend=op_by_op())
    caches = [CACHES["XQuantCache"](model.config) for _ in range(2)]
    expected = logits(step, ids_of(20), caches[1])
    out = logits(mine, ids_of(20), caches[0])
    told = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert [each for each in told if "nothing of a prompt is compiled: _enter_autocast changes" in each]
    torch.testing.assert_close(out, expected)
    assert not counters["xquant"]["stretches of prompts"]


def test_the_option_is_checked() -> None:
    with pytest.raises(Exception, match="compile_prompts must be True or False, got 1") as caught:
        logits(compiled_by("xquant", model := model_of(), compile_prompts=1), ids_of(20), DynamicCache())
    assert isinstance(caught.value, ConfigError) or "ConfigError" in str(caught.value)
    del model


def test_a_kernel_may_lay_out_what_it_gives_otherwise_than_its_graph_has_it() -> None:
    order = compiled_prompts._order(torch.empty(2, 3, 5, 4).transpose(1, 2))
    assert order == (0, 2, 1, 3)
    given = torch.randn(2, 3, 5, 4).transpose(1, 2).contiguous()
    laid_out = compiled_prompts._laid_out(given, order)
    assert laid_out.stride() == torch.empty(2, 3, 5, 4).transpose(1, 2).stride()
    torch.testing.assert_close(laid_out, given)
    assert compiled_prompts._laid_out(laid_out, order) is laid_out


class Drawn:
    """A graph with ``x`` [2, 6] and ``cache`` [2, 6], its nodes with values."""

    def __init__(self) -> None:
        self.graph = Graph()
        self.x, self.cache = (self._valued(self.graph.placeholder(name), torch.randn(2, 6)) for name in ("x", "cache"))

    def call(self, target: Any, *args: Any, **kwargs: Any) -> Node:
        values = torch.fx.node.map_arg((args, kwargs), lambda node: node.meta["example_value"])
        if isinstance(target, str):
            return self._valued(
                self.graph.call_method(target, args, kwargs), getattr(values[0][0], target)(*values[0][1:])
            )
        return self._valued(self.graph.call_function(target, args, kwargs), target(*values[0], **values[1]))

    @staticmethod
    def _valued(node: Node, value: Any) -> Node:
        node.meta["example_value"] = value
        return node

    def chain(self, x: Node, ops: int = 4) -> Node:
        for _ in range(ops):
            x = self.call(silu, x)
        return x

    def stretches(self, *read_by: Node, out: Node) -> list[list[Node]]:
        self.graph.output((out,))
        return [piece.nodes for piece in stretches_of(self.graph, [self.cache], read_by)]


def unknown(x: Tensor) -> Tensor:
    return x * 2


def test_what_reads_a_cache_is_left_and_what_its_attention_gives_is_not() -> None:
    drawn = Drawn()
    first = drawn.chain(drawn.x)
    view = drawn.call("view", drawn.cache, 2, 6)
    read = drawn.call(torch.mul, view, first)
    last = drawn.chain(read)
    found = drawn.stretches(read, out=last)
    assert [returned(stretch) for stretch in found] == [[first], [last]]
    assert not any(node in stretch for node in (view, read) for stretch in found)


def test_what_comes_of_a_cache_by_no_attention_is_left() -> None:
    drawn = Drawn()
    last = drawn.chain(drawn.call(torch.mul, drawn.cache, 2))
    assert not drawn.stretches(out=last)


@pytest.mark.parametrize("odd", [unknown, scaled_dot_product_attention, torch.Tensor.add_])
def test_what_is_no_op_or_writes_is_left(odd: Any) -> None:
    drawn = Drawn()
    first = drawn.chain(drawn.x)
    args = (first,) * 3 if odd is scaled_dot_product_attention else (first, 1) if odd is not unknown else (first,)
    between = drawn.call("add_" if odd is torch.Tensor.add_ else odd, *args)
    last = drawn.chain(between)
    found = [node for stretch in drawn.stretches(out=last) for node in stretch]
    assert between not in found
    assert (first in found) == (odd is not torch.Tensor.add_)  # which is written to behind


def test_few_ops_and_views_are_left() -> None:
    drawn = Drawn()
    last = drawn.chain(drawn.x, 3)
    for _ in range(4):
        last = drawn.call("view", last, 2, 6)
    assert not drawn.stretches(out=last)


def test_numbers_do_not_end_a_stretch_unless_they_follow_from_it() -> None:
    for follows, stretches in ((False, 1), (True, 2)):
        drawn = Drawn()
        middle = drawn.chain(drawn.x)
        rows = drawn.call(operator.getitem, drawn.call("size", middle if follows else drawn.x), 0)
        last = drawn.chain(drawn.call(torch.mul, middle, rows))
        assert len(drawn.stretches(out=last)) == stretches


def test_equal_stretches_of_other_shapes_differ() -> None:
    drawn = Drawn()
    halves = [drawn.call(operator.getitem, drawn.x, (slice(None), slice(width))) for width in (3, 3, 2)]
    ends = [drawn.chain(half, 5) for half in halves]
    drawn.graph.output(tuple(ends))
    readers = [next(iter(half.users)) for half in halves]
    forms = [piece.form for piece in stretches_of(drawn.graph, halves, readers)]
    assert len(forms) == 3 and forms[0] == forms[1] != forms[2]


def test_a_graph_that_changes_how_ops_run_is_left() -> None:
    graph = Graph()
    graph.call_function(torch.amp.autocast_mode._enter_autocast, ("cpu", torch.bfloat16, True, None))
    assert "changes what the ops behind it mean" in why_none(graph)
    assert not why_none(Drawn().graph)


class Plain(nn.Module):
    """Neither cache nor attention."""

    def forward(self, x: Tensor) -> Tensor:
        return silu(x) * 2


def test_what_has_no_cache_is_compiled_as_ever() -> None:
    x = torch.randn(2, 20)
    torch.testing.assert_close(torch.compile(Plain(), backend=interpreted(compile_prompts=True))(x), Plain()(x))
