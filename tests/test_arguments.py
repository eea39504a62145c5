"""One description per op: schemas, C++ parameters and the reading of nodes agree with it."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import pytest
import torch
from torch import Tensor
from torch.fx import Graph

from xquant_fx import ops
from xquant_fx.kernels.arguments import Arguments, Elements, Overload, Symbolic
from xquant_fx.kernels.cpu.source import pointers
from xquant_fx.kernels.decode_attention.arguments import DecodeArguments
from xquant_fx.kernels.quantize_store.arguments import BORROWED, OWN, StoreArguments
from xquant_fx.kernels.quantize_store.both_arguments import BOTH, BothArguments
from xquant_fx.kernels.shared_code_load.arguments import LoadArguments


@dataclasses.dataclass(frozen=True, eq=False)
class Example(Arguments):
    x: Annotated[Tensor, Elements("T")]
    out: Annotated[Tensor, Elements("T", written=True)]
    bias: Annotated[Tensor | None, Elements("S", written=True)]
    size: Symbolic
    bits: int
    name: str | None = None
    factor: float = 1.0


ONLY_READS = Overload(omit=frozenset({"factor"}), required=frozenset({"name"}), read_only=frozenset({"out"}))


def test_schemas() -> None:
    state = "Tensor(a!) out, Tensor(b!)? bias, SymInt size, int bits"
    assert Example.schema("op") == f"op(Tensor x, {state}, str? name=None, float factor=1.0) -> ()"
    only_reads = "op.r(Tensor x, Tensor out, Tensor(a!)? bias, SymInt size, int bits, str name) -> Tensor"
    assert Example.schema("op.r", ONLY_READS, "Tensor") == only_reads
    assert (Example.written(), Example.written(ONLY_READS)) == (["out", "bias"], ["bias"])


def test_pointers_are_const_where_nothing_is_written() -> None:
    assert pointers(Example, Overload()) == {"x": "const xq::T*", "out": "xq::T*", "bias": "xq::S*"}
    assert pointers(Example, ONLY_READS)["out"] == "const xq::T*"


def test_nodes_are_read_by_name_however_they_were_called() -> None:
    graph = Graph()
    x, out = graph.placeholder("x"), graph.placeholder("out")
    by_position = graph.call_function(torch.add, (x, out, None, 3), {"bits": 2})
    by_name = graph.call_function(torch.add, (), dict(bits=2, size=3, bias=None, out=out, x=x))
    for node in (by_position, by_name):
        a = Example.of(node)
        assert (a.x, a.out, a.bias, a.size, a.bits, a.name, a.factor) == (x, out, None, 3, 2, None, 1.0)
        assert a.tensors == {"x": x, "out": out} and a.positional(without=("x",)) == [out, None]
        assert list(a._asdict()) == [field.name for field in dataclasses.fields(Example)]
    assert a.mapped(str).tensors == {"x": "x", "out": "out"} and a.mapped(str, ("x",)).out is out


@pytest.mark.parametrize(
    ("op", "arguments", "overload"),
    [
        (ops.STORE, StoreArguments, OWN),
        (ops.STORE_BORROWED, StoreArguments, BORROWED),
        (ops.APPEND_CPU, StoreArguments, OWN),
        (ops.APPEND_CPU_BORROWED, StoreArguments, BORROWED),
        (torch.ops.xquant.triton_append.default, StoreArguments, OWN),
        (torch.ops.xquant.triton_append_borrowed.default, StoreArguments, BORROWED),
        *((ops.STORE_BOTH[name], BothArguments, overload) for name, overload in BOTH.items()),
        (torch.ops.xquant.triton_append_both_k.default, BothArguments, BOTH["k"]),
        (ops.LOAD, LoadArguments, Overload()),
        (ops.DECODE, DecodeArguments, Overload()),
        (ops.DECODE_CPU, DecodeArguments, Overload()),
        (torch.ops.xquant.triton_decode_attention.default, DecodeArguments, Overload()),
    ],
    ids=lambda value: str(value) if isinstance(value, torch._ops.OpOverload) else "",
)
def test_every_op_takes_what_its_description_says(
    op: torch._ops.OpOverload, arguments: type[Arguments], overload: Overload
) -> None:
    given = op._schema.arguments
    assert [a.name for a in given] == [p.name for p in arguments.parameters(overload)]
    assert [a.name for a in given if a.is_write] == arguments.written(overload)
    assert not any(a.kwarg_only for a in given)
