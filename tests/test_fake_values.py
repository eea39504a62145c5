"""Fake values that are taken from those of an equal layer: each is what Dynamo would have worked out."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from dynamo_graphs import tiny
from fast_and_slow import fast_but
from torch import Tensor
from torch._dynamo import config, utils
from torch.fx import GraphModule
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache, StaticCache

from xquant_fx.compiler import fake_values
from xquant_fx.compiler.tracing_shortcuts import shortcuts

Function = Callable[..., Any]

#: Of a tensor x [2, 3, 4, 4], w [4, 4] and b [4]: what Dynamo has the operation for.
FUNCTIONS: dict[Any, Function] = {
    operator.add: lambda x, w, b: x + w, operator.sub: lambda x, w, b: 1 - x, operator.mul: lambda x, w, b: x * 2.0,
    operator.truediv: lambda x, w, b: x / b, operator.pow: lambda x, w, b: x**2, operator.neg: lambda x, w, b: -x,
    operator.matmul: lambda x, w, b: x @ w, operator.getitem: lambda x, w, b: x[..., None, 1:3],
    torch.add: lambda x, w, b: torch.add(x, w, alpha=2), torch.mul: lambda x, w, b: torch.mul(x, 2),
    torch.pow: lambda x, w, b: torch.pow(x, 2), torch.rsqrt: lambda x, w, b: torch.rsqrt(x),
    torch.mean: lambda x, w, b: torch.mean(x, -1, keepdim=True), torch.tanh: lambda x, w, b: torch.tanh(x),
    torch.sigmoid: lambda x, w, b: torch.sigmoid(x), torch.matmul: lambda x, w, b: torch.matmul(x, w),
    torch.cat: lambda x, w, b: torch.cat((x, w[None, None].expand(2, 3, 4, 4)), dim=-2),
    torch.transpose: lambda x, w, b: torch.transpose(x, 1, 2), torch.unsqueeze: lambda x, w, b: torch.unsqueeze(x, 1),
    F.linear: lambda x, w, b: F.linear(x, w, b), F.silu: lambda x, w, b: F.silu(x),
    F.gelu: lambda x, w, b: F.gelu(x, approximate="tanh"), F.relu: lambda x, w, b: F.relu(x),
    F.softplus: lambda x, w, b: F.softplus(x), F.softmax: lambda x, w, b: F.softmax(x, -1, dtype=torch.float64),
    F.layer_norm: lambda x, w, b: F.layer_norm(x, (4,), b, b), torch.rms_norm: lambda x, w, b: F.rms_norm(x, (4,), b),
}  # fmt: skip
METHODS: dict[str, Function] = {
    "add": lambda x, w, b: x.add(w), "mul": lambda x, w, b: x.mul(w), "pow": lambda x, w, b: x.pow(2),
    "mean": lambda x, w, b: x.mean(-1), "rsqrt": lambda x, w, b: x.rsqrt(), "tanh": lambda x, w, b: x.tanh(),
    "softmax": lambda x, w, b: x.softmax(-1), "matmul": lambda x, w, b: x.matmul(w),
    "to": lambda x, w, b: x.to(torch.float32), "type_as": lambda x, w, b: x.type_as(w),
    "float": lambda x, w, b: x.float(), "bfloat16": lambda x, w, b: x.bfloat16(), "half": lambda x, w, b: x.half(),
    "contiguous": lambda x, w, b: x.contiguous(),
    "view": lambda x, w, b: x.view(*x.shape[:-1], 2, 2), "reshape": lambda x, w, b: x.reshape(2, -1),
    "flatten": lambda x, w, b: x.flatten(1), "unflatten": lambda x, w, b: x.unflatten(-1, (2, 2)),
    "transpose": lambda x, w, b: x.transpose(1, 2), "permute": lambda x, w, b: x.permute(0, 2, 3, 1),
    "unsqueeze": lambda x, w, b: x.unsqueeze(-1), "squeeze": lambda x, w, b: x[:, :1].squeeze(1),
    "expand": lambda x, w, b: x[:, :1].expand(2, 5, -1, -1),
}  # fmt: skip
OPERATIONS = {**FUNCTIONS, **METHODS}
#: Which architectures' steps are compared, with which cache.
STEPS = [("gemma3_text", "static"), ("llama", "static"), ("llama", "dynamic"), ("gpt2", "static"),
         ("deepseek_v3", "static"), ("qwen3_next", "dynamic"), ("bloom", "dynamic")]  # fmt: skip


class Traced:
    """One call of ``function``, traced with the values of equal layers or without: what its values look like."""

    def __init__(self, function: Function, *args: Any, spared: bool = True, **kwargs: Any) -> None:
        self.nodes: list[Any] = []
        self.worked_out: list[Any] = []
        whole = utils._get_fake_value_impl

        def counted(node: Any, *args: Any, **kwargs: Any) -> Any:
            self.worked_out.append(node.target)
            return whole(node, *args, **kwargs)

        torch._dynamo.reset()
        utils._get_fake_value_impl = counted
        try:
            with shortcuts():
                if not spared:
                    utils._get_fake_value_impl = counted
                self.result = torch.compile(function, backend=self._look)(*args, **kwargs)
        finally:
            utils._get_fake_value_impl = whole

    def _look(self, gm: GraphModule, inputs: list[Any]) -> Any:
        self.nodes += gm.graph.nodes
        return gm.forward

    def looks(self) -> list[tuple[Any, ...]]:
        """Of each node: sizes and the like of its values, and the first node whose value lies in the same storage."""
        first: dict[int, str] = {}
        found = []
        for node in self.nodes:
            values = node.meta.get("example_value")
            for x in values if isinstance(values, tuple | list) else [values]:
                if isinstance(x, Tensor):
                    lies = first.setdefault(x.untyped_storage()._cdata, node.name)
                    how = (x.dtype, x.device, x.storage_offset(), x.is_inference(), x.requires_grad, lies)
                    found.append((node.name, str(tuple(x.shape)), str(x.stride()), *how))
        return found


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    return torch.rand(2, 3, 4, 4), torch.rand(4, 4), torch.rand(4)


GIVEN = inputs()


def test_every_listed_operation_is_tried() -> None:
    assert set(FUNCTIONS) == fake_values._FUNCTIONS and set(METHODS) == fake_values._METHODS


@pytest.mark.parametrize("name", OPERATIONS, ids=lambda name: getattr(name, "__name__", name))
def test_operations_are_pure(name: Any) -> None:
    """They write to nothing, and give the same twice."""
    given = inputs()
    before, versions = [x.clone() for x in given], [x._version for x in given]
    assert torch.equal(OPERATIONS[name](*given), OPERATIONS[name](*given))
    assert [x._version for x in given] == versions
    assert all(torch.equal(x, y) for x, y in zip(given, before, strict=True))


@pytest.mark.parametrize("operations", [FUNCTIONS, METHODS], ids=["functions", "methods"])
def test_values_of_operations_are_the_same(operations: dict[Any, Function]) -> None:
    """Of a tensor, of a transposed one and of a part of one, each twice: the second time nothing is worked out."""

    def twice_each(x: Tensor, w: Tensor, b: Tensor) -> list[Tensor]:
        wide = torch.stack((x, x), 2)
        tensors = (x, x, x.mT, x.mT, wide[:, :, 0], wide[:, :, 0], x.double().float())
        return [operation(each, w, b) for each in tensors for operation in operations.values()]

    with torch.no_grad():
        whole, spared = (Traced(twice_each, *GIVEN, spared=each) for each in (False, True))
    assert spared.looks() == whole.looks() and {node.target for node in whole.nodes} >= set(operations)
    for name in operations:
        assert 2 * spared.worked_out.count(name) <= whole.worked_out.count(name) + 1, name
    for left, right in zip(spared.result, whole.result, strict=True):
        assert torch.equal(left, right)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("step", fast_but(STEPS, STEPS[1:]), ids="-".join)
def test_values_of_a_models_step_are_the_same(step: tuple[str, str], mode: Any) -> None:
    name, kind = step
    model, ids = tiny(name, "eager" if name == "bloom" else "sdpa"), torch.arange(3, 12)[None]
    found = []
    for spared in (False, True):
        cache = StaticCache(model.config, max_cache_len=16) if kind == "static" else DynamicCache(config=model.config)
        with mode():
            model(ids, past_key_values=cache)
            found.append(Traced(model.forward, ids[:, :1], past_key_values=cache, spared=spared))
    whole, spared = found
    assert spared.looks() == whole.looks() and len(whole.looks()) > 50
    assert len(spared.worked_out) < 0.8 * len(whole.worked_out)
    assert torch.equal(spared.result.logits, whole.result.logits)


def twice(x: Tensor, w: Tensor) -> Tensor:
    return F.linear(x, w) + F.linear(x, w)


def worked_out(function: Function, *args: Any, **kwargs: Any) -> int:
    """How many linear layers were."""
    return Traced(function, *args, **kwargs).worked_out.count(F.linear)


def test_what_changes_an_operation_is_left_to_dynamo() -> None:
    x, w = torch.rand(2, 4), torch.rand(4, 4)
    with torch.no_grad():
        assert worked_out(twice, x, w) == 1
        assert Traced(twice, x, w, spared=False).worked_out.count(F.linear) == 2
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert worked_out(twice, x, w) == 2
        assert worked_out(lambda x, w: torch.vmap(twice, in_dims=(0, None))(x, w), x, w) == 2
        torch._dynamo.mark_dynamic(x, 0)
        assert worked_out(twice, x, w) == 2
    assert worked_out(twice, torch.rand(2, 4), w) == 2  # gradients could be recorded


def test_parameters_are_no_other_tensors() -> None:
    """In Dynamo's values a view of one may require gradients, without any being recorded."""
    w, given = torch.nn.Parameter(torch.rand(8)), (torch.rand(8), torch.nn.Parameter(torch.rand(8)))

    def function(x: Tensor, p: Tensor) -> tuple[Tensor, ...]:
        parts = [each[:, None, ...].expand(8, 2) for each in (x, x, w, w, p, p)]
        return *parts, *(each * 2 for each in (x, w, p)), w.float(), w.reshape(2, 4)

    with torch.no_grad():
        whole, spared = (Traced(function, *given, spared=each) for each in (False, True))
    assert spared.looks() == whole.looks()


def test_a_value_from_outside_is_none_inside_of_a_transform() -> None:
    """Whose values are wrapped."""

    def function(x: Tensor, w: Tensor) -> Any:
        return w * 2, torch.func.jvp(lambda x: x + w * 2, (x,), (x,))

    with torch.no_grad():
        spared = Traced(function, torch.rand(3), torch.rand(3))
    values = [node.meta["example_value"] for node in spared.nodes if node.target is operator.mul]
    assert len(values) == 2 and type(values[0]) is not type(values[1])


def test_an_autocast_in_between_is_seen() -> None:
    def function(x: Tensor) -> tuple[Tensor, ...]:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            inside = x @ x
        return x @ x, inside, x @ x

    x = torch.rand(4, 4)
    with torch.no_grad():
        whole, spared = (Traced(function, x, spared=each) for each in (False, True))
        assert spared.looks() == whole.looks()
        assert [t.dtype for t in spared.result] == [torch.float32, torch.bfloat16, torch.float32]


def test_another_default_dtype_is_part_of_the_key() -> None:
    """Which numbers become; two frames here have one memory, as Dynamo breaks the graph where it is set."""

    def function(n: Tensor) -> tuple[Tensor, Tensor]:
        before = n / 2
        torch.set_default_dtype(torch.float64)
        return before, n / 2

    with torch.no_grad():
        try:
            spared = Traced(function, torch.arange(4))
        finally:
            torch.set_default_dtype(torch.float32)
    looked = {node.meta["example_value"].dtype for node in spared.nodes if node.target is operator.truediv}
    assert looked == {torch.float32, torch.float64} == {t.dtype for t in spared.result}


def test_inference_mode_in_between_is_seen() -> None:
    """By what runs; Dynamo's own values are none of that mode."""

    def function(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        with torch.inference_mode():
            inside = x * 2
        return x * 2, inside, x * 2

    with torch.no_grad():
        whole, spared = (Traced(function, torch.rand(3), spared=each) for each in (False, True))
    assert spared.looks() == whole.looks()
    assert [t.is_inference() for t in spared.result] == [False, True, False]


def test_equal_numbers_of_other_types_are_others() -> None:
    def function(n: Tensor, flags: Tensor) -> tuple[Tensor, ...]:
        return n * 1, n * 1.0, flags * True, flags * 1, n[0], n[False], n[True]

    n, flags = torch.arange(4), torch.ones(4, dtype=torch.bool)
    with torch.no_grad():
        spared = Traced(function, n, flags)
        assert [(t.dtype, t.shape) for t in spared.result] == [(t.dtype, t.shape) for t in function(n, flags)]
        assert spared.looks() == Traced(function, n, flags, spared=False).looks()


def test_writes_through_views_are_seen() -> None:
    def function(x: Tensor) -> Tensor:
        x.view(-1).add_(1)
        x.view(-1).add_(1)
        copy = x * 1
        copy.transpose(0, 1)[0].mul_(2)
        copy.transpose(0, 1)[0].mul_(2)
        return copy

    x, y = torch.zeros(2, 3), torch.zeros(2, 3)
    with torch.no_grad():
        spared = Traced(function, x)
        assert torch.equal(spared.result, function(y)) and torch.equal(x, y)
        assert spared.looks() == Traced(function, torch.zeros(2, 3), spared=False).looks()


def test_no_view_is_made_inside_of_a_higher_order_operator() -> None:
    """Which asks the versions of tensors who was written to."""

    def inner(x: Tensor) -> Tensor:
        return x.view(-1) + x.view(-1) + x.view(-1)

    def function(x: Tensor) -> Tensor:
        return checkpoint(inner, x, use_reentrant=False) + inner(x)

    with torch.no_grad():
        assert Traced(function, torch.zeros(2, 3)).worked_out.count("view") == 3
        assert Traced(inner, torch.zeros(2, 3)).worked_out.count("view") == 1


def test_operations_that_write_are_not_taken_for_what_they_give() -> None:
    def function(x: Tensor) -> Tensor:
        return F.relu(F.relu(x, inplace=True), inplace=True)

    with torch.no_grad():
        spared = Traced(function, torch.rand(3))
        assert spared.worked_out.count(F.relu) == 2


def test_an_error_is_still_dynamos() -> None:
    def function(x: Tensor, w: Tensor) -> Tensor:
        return F.linear(F.linear(x, w), w[:, :1])

    with torch.no_grad(), shortcuts(), pytest.raises(torch._dynamo.exc.TorchRuntimeError, match="reduction dim"):
        torch.compile(function, backend="eager", fullgraph=True)(torch.rand(2, 4), torch.rand(4, 4))


@pytest.mark.parametrize(
    "setting",
    [{"track_nodes_for_deduplication": True}, {"fake_tensor_cache_enabled": False},
     {"fake_tensor_cache_crosscheck_enabled": True}],
)  # fmt: skip
def test_nothing_is_taken_where_somebody_looks(setting: dict[str, bool]) -> None:
    """At what each node writes to, or whether such values are right."""
    before = utils._get_fake_value_impl
    with shortcuts():
        assert utils._get_fake_value_impl is not before
    with config.patch(**setting), shortcuts():
        assert utils._get_fake_value_impl is before
