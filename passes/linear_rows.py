"""Let linear layers of few rows read their weights at the memory's speed, on CPUs that gain by it.

    linear(x, weight, bias)     =>     xquant::linear_rows(x, weight, bias)

A decode step is such layers, mostly, and torch's products of one row read 16-bit weights at less than half that
speed. The results are those of torch but for the order of a sum in float32.
"""

from __future__ import annotations

import math

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import GraphModule, Node
from torch.nn import Parameter

from xquant_fx import ops
from xquant_fx.kernels.linear_rows.arguments import MOST_ROWS
from xquant_fx.kernels.linear_rows.cpu_call import DTYPES, is_faster_here
from xquant_fx.passes.context import Context
from xquant_fx.passes.graph import call
from xquant_fx.passes.trace import fake, memory_of
from xquant_fx.passes.vocabulary import kind

#: Not subclasses: quantized weights have kernels of their own.
_PLAIN = (FakeTensor, Tensor, Parameter)


def linear_rows(gm: GraphModule, context: Context) -> int:
    """Replace every linear layer that the kernel takes; returns how many."""
    found = [node for node in gm.graph.nodes if kind(node) == "linear" and _fits(node)]
    if not found or not is_faster_here():
        return 0
    for node in found:
        with gm.graph.inserting_before(node):
            made = call(gm.graph, ops.LINEAR_ROWS, *_arguments(node))
        node.replace_all_uses_with(made)
        gm.graph.erase_node(node)
    return len(found)


def _arguments(node: Node) -> tuple[tuple[object, ...], dict[str, object]]:
    names = ("input", "weight", "bias")
    given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    return (given["input"], given["weight"], given.get("bias")), {}


def _fits(node: Node) -> bool:
    """Plain CPU tensors of one dtype, weights that are one block of memory, few rows, whose number is known.

    Weights that the graph computes (dequantized, or with an adapter merged in) are left to Inductor, which may not
    write them to memory at all.
    """
    (x, weight, bias), _ = _arguments(node)
    if not isinstance(weight, Node) or memory_of(weight).op not in ("placeholder", "get_attr"):
        return False
    tensors = [t for each in (x, weight, bias, node) if (t := fake(each)) is not None]
    if len(tensors) != 3 + (bias is not None) or not all(_is_plain(t) for t in tensors):
        return False
    inputs, weights = tensors[:2]
    if len({t.dtype for t in tensors}) > 1 or inputs.dtype not in DTYPES:  # autocast, for one
        return False
    rows = math.prod(inputs.shape[:-1])
    return 1 <= rows <= MOST_ROWS and weights.dim() == 2 and weights.is_contiguous() and weights.numel() > 0


def _is_plain(tensor: Tensor) -> bool:
    static = all(type(size) is int for size in tensor.shape)
    return static and type(tensor) in _PLAIN and tensor.device.type == "cpu"
