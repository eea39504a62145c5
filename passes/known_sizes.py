"""Sizes that Dynamo left open when it traced a node, and that turned out to be numbers, as numbers.

A batch is left open once a function has seen two sizes of it. In a graph with a cache, which is for one batch, it is
a number from the first attention on. What was traced before still has the symbol, and is no query whose shape is known.
"""

from __future__ import annotations

from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Graph, Node

from xquant_fx.passes.graph import without_guards
from xquant_fx.passes.trace import number_by_now


def name_known_sizes(graph: Graph) -> int:
    """Name them in all fake values but inputs', which stay those of the same memory; returns in how many."""
    found = [node for node in graph.nodes if node.op != "placeholder" and _has_known(node)]
    if found:
        with without_guards(graph), torch.no_grad():
            for node in found:
                node.meta["example_value"] = _with_numbers(node.meta["example_value"])
    return len(found)


def _has_known(node: Node) -> bool:
    value = node.meta.get("example_value")
    return type(value) is FakeTensor and any(number_by_now(size) is not size for size in value.shape)


def _with_numbers(value: FakeTensor) -> Any:
    sizes, strides = ([number_by_now(each) for each in part] for part in (value.shape, value.stride()))
    with value.fake_mode:
        return value.as_strided(sizes, strides, number_by_now(value.storage_offset()))
