"""First prompts and chunks of quantized caches run without Dynamo having traced them, and nothing else does."""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from dynamo_graphs import SMALL
from numeric import seeded
from stepping import interpreted, relative_error
from torch import Tensor, nn
from torch._dynamo import eval_frame
from torch._dynamo.utils import counters
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache

from xquant_fx import XQuantCache, XQuantConfig
from xquant_fx.compiler import untraced
from xquant_fx.kernels.cpu.at_hand import are_wanted, wanted

CONFIG = XQuantConfig.preset("xquant-2.2").replace(k_group_size=4, residual_length=4)
OPTIONS = dict(k_group_size=4, residual_length=4)


def ids_of(tokens: int, batch: int = 1) -> Tensor:
    return torch.randint(3, 64, (batch, tokens), generator=seeded(tokens))


def one() -> Tensor:
    return torch.ones(1, 1, dtype=torch.long)


class Run:
    """A model whose calls are compiled by a backend that leaves prompts untraced, and what came of it."""

    def __init__(self, **compiled: Any) -> None:
        torch.manual_seed(0)
        self.model = LlamaForCausalLM(LlamaConfig(**SMALL)).eval()
        self.backend = interpreted(self_check=False, **OPTIONS)
        untraced.leave_prompts_untraced(self.backend, self.backend.asked)
        self.call = torch.compile(self.model.forward, backend=self.backend, **compiled)
        counters.clear()

    def cache(self, length: int = 64) -> XQuantCache:
        return XQuantCache(self.model.config, max_cache_len=length, config=CONFIG)

    @torch.no_grad()
    def __call__(self, ids: Tensor, cache: Any) -> Tensor:
        return self.call(ids, past_key_values=cache).logits

    @property
    def traced(self) -> int:
        """Graphs that Dynamo has made."""
        return counters["stats"]["unique_graphs"]


@pytest.fixture(autouse=True)
def own_backends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(untraced, "_backends", [])
    monkeypatch.setattr(untraced, "_misjudged", weakref.WeakSet())


@pytest.fixture
def run() -> Run:
    return Run()


def test_prompts_of_any_length_are_not_traced(run):
    """Neither those of new caches nor of emptied ones; one graph serves all their steps."""
    cache = run.cache()
    for tokens in (5, 11, 7, 30):
        cache.reset()
        run(ids_of(tokens), cache)
        assert run.traced == (tokens != 5)
        run(one(), cache), run(one(), cache)
    other = run.cache()
    run(ids_of(9), other), run(one(), other)
    assert run.traced == 1 and other.get_seq_length() == 10


def test_prompts_give_what_uncompiled_ones_give(run):
    """By the same kernels, also with ranked keys, which must have seen the queries."""
    ids = ids_of(40)
    caches = [run.cache(), run.cache()]
    mine = run(ids, caches[0])
    with torch.no_grad(), wanted():
        theirs = run.model(ids, past_key_values=caches[1]).logits
    assert torch.equal(mine, theirs)
    mine, theirs = (cache.state_dict() for cache in caches)
    written = [name for name in mine if name.split(".")[-1] in ("codes", "order", "center", "energy", "norm")]
    assert len(written) == 12 and all(torch.equal(mine[name], theirs[name]) for name in written)


def test_generate_traces_steps_alone(run):
    run.model.compile(backend=run.backend)
    texts = []
    for tokens in (5, 12, 9):
        cache = run.cache()
        settings = dict(max_new_tokens=4, do_sample=False, eos_token_id=None)
        texts.append(run.model.generate(ids_of(tokens), past_key_values=cache, **settings))
    assert run.traced == 1 and [text.shape[1] for text in texts] == [9, 16, 13]


def test_fullgraph_traces_everything():
    run = Run(fullgraph=True)
    cache = run.cache()
    run(ids_of(5), cache)
    assert run.traced == 1
    run(one(), cache), run(ids_of(12), cache)
    assert run.traced == 3


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (XQuantCache, {True: 2, False: 4}),  # steps of one token and of two; when traced, prompts and chunks
        # When traced, what comes behind what is taken over is traced once more.
        pytest.param(StaticCache, {True: 2, False: 5}, marks=pytest.mark.slow),
        (DynamicCache, {True: 2, False: 4}),
    ],
)
def test_chunks_are_not_traced(run, make, expected, monkeypatch):
    """Turns of a chat, of any number of tokens: they give what traced ones give, which run uncompiled, too."""
    turns = (ids_of(20), one(), one(), ids_of(11), one(), ids_of(9), ids_of(2), one())
    room = {XQuantCache: dict(max_cache_len=64, config=CONFIG), StaticCache: dict(max_cache_len=64)}.get(make, {})
    outs = []
    for left in (True, False):
        torch._dynamo.reset()
        run.call = torch.compile(run.model.forward, backend=run.backend)
        monkeypatch.setattr(untraced, "_backends", [(run.backend, run.backend.asked)] * left)
        cache = make(config=run.model.config, **room) if make is DynamicCache else make(run.model.config, **room)
        counters.clear()
        outs.append([run(ids, cache) for ids in turns])
        assert cache.get_seq_length() == 46 and run.traced == expected[left]
    assert all(relative_error(*pair) < 1e-5 for pair in zip(*outs, strict=True))


def test_chunks_of_one_number_are_not_traced_either(run):
    """However many come in a row: that would gain less than it takes."""
    cache = run.cache(512)
    run(ids_of(16), cache)
    for _ in range(20):
        run(ids_of(16), cache)
    assert not run.traced and cache.get_seq_length() == 336


class Reversed(nn.Module):
    """Takes ids [q, B] after a table that is no tokens at all."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, table: Tensor, ids: Tensor, cache: Any) -> Tensor:
        return self.model(ids.mT, past_key_values=cache).logits + table.sum()


@torch.no_grad()
def test_a_wrong_guess_costs_one_uncompiled_step(run):
    """The first argument has 12 columns, and the step one token."""
    model = Reversed(run.model)
    call = torch.compile(model, backend=run.backend)
    cache, table = run.cache(), torch.zeros(3, 12)
    call(table, ids_of(20).mT, cache)
    call(table, one(), cache)
    assert not run.traced
    for _ in range(3):
        call(table, one(), cache)
    assert run.traced == 1 and cache.get_seq_length() == 24
    other = run.cache()
    run(ids_of(20), other)
    call(table, one(), other)
    assert run.traced == 1


@torch.no_grad()
def test_layers_compiled_one_by_one_bring_their_prompts_untraced(run):
    for layer in run.model.model.layers:
        layer.forward = torch.compile(layer.forward, backend=run.backend)
    cache = run.cache(256)
    run.model(ids_of(20), past_key_values=cache)
    for _ in range(9):
        run.model(ids_of(12), past_key_values=cache)
    assert not run.traced
    for _ in range(3):
        run.model(one(), past_key_values=cache)
    assert 0 < run.traced <= len(run.model.model.layers)


class Early(nn.Module):
    """Writes to the first layer of a cache alone."""

    def forward(self, x: Tensor, cache: Any) -> Tensor:
        return cache.update(x, x, 0)[0].sum()


@torch.no_grad()
def test_a_model_whose_last_layer_stays_empty_is_traced_from_the_third_call_on(run):
    call, cache = torch.compile(Early(), backend=run.backend), run.cache()
    heads = run.model.config.num_key_value_heads
    for times, expected in enumerate((0, 0, 1)):
        call(torch.randn(1, heads, 1 if times else 12, 8), cache)
        assert run.traced == expected


@torch.no_grad()
def test_a_prompt_that_failed_is_no_reason_to_trace_the_next(run):
    with pytest.raises(IndexError):
        run(ids_of(5) + 1000, run.cache())
    run(ids_of(5), run.cache())
    assert not run.traced


@pytest.mark.parametrize("begin", [12, 0], ids=["behind a prompt", "from nothing on"])
@torch.no_grad()
def test_a_compiled_loop_is_found_out(run, begin):
    """Its first call runs uncompiled, which none of its steps must later, whatever cache it is given."""

    def loop(ids: Tensor, past_key_values: Any) -> Tensor:
        out = run.model(ids, past_key_values=past_key_values).logits
        for _ in range(3):
            out = run.model(one(), past_key_values=past_key_values).logits
        return out

    call = torch.compile(loop, backend=run.backend)
    for times in range(3):
        cache = run.cache()
        if begin:
            run.model(ids_of(begin), past_key_values=cache)
        out = call(ids_of(20), cache)
        expected = run.cache()
        if begin:
            run.model(ids_of(begin), past_key_values=expected)
        assert relative_error(out, loop(ids_of(20), expected)) < 1e-4
        assert bool(run.traced) == bool(times)


@torch.no_grad()
def test_what_only_reads_a_cache_is_traced_from_the_second_call_on(run):
    call, cache = torch.compile(lambda x, cache: x * 2, backend=run.backend), run.cache()
    run(ids_of(20), cache)
    for times in range(3):
        call(torch.ones(1, 300, 4), cache)
        assert run.traced == bool(times)


@torch.no_grad()
def test_functions_inside_of_one_that_is_left_untraced(run):
    for layer in run.model.model.layers:
        layer.forward = torch.compile(layer.forward, backend=run.backend)
    cache = run.cache(256)
    run(ids_of(20), cache)
    for _ in range(5):
        run(ids_of(12), cache)
    assert not run.traced


@torch.no_grad()
def test_kernels_are_wanted_inside_and_no_longer(run):
    seen = []

    def look(ids: Tensor, cache: Any, fail: bool = False) -> None:
        seen.append(are_wanted())
        run.model(ids, past_key_values=cache)
        if fail:
            raise KeyError("on purpose")

    call = torch.compile(look, backend=run.backend)
    call(ids_of(5), run.cache())
    assert seen == [True] and not are_wanted()
    with pytest.raises(KeyError):
        call(ids_of(5), run.cache(), fail=True)
    assert seen == [True, True] and not are_wanted() and not run.traced


def test_other_backends_trace_prompts(run):
    call = torch.compile(run.model.forward, backend="eager")
    call(ids_of(5), past_key_values=DynamicCache(config=run.model.config))
    assert run.traced == 1


class Proxy(Mapping[str, Any]):
    """What a frame has for local variables from Python 3.13 on: its keys are a list."""

    def __init__(self, variables: Mapping[str, Any]) -> None:
        self.variables = variables

    def __getitem__(self, name: str) -> Any:
        return self.variables[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.variables)

    def __len__(self) -> int:
        return len(self.variables)

    def keys(self) -> Any:
        return list(self.variables)


def test_variables_as_python_3_13_has_them(run, monkeypatch):
    asked = untraced._is_left_untraced
    monkeypatch.setattr(untraced, "_is_left_untraced", lambda call, by: asked(Proxy(call), by))
    cache = run.cache()
    run(ids_of(5), cache)
    assert not run.traced
    run(one(), cache)
    assert run.traced == 1


def test_a_stance_that_forces_another_backend_holds(run):
    with torch.compiler.set_stance("default", force_backend="eager"):
        run(ids_of(5), DynamicCache(config=run.model.config))
        assert run.traced == 1


def test_stances_hold(run):
    cache = run.cache()
    with torch.compiler.set_stance("fail_on_recompile"):
        run(ids_of(5), cache)  # a prompt is no recompilation
        with pytest.raises(RuntimeError, match="recompile"):
            run(one(), cache)
    with torch.compiler.set_stance("force_eager"):
        run(one(), cache)
    assert not run.traced


def test_what_torch_no_longer_tells_is_traced(run, monkeypatch):
    """A torch whose ``compile_wrapper`` has other variables."""
    asked = untraced._is_left_untraced
    monkeypatch.setattr(
        untraced, "_is_left_untraced", lambda call, by: asked({k: call[k] for k in call if k != "cleanups"}, by)
    )
    run(ids_of(5), run.cache())
    assert run.traced == 1


def test_torch_still_has_what_is_relied_on(run, monkeypatch):
    seen = []
    monkeypatch.setattr(untraced, "_is_left_untraced", lambda call, by: seen.append(dict(call)))
    run(ids_of(5), run.cache())
    assert len(seen) == 1 and seen[0].keys() >= {"self", "args", "kwargs", "cleanups"}
    assert type(seen[0]["cleanups"]) is list and seen[0]["self"].fullgraph is False
    assert vars(eval_frame)["_callback_from_stance"].__wrapped__


def test_threads_do_not_disturb_each_other(run):
    """One thread's prompts are untraced while another's steps are compiled."""
    caches = [run.cache() for _ in range(4)]
    failed: list[BaseException] = []

    def talk(cache: XQuantCache, tokens: int) -> None:
        try:
            run(ids_of(tokens), cache)
            for _ in range(4):
                run(one(), cache)
        except BaseException as error:
            failed.append(error)

    talk(caches[0], 5)
    threads = [threading.Thread(target=talk, args=(cache, 6 + i)) for i, cache in enumerate(caches[1:])]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed and [cache.get_seq_length() for cache in caches] == [9, 10, 11, 12]
    assert not are_wanted() and run.traced <= 4  # each thread has frames of its own


def test_the_log_tells(run, caplog):
    with caplog.at_level(logging.INFO, logger="xquant_fx"):
        run(ids_of(5), run.cache())
    assert "not traced" in caplog.text


def test_steps_are_the_same_behind_either_prompt(run):
    """A traced prompt, and one that was not: what later steps read differs by rounding."""
    ids, outs = ids_of(24), []
    for fullgraph in (False, True):
        torch._dynamo.reset()
        run.call = torch.compile(run.model.forward, backend=run.backend, fullgraph=fullgraph)
        cache = run.cache()
        outs.append(torch.cat([run(ids, cache), *[run(one(), cache) for _ in range(12)]], 1))
    assert relative_error(*outs) < 1e-5
