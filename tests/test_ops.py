"""torch.library.opcheck on the ops as the pass inserts them, and their schemas."""

from __future__ import annotations

import functools

import pytest
import torch
from store_reference import Case
from store_runs import ThroughState, append, load_arguments, store_arguments

from xquant_fx import ops
from xquant_fx.cache.state import KVState

STORED, SIDES = 20, ("key", "value")


def filled(case: Case) -> list[KVState]:
    """A pair of layers with STORED tokens; unlike elsewhere nothing is NaN, which opcheck cannot compare."""
    layers = ThroughState(case)
    for state in layers.states:
        state.reset()
    for layer in (0, 1):
        layers.step(layer, 0, case.tokens(STORED, layer))
    return layers.states


def check_store(state: KVState, case: Case, new: int) -> None:
    """opcheck of the op that stores ``new`` tokens."""
    a = store_arguments(state, case.tokens(new, 5), torch.arange(STORED, STORED + new))
    a.call(*(functools.partial(opcheck, op) for op in (ops.STORE, ops.STORE_BORROWED)))


def opcheck(op: torch._ops.OpOverload, **arguments: object) -> None:
    torch.library.opcheck(op, (), arguments)


@pytest.mark.parametrize(
    ("side", "bits", "new", "sinks"),
    [("key", 2, 2, 1), ("value", 1, 1, 0), ("value", 8, 12, 1), ("key", 16, 3, 0)],
)
def test_store(side: str, bits: int, new: int, sinks: int) -> None:
    case = Case(side=side, bits=bits, sinks=sinks, shared=False, max_len=40)
    check_store(filled(case)[0], case, new)


@pytest.mark.parametrize(("side", "fit", "new"), [("key", "minmax", 12), ("value", "least_squares", 1)])
def test_store_of_a_borrowing_layer(side: str, fit: str, new: int) -> None:
    case = Case(side=side, fit=fit, max_len=40)
    check_store(filled(case)[1], case, new)


@pytest.mark.parametrize(
    ("side", "bits", "new", "sinks"),
    [
        *(("key", 1, 2, 2), ("value", 8, 12, 0), ("key", 16, 1, 0), ("value", 16, 1, 0)),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (("value", 1, 2, 2), ("key", 8, 12, 0))),
    ],
)
def test_load(side: str, bits: int, new: int, sinks: int) -> None:
    case = Case(side=side, bits=bits, sinks=sinks, max_len=40)
    x = case.tokens(new, 5) if new > 8 else None
    opcheck(ops.LOAD, **load_arguments(filled(case)[1], STORED, new, 40, x=x))


@pytest.mark.parametrize("op", [ops.STORE, ops.STORE_BORROWED, ops.LOAD])
def test_the_schema_says_what_is_written(op: torch._ops.OpOverload) -> None:
    written = {a.name for a in op._schema.arguments if a.alias_info is not None and a.alias_info.is_write}
    state = {"scale", "zero", "ring", "sink", "order", "center", "norm", "length", "fault"}
    assert written == {ops.STORE: state | {"codes"}, ops.STORE_BORROWED: state, ops.LOAD: set()}[op]


@pytest.mark.parametrize("side", SIDES)
def test_the_ops_trace_to_plain_torch_ops(side: str) -> None:
    """Nothing is left for Inductor that it does not know, and nothing waits for the device."""
    case = Case(side=side, max_len=40)
    state = filled(case)[0]

    def step(x):
        append(state, x, torch.arange(STORED, STORED + 2))
        return ops.LOAD(**load_arguments(state, STORED, 2, 40))

    graph = torch.fx.experimental.proxy_tensor.make_fx(step)(case.tokens(2, 5))
    names = {str(node.target) for node in graph.graph.nodes if node.op == "call_function"}
    assert names and all(name.startswith("aten.") for name in names)
    assert "aten._local_scalar_dense.default" not in names
