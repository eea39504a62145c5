"""Let linear layers of few rows read their weights at the memory's speed, on CPUs that gain by it.

    q = linear(x, wq, bq)           out = xquant::linear_rows(x, [wq, wk], [bq, None])
    k = linear(x, wk)         =>    q, k = out.split(...), viewed

Products with weights [in, out] (``addmm``, ``mm``, ``matmul``: GPT-2's ``Conv1D``) are calls of their own; by a
transpose (``x @ w.T``) they are linear layers like others.

A decode step is such layers, mostly, and torch's products of one row read 16-bit weights at less than half that
speed. Layers that take the same input are one call, whose threads start once. The results are those of torch but for
the order of a sum in float32.
"""

from __future__ import annotations

import contextlib
import math
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Graph, GraphModule, Node
from torch.nn import Parameter

from xquant_fx import ops
from xquant_fx.kernels.linear_rows.arguments import MOST_ROWS
from xquant_fx.kernels.linear_rows.cpu_call import DTYPES, is_faster_here
from xquant_fx.passes.context import Context
from xquant_fx.passes.find_writes import is_opaque, other_mutations
from xquant_fx.passes.graph import add_call, fake_mode
from xquant_fx.passes.trace import argument, fake, memory_of, value_of
from xquant_fx.passes.vocabulary import kind

#: Not subclasses: quantized weights have kernels of their own.
_PLAIN = (FakeTensor, Tensor, Parameter)


#: By kind, what the operands are, by name and in order; an op that is given more (an ``out``, say) is left alone.
_ROLES = {
    "linear": {"input": "x", "weight": "weight", "bias": "bias"},
    "mm": {"input": "x", "mat2": "weight"},
    "matmul": {"input": "x", "other": "weight"},
    "addmm": {"input": "bias", "mat1": "x", "mat2": "weight"},
}


class Layer(NamedTuple):
    """One linear layer of a graph."""

    node: Node
    x: Node
    weight: Node
    bias: Node | None
    in_first: bool
    """Whether the weights are [in, out]."""

    @property
    def inputs(self) -> tuple[Node, ...]:
        """What it reads."""
        return (self.x, self.weight) if self.bias is None else (self.x, self.weight, self.bias)


def linear_rows(gm: GraphModule, context: Context) -> int:
    """Replace every linear layer that the kernel takes; returns how many."""
    layers = [layer for node in gm.graph.nodes if (layer := _layer(node)) is not None and _fits(layer)]
    if not layers or not is_faster_here():
        return 0
    results = _Results()
    for group in _groups(gm.graph, layers):
        now = [_layer(layer.node) for layer in group]  # one may read what another was
        _replace(gm.graph, [layer for layer in now if layer is not None], results)
    return len(layers)


class _Results:
    """Fake results of the op, and their parts: those of equal layers are the same, since making them takes longest."""

    def __init__(self) -> None:
        self.known: dict[Any, tuple[Tensor, tuple[Tensor, ...]]] = {}

    def of(self, graph: Graph, x: Tensor, sizes: list[int]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The result for a group whose results have ``sizes``, and its parts."""
        key = (x.dtype, x.device, *sizes)
        if key not in self.known:
            with fake_mode(graph) or contextlib.nullcontext():
                flat = torch.empty(sum(sizes), dtype=x.dtype, device=x.device)
                self.known[key] = flat, torch.split(flat, sizes)
        return self.known[key]


def _layer(node: Node) -> Layer | None:
    roles = _ROLES.get(kind(node), {})
    given = {**dict(zip(roles, node.args, strict=False)), **node.kwargs}
    scales = (given.pop("alpha", 1), given.pop("beta", 1))
    if scales != (1, 1) or len(node.args) > len(roles) or not given.keys() <= roles.keys():
        return None
    found = {roles[name]: value for name, value in given.items()}
    x, weight, bias = (found.get(role) for role in ("x", "weight", "bias"))
    if not isinstance(x, Node) or not isinstance(weight, Node) or not isinstance(bias, Node | None):
        return None
    turned = _transposed(weight)
    return Layer(node, x, turned or weight, bias, in_first=(kind(node) != "linear") is (turned is None))


def _transposed(weight: Node) -> Node | None:
    """The matrix that ``weight`` is the transpose of: ``x @ w.T`` is a linear layer of ``w``."""
    value, of = fake(weight), weight.args[0] if weight.args else None
    if value is None or value.dim() != 2 or not isinstance(of, Node):
        return None
    dims = [argument(weight, i, name) for i, name in ((1, "dim0"), (2, "dim1"))]
    swaps = kind(weight) == "transpose" and {int(dim) % 2 for dim in dims if isinstance(dim, int)} == {0, 1}
    return of if swaps or kind(weight) in ("T", "mT") else None


def _fits(layer: Layer) -> bool:
    """Plain CPU tensors of one dtype, weights that are one block of memory, few rows, whose number is known.

    Weights that the graph computes (dequantized, or with an adapter merged in) are left to Inductor, which may not
    write them to memory at all.
    """
    if not _is_given(layer.weight):
        return False
    tensors = [fake(each) for each in (*layer.inputs, layer.node)]
    if not all(_is_plain(t) for t in tensors):
        return False
    inputs, weights = value_of(layer.x), value_of(layer.weight)
    if layer.bias is not None and value_of(layer.bias).shape != value_of(layer.node).shape[-1:]:  # addmm broadcasts
        return False
    if len({value_of(each).dtype for each in (*layer.inputs, layer.node)}) > 1:  # autocast, for one
        return False
    rows = math.prod(inputs.shape[:-1])
    matrix = weights.dim() == 2 and weights.is_contiguous() and weights.numel() > 0
    return inputs.dtype in DTYPES and 1 <= rows <= MOST_ROWS and matrix


def _is_given(node: Node) -> bool:
    return memory_of(node).op in ("placeholder", "get_attr")


def _is_plain(tensor: Tensor | None) -> bool:
    if tensor is None or not all(type(size) is int for size in tensor.shape):
        return False
    return type(tensor) in _PLAIN and tensor.device.type == "cpu" and tensor.layout == torch.strided


def _groups(graph: Graph, layers: Sequence[Layer]) -> list[list[Layer]]:
    """Layers in order, those together that may run where the first of them does."""
    order = {node: i for i, node in enumerate(graph.nodes)}
    written: list[tuple[int, Node | None]] = [
        (order[node], memory_of(target)) for node, target in other_mutations(graph, [])
    ]
    written += [(i, None) for node, i in order.items() if is_opaque(node)]
    groups: list[list[Layer]] = []
    latest: dict[Node, list[Layer]] = {}
    for layer in layers:
        if layer.in_first:
            groups.append([layer])
            continue
        group, roots = latest.get(layer.x, []), {memory_of(each) for each in layer.inputs}
        begin, end = order[group[0].node] if group else 0, order[layer.node]
        unchanged = all(root is not None and root not in roots for at, root in written if begin < at < end)
        there = all(order[each] < begin for each in layer.inputs)
        if group and unchanged and there:
            group.append(layer)
        else:
            latest[layer.x] = [layer]
            groups.append(latest[layer.x])
    return groups


def _replace(graph: Graph, group: Sequence[Layer], results: _Results) -> None:
    x, shapes = value_of(group[0].x), [tuple(value_of(layer.node).shape) for layer in group]
    weights, biases = [layer.weight for layer in group], [layer.bias for layer in group]
    with graph.inserting_before(group[0].node):
        sizes = [math.prod(x.shape[:-1]) * shape[-1] for shape in shapes]
        flat, pieces = results.of(graph, x, sizes)
        out: Any = add_call(graph, ops.LINEAR_ROWS, (group[0].x, weights, biases, group[0].in_first), {}, flat)
        parts = add_call(graph, torch.split, (out, sizes), {}, pieces) if len(group) > 1 else None
        for i, (layer, shape) in enumerate(zip(group, shapes, strict=True)):
            part = out if parts is None else add_call(graph, operator.getitem, (parts, i), {}, pieces[i])
            like = value_of(layer.node)  # reshaping fake tensors took longer than all else here
            layer.node.replace_all_uses_with(add_call(graph, torch.reshape, (part, shape), {}, like))
    for layer in group:
        graph.erase_node(layer.node)
