"""What happens beside Dynamo while it traces: for this backend no garbage is collected, for others nothing changes."""

from __future__ import annotations

import functools
import gc
import logging
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch._dynamo import output_graph, symbolic_convert
from torch._dynamo.callback import callback_handler
from torch._dynamo.funcname_cache import get_funcname

from xquant_fx.compiler.backend import xquant_backend
from xquant_fx.compiler.tracing_time import begin_hashes, watch_tracing

#: Whether the collector was on: first while Dynamo traced, then, as there is no graph, when the function ran.
seen: list[bool] = []
#: Whether Dynamo had its own way to name functions in logs, likewise.
named: list[bool] = []


@torch._dynamo.assume_constant_result
def note() -> int:
    """Called by Dynamo while it traces."""
    seen.append(gc.isenabled())
    named.append(symbolic_convert.get_funcname is get_funcname)
    return 0


def traced(x: torch.Tensor) -> int:
    return note()  # no graph, so that nothing is compiled


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    seen.clear()
    named.clear()
    watch_tracing(xquant_backend)
    yield
    gc.enable()


def run(function: Callable[..., Any] = traced, **kwargs: Any) -> None:
    torch.compile(function, **kwargs)(torch.ones(2))


@pytest.mark.parametrize("backend", ["xquant", xquant_backend], ids=["by name", "itself"])
def test_the_collector_is_off_while_dynamo_traces_for_us(backend: Any) -> None:
    run(backend=backend)
    assert seen[0] is False and gc.isenabled()
    assert named[0] is False and symbolic_convert.get_funcname is get_funcname


LOGS = [output_graph.trace_call_log, symbolic_convert.trace_call_log, symbolic_convert.trace_source_log]


@pytest.mark.parametrize("logger", LOGS, ids=lambda logger: logger.name)
def test_logs_that_show_names_have_them(logger: logging.Logger) -> None:
    level = logger.level
    logger.setLevel(logging.DEBUG)
    try:
        run(backend="xquant")
    finally:
        logger.setLevel(level)
    assert named[0] is True


def test_options_make_no_difference() -> None:
    run(backend="xquant", options={"preset": "kivi-2"})
    assert seen[0] is False and gc.isenabled()


@pytest.mark.parametrize("backend", ["eager", functools.partial(xquant_backend)], ids=["eager", "wrapped"])
def test_other_backends_are_left_alone(backend: Any) -> None:
    run(backend=backend)
    assert seen[0] is True and named[0] is True


def test_a_collector_that_was_off_stays_off() -> None:
    gc.disable()
    run(backend="xquant")
    assert seen[0] is False and not gc.isenabled()


class Node:
    """One that is garbage for the collector alone, if it is not kept."""

    def __init__(self) -> None:
        self.own = self


@pytest.mark.parametrize("frozen", [False, True])
def test_what_was_made_meanwhile_is_collected_and_grows_old(frozen: bool) -> None:
    """And what somebody froze stays frozen."""
    made: list[Any] = []

    @torch._dynamo.assume_constant_result
    def make() -> int:
        if not made:
            made.extend((Node(), weakref.ref(Node())))
        return 0

    def function(x: torch.Tensor) -> int:
        return make()

    torch.compile(function, backend="xquant")  # which imports what it needs
    gc.collect()
    if frozen:
        gc.freeze()
    before = gc.get_freeze_count()
    try:
        run(function, backend="xquant")
        assert made[1]() is None and gc.get_freeze_count() >= before // 2, "some die without the collector"
        assert frozen or any(each is made[0] for each in gc.get_objects(generation=2))
    finally:
        gc.unfreeze()


def test_it_is_on_again_after_an_error() -> None:
    def broken(x: torch.Tensor) -> int:
        note()
        torch._dynamo.graph_break()
        return 0

    with pytest.raises(torch._dynamo.exc.Unsupported):
        run(broken, backend="xquant", fullgraph=True)
    assert seen[0] is False and gc.isenabled()


def test_one_callback_however_often_it_is_asked_for() -> None:
    before = len(callback_handler.start_callbacks)
    watch_tracing(xquant_backend)
    assert len(callback_handler.start_callbacks) == before


@pytest.mark.skipif(torch.__version__ < "2.13", reason="hashes are made when they are asked for")
def test_the_hashes_of_inductors_caches_can_be_made_in_the_background() -> None:
    assert begin_hashes() == ["triton_key", "torch_key"]
