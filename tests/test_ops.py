"""torch.library.opcheck on the ops as the pass inserts them, and their schemas."""

from __future__ import annotations

import pytest
import torch
from store_reference import Case
from store_runs import ThroughState

from xquant_fx import ops
from xquant_fx.cache.state import TENSOR_NAMES, KVState

STORED, SIDES = 20, ("key", "value")


def filled(case: Case) -> list[KVState]:
    """A pair of layers with STORED tokens; unlike elsewhere nothing is NaN, which opcheck cannot compare."""
    layers = ThroughState(case)
    for state in layers.states:
        state.reset()
    for layer in (0, 1):
        layers.step(layer, 0, case.tokens(STORED, layer))
    return layers.states


def store_arguments(state: KVState, case: Case, new: int) -> tuple[object, ...]:
    pos = torch.arange(STORED, STORED + new)
    return case.tokens(new, 5), pos, *(state.tensor(name) for name in TENSOR_NAMES), *state.store_args()


def load_arguments(state: KVState, new: int) -> tuple[object, ...]:
    tensors = [state.tensor(name) for name in TENSOR_NAMES[:-2]]
    s = state.spec
    return *tensors, torch.tensor([STORED]), new, 40, s.side, s.bits, s.group_size, s.residual_length


@pytest.mark.parametrize(
    ("side", "bits", "new", "sinks"),
    [("key", 2, 2, 1), ("value", 1, 1, 0), ("value", 8, 12, 1), ("key", 16, 3, 0)],
)
def test_store(side: str, bits: int, new: int, sinks: int) -> None:
    case = Case(side=side, bits=bits, sinks=sinks, shared=False, max_len=40)
    torch.library.opcheck(ops.STORE, store_arguments(filled(case)[0], case, new))


@pytest.mark.parametrize(("side", "fit", "new"), [("key", "minmax", 12), ("value", "least_squares", 1)])
def test_store_of_a_borrowing_layer(side: str, fit: str, new: int) -> None:
    case = Case(side=side, fit=fit, max_len=40)
    torch.library.opcheck(ops.STORE_BORROWED, store_arguments(filled(case)[1], case, new), {"fit": fit})


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize(("bits", "new", "sinks"), [(1, 2, 2), (8, 12, 0), (16, 1, 0)])
def test_load(side: str, bits: int, new: int, sinks: int) -> None:
    case = Case(side=side, bits=bits, sinks=sinks, max_len=40)
    chunk = {"x": case.tokens(new, 5) if new > 8 else None}
    torch.library.opcheck(ops.LOAD, load_arguments(filled(case)[1], new), chunk)


@pytest.mark.parametrize("op", [ops.STORE, ops.STORE_BORROWED, ops.LOAD])
def test_the_schema_says_what_is_written(op: torch._ops.OpOverload) -> None:
    written = {a.name for a in op._schema.arguments if a.alias_info is not None and a.alias_info.is_write}
    state = {"scale", "zero", "ring", "sink", "length", "fault"}
    assert written == {ops.STORE: state | {"codes"}, ops.STORE_BORROWED: state, ops.LOAD: set()}[op]


@pytest.mark.parametrize("side", SIDES)
def test_the_ops_trace_to_plain_torch_ops(side: str) -> None:
    """Nothing is left for Inductor that it does not know, and nothing waits for the device."""
    case = Case(side=side, max_len=40)
    state = filled(case)[0]

    def step(*arguments):
        ops.STORE(*arguments)
        return ops.LOAD(*load_arguments(state, 2))

    graph = torch.fx.experimental.proxy_tensor.make_fx(step)(*store_arguments(state, case, 2))
    names = {str(node.target) for node in graph.graph.nodes if node.op == "call_function"}
    assert names and all(name.startswith("aten.") for name in names)
    assert "aten._local_scalar_dense.default" not in names
