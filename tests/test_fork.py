"""Caches that share memory: whatever is done to one, all hold what deep copies would."""

from __future__ import annotations

import copy
import gc
import logging
import pickle
import random
import re
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from plain_decoder import Decoder
from stepping import interpreted, logits_of
from torch import Tensor
from transformers import LlamaConfig

import xquant_fx.cache.fork as forking
import xquant_fx.warn_once as warn_once
from xquant_fx import CacheStateError, XQuantCache, XQuantConfig, memory_report
from xquant_fx.cache.pages import LEAST, is_shared, why_not

RANKED = XQuantConfig(k_group_size=32, residual_length=32)
CONFIGS = {"ranked": RANKED, "pairs": XQuantConfig.preset("xquant").replace(k_group_size=32, residual_length=32)}
ROOM = 2048
IDS = torch.randint(1, 128, (2, 400), generator=torch.Generator().manual_seed(7))
ON_LINUX = pytest.mark.skipif(sys.platform != "linux", reason="memory is shared on Linux alone")


@pytest.fixture
def model() -> Any:
    return Decoder().eval()


def filled(model: Any, config: XQuantConfig = RANKED, tokens: int = 300) -> XQuantCache:
    cache = XQuantCache(model.config, ROOM, config)
    logits_of(model.forward, IDS[:, :tokens], cache)
    return cache


def contents(cache: XQuantCache) -> dict[tuple[int, str, str], Tensor]:
    return {(*state.name, name): tensor for state in cache.states for name, tensor in state.owned.items()}


def same(one: XQuantCache, other: XQuantCache) -> bool:
    ours, theirs = contents(one), contents(other)
    return ours.keys() == theirs.keys() and all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


class Family:
    """Caches made of one another by ``fork()``, and beside each its twin, made by ``copy.deepcopy``."""

    def __init__(self, model: Any, step: Any, config: XQuantConfig) -> None:
        self.model, self.step, self.config = model, step, config
        self.pairs = [(filled(model, config), filled(model, config))]
        self.random = random.Random(3)

    def on(self, change: Any) -> None:
        """Do it to one pair."""
        for cache in self.random.choice(self.pairs):
            change(cache)

    def fork(self) -> None:
        cache, twin = self.random.choice(self.pairs)
        self.pairs.append((cache.fork(), copy.deepcopy(twin)))

    def delete(self) -> None:
        if len(self.pairs) > 1:
            self.pairs.pop(self.random.randrange(len(self.pairs)))

    def tokens(self, many: int) -> None:
        """Append some, in a compiled step if it is one."""
        ids = IDS[:, torch.randint(0, 300, (many,), generator=torch.Generator().manual_seed(self.random.randrange(99)))]
        self.on(lambda cache: logits_of(self.step if many == 1 else self.model.forward, ids, cache))

    def prompt_again(self) -> None:
        def again(cache: XQuantCache) -> None:
            cache.reset()
            logits_of(self.model.forward, IDS[:, 100:250], cache)

        self.on(again)

    def replace(self, make: Any) -> None:
        """One cache by what ``make`` makes of it."""
        at = self.random.randrange(len(self.pairs))
        self.pairs[at] = make(self.pairs[at][0]), self.pairs[at][1]

    def loaded(self, cache: XQuantCache) -> XQuantCache:
        new = XQuantCache(self.model.config, ROOM, self.config)
        new.load_state_dict(safetensors.torch.load(safetensors.torch.save(cache.state_dict())))
        return new

    def all(self) -> list[Any]:
        return [
            self.fork, self.fork, self.delete, self.prompt_again,
            *[lambda: self.tokens(1)] * 4, lambda: self.tokens(5), lambda: self.tokens(70),
            lambda: self.on(lambda cache: cache.crop(-3)),
            lambda: self.on(lambda cache: cache.reorder_cache(torch.tensor([1, 0]))),
            lambda: self.on(lambda cache: cache.batch_select_indices(torch.tensor([1, 1]))),
            lambda: self.replace(copy.deepcopy), lambda: self.replace(self.loaded),
            lambda: self.replace(lambda cache: pickle.loads(pickle.dumps(cache))),
            lambda: self.on(lambda cache: cache.load_state_dict(self.loaded(cache).state_dict())),
        ]  # fmt: skip


FAMILIES = [pytest.param("ranked", "compiled", marks=pytest.mark.slow), ("pairs", "compiled"), ("ranked", "eager")]


@pytest.mark.parametrize(("config", "how"), FAMILIES)
def test_whatever_is_done_to_one_no_other_sees_it(model: Any, config: str, how: str) -> None:
    """Cropped and filled again, reset, reordered, saved, deleted, forked again: exactly as deep copies at each turn."""
    calls: list[Any] = []
    compiled = torch.compile(model.forward, backend=interpreted(calls), dynamic=False)
    step = compiled if how == "compiled" else model.forward
    family = Family(model, step, CONFIGS[config])
    for turn in range(60):
        operation = family.random.choice(family.all())
        operation()
        assert all(same(cache, twin) for cache, twin in family.pairs), (turn, operation)
        if len(family.pairs) > 5:
            family.delete()
    assert len(calls) <= 1  # one graph for all of them
    assert bool(why_not()) or any(is_shared(t) for cache, _ in family.pairs for t in contents(cache).values())


def pages_of_files() -> tuple[int, int]:
    """(bytes of the pages mapped here, those shared counted once, of which no cache has written to; all) by Linux."""
    clean, whole, inside = 0, 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match("[0-9a-f]+-[0-9a-f]+ ", line):
            inside = "/memfd:xquant" in line
        elif inside and (found := re.match(r"(Pss|Anonymous): +(\d+) kB", line)):
            kib = 1024 * int(found[2])
            whole += kib if found[1] == "Pss" else 0
            clean += kib if found[1] == "Pss" else -kib
    return clean, whole


KEYS, VALUES = torch.randn(2, 1, 1, 32100, 64, generator=torch.Generator().manual_seed(1)).unbind()


def append(cache: XQuantCache, begin: int, end: int) -> None:
    cache.update(KEYS[:, :, begin:end], VALUES[:, :, begin:end], 0)


def steps(cache: XQuantCache, count: int, offset: int = 0) -> None:
    for at in range(offset, offset + count):
        append(cache, at, at + 1)


def with_long_prompt() -> XQuantCache:
    """One layer and head, 32,000 tokens and one."""
    gc.collect()
    assert pages_of_files() == (0, 0), "forks of an earlier test are alive"
    config = LlamaConfig(num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1, head_dim=64, hidden_size=64)
    cache = XQuantCache(config, 32768, XQuantConfig())
    append(cache, 0, 32000)
    append(cache, 32000, 32001)
    return cache


def read_all(*caches: XQuantCache) -> None:
    """Linux counts a page when it was read."""
    for tensor in (tensor for cache in caches for tensor in contents(cache).values()):
        tensor.sum()


@ON_LINUX
def test_memory_of_a_prompt_and_four_continuations() -> None:
    cache = with_long_prompt()
    parent = sum(tensor.nbytes for tensor in contents(cache).values() if tensor.nbytes >= LEAST)
    forks = [cache.fork() for _ in range(4)]
    read_all(cache, *forks)
    clean, whole = pages_of_files()
    assert clean == whole and 0.9 * parent < whole < 1.01 * parent + 64 * 1024
    for each in forks:
        steps(each, 16)
    clean, whole = pages_of_files()
    assert clean < whole < 1.5 * parent
    reports = [memory_report(each) for each in forks]
    assert {report.total_bytes for report in reports} == {memory_report(cache).total_bytes}
    assert all(0.8 * report.total_bytes < report.shared < report.total_bytes for report in reports)
    assert "bytes shared with forks" in str(reports[0]) and memory_report(copy.deepcopy(cache)).shared == 0
    assert sum(memory_report(cache).shared - report.shared for report in reports) == whole - clean  # as Linux counts
    forks[0].reset()
    assert memory_report(forks[0]).shared == 0 == memory_report(forks[0].fork()).elements
    held = [tensor for tensor in contents(forks[1]).values() if is_shared(tensor)]
    held[0].share_memory_()  # which gives it other memory: the rest is shared as before
    others = sum(tensor.nbytes for tensor in held[1:])
    assert not is_shared(held[0]) and 0 < memory_report(forks[1]).shared < min(others, reports[1].shared)
    for tensor in held[1:]:
        tensor.share_memory_()
    assert memory_report(forks[1]).shared == 0
    del forks, each, held, tensor
    gc.collect()
    assert pages_of_files()[1] < 1.01 * parent + 64 * 1024


@ON_LINUX
def test_forks_of_forks_share_until_they_have_written_to_most_pages() -> None:
    cache = with_long_prompt()
    want = {0: copy.deepcopy(cache)}
    child = cache.fork()
    steps(child, 16)
    grandchild = child.fork()
    assert 0 < memory_report(grandchild).shared == memory_report(child).shared < memory_report(cache).shared
    want[16] = copy.deepcopy(grandchild)
    steps(child, 8, offset=100)
    for tensor in contents(grandchild).values():
        if is_shared(tensor):
            tensor.add_(0)  # as new, but written
    assert memory_report(grandchild).shared == 0
    last = grandchild.fork()
    assert 0 < memory_report(last).shared == memory_report(grandchild).shared  # of a file of their own
    assert same(grandchild, want[16]) and same(last, want[16]) and same(cache, want[0])
    steps(want[16], 8, offset=100)
    assert same(child, want[16])


def test_where_memory_cannot_be_shared(model: Any, monkeypatch: Any, caplog: Any) -> None:
    monkeypatch.setattr(forking, "why_not", lambda: "this is a test")
    warn_once.forget()
    cache = filled(model)
    with caplog.at_level(logging.WARNING, "xquant_fx"):
        forks = [cache.fork(), cache.fork()]
    said = [record.message for record in caplog.records if record.name == "xquant_fx"]
    assert said == ["cache.fork() copies the whole cache: this is a test"]
    assert all(same(fork, cache) and memory_report(fork).shared == 0 for fork in forks)
    logits_of(model.forward, IDS[:, 300:301], forks[0])
    assert same(forks[1], cache) and not same(forks[0], cache)


def test_a_fork_in_the_middle_of_a_step_of_another_thread(model: Any) -> None:
    cache = filled(model)
    assert cache.group is not None
    cache.group.turn._holder["thread"] = -1
    with pytest.raises(CacheStateError, match="two threads stepped through this cache at once"):
        cache.fork()


def test_a_fork_of_an_interrupted_cache_says_what_happened(model: Any) -> None:
    cache = filled(model)
    cache.update(*torch.ones(2, 2, *cache.layers[0].keys.shape[1:2], 1, cache.layers[0].keys.shape[3]), 0)
    with pytest.raises(CacheStateError, match="a step was interrupted in between"):
        logits_of(model.forward, IDS[:, 300:301], cache.fork())


def test_new_and_reset_caches_are_forked(model: Any) -> None:
    cache = XQuantCache(model.config, ROOM, RANKED)
    for _ in range(2):
        fork = cache.fork()
        for each in (fork, cache):
            logits_of(model.forward, IDS[:, :300], each)
        assert same(fork, cache)
        cache.reset()
    with torch.inference_mode():
        inside = fork.fork()
    logits_of(model.forward, IDS[:, 300:301], inside)


def test_a_compiled_graph_keeps_no_cache(model: Any) -> None:
    cache = filled(model)
    step = torch.compile(model.forward, backend=interpreted(), dynamic=False)
    logits_of(step, IDS[:, 300:301], cache)
    codes = weakref.ref(cache.states[0].owned["codes"])
    fork = cache.fork()
    gc.collect()
    assert (codes() is None) == (not why_not())  # replaced by shared pages
    logits_of(step, IDS[:, 301:302], fork)
    states = [weakref.ref(state) for each in (cache, fork) for state in each.states]
    del cache, fork
    gc.collect()
    assert [state() for state in states] == [None] * len(states)
