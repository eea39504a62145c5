"""Axes of views of a buffer, against what the views make of the numbers 0, 1, 2 ..."""

from __future__ import annotations

import math
import operator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from xquant_fx.passes.track_axes import FIRST, REPEATS, TAKEN, Axes, Tracked, tracked


def traced(shape: tuple[int, ...], views: list[tuple[Any, tuple[Any, ...]]]) -> tuple[Node, Node, list[Tensor]]:
    """(buffer, last view) of a graph of ``views``, and the tensors of all of them on 0, 1, 2 ..."""
    graph = Graph()
    node = buffer = graph.placeholder("buffer")
    tensor = torch.arange(math.prod(shape)).view(shape)
    node.meta["example_value"] = tensor
    tensors = [tensor]
    for target, args in views:
        is_method = isinstance(target, str)
        node = graph.call_method(target, (node, *args)) if is_method else graph.call_function(target, (node, *args))
        tensor = getattr(tensor, target)(*args) if is_method else target(tensor, *args)
        node.meta["example_value"] = tensor
        tensors.append(tensor)
    graph.output(node)
    GraphModule({}, graph)
    return buffer, node, tensors


def by_axes(found: Tracked, shape: tuple[int, ...], view: tuple[int, ...]) -> Tensor:
    """What is ``found`` of a view of shape ``view``: the buffer's indices, summed over its axes."""
    strides = dict(zip("BHND", (math.prod(shape[i + 1 :]) for i in range(4)), strict=True))
    strides |= {"part": strides["H"], **dict.fromkeys(REPEATS, 0)}
    sizes = found.sizes
    assert {name: sizes[name] for name in "BHD"} == {"B": shape[0], "H": shape[1], "D": shape[3]}
    assert sizes["N"] == sizes.get(TAKEN, shape[2])
    named = [name for dim in found.axes for name in dim]
    total = torch.full([sizes[name] for name in named], sizes.get(FIRST, 0) * strides["H"])
    for i, name in enumerate(named):
        steps = torch.arange(sizes[name]) * strides[name]
        total = total + steps.view([-1 if j == i else 1 for j in range(len(named))])
    return total.reshape(view)


SIZES = st.tuples(*(st.sampled_from(sizes) for sizes in ([1, 2], [1, 2, 3], [4, 5], [2, 6])))


@st.composite
def chains(draw: st.DrawFn) -> tuple[tuple[int, ...], list[tuple[Any, tuple[Any, ...]]]]:
    """A shape and views of it, drawn one after the other."""
    shape = draw(SIZES)
    tensor = torch.arange(math.prod(shape)).view(shape)
    views: list[tuple[Any, tuple[Any, ...]]] = []
    for _ in range(draw(st.integers(0, 5))):
        drawn = draw(st.sampled_from(VIEWS))(draw, tensor)
        before = tensor
        for target, args in drawn if isinstance(drawn, list) else [drawn]:
            tensor = getattr(tensor, target)(*args) if isinstance(target, str) else target(tensor, *args)
        if not tensor.numel():
            tensor = before
            continue
        views += drawn if isinstance(drawn, list) else [drawn]
    return shape, views


def _dims(draw: st.DrawFn, x: Tensor, count: int) -> tuple[int, ...]:
    return tuple(draw(st.integers(-x.dim(), x.dim() - 1)) for _ in range(count))


def _merge(draw: st.DrawFn, x: Tensor) -> tuple[str, tuple[Any, ...]]:
    at = draw(st.integers(0, max(x.dim() - 2, 0)))
    shape = [*x.shape[:at], math.prod(x.shape[at : at + 2]), *x.shape[at + 2 :]]
    return draw(st.sampled_from(["reshape"])), tuple(shape)


def _split(draw: st.DrawFn, x: Tensor) -> tuple[str, tuple[Any, ...]]:
    at = draw(st.integers(0, x.dim() - 1))
    factor = draw(st.sampled_from([n for n in range(1, x.shape[at] + 1) if x.shape[at] % n == 0]))
    return "unflatten", (at, (factor, x.shape[at] // factor))


def _permute(draw: st.DrawFn, x: Tensor) -> tuple[str, tuple[Any, ...]]:
    order = tuple(draw(st.permutations(range(x.dim()))))
    return "permute", draw(st.sampled_from([order, (order,)]))


def _repeated(draw: st.DrawFn, x: Tensor) -> tuple[Any, tuple[Any, ...]]:
    return draw(st.sampled_from(["repeat_interleave", torch.repeat_interleave])), (2, *_dims(draw, x, 1))


def _expanded(draw: st.DrawFn, x: Tensor) -> tuple[str, tuple[Any, ...]]:
    ones = [i for i, size in enumerate(x.shape) if size == 1]
    grown = draw(st.sampled_from(ones)) if ones else -1
    return "expand", tuple(3 if i == grown else -1 for i in range(x.dim()))


def _part(draw: st.DrawFn, x: Tensor) -> tuple[Any, tuple[Any, ...]]:
    """Some of a dimension in a row, which is understood of heads, and of tokens from the first on."""
    (dim,) = _dims(draw, x, 1)
    start = draw(st.integers(0, x.shape[dim] - 1))
    length = draw(st.integers(1, x.shape[dim] - start))
    index = (*[slice(None)] * (dim % x.dim()), slice(start, start + length))
    return draw(st.sampled_from([("narrow", (dim, start, length)), (operator.getitem, (index,))]))


def _piece(draw: st.DrawFn, x: Tensor) -> list[tuple[Any, tuple[Any, ...]]]:
    """One of several pieces."""
    (dim,) = _dims(draw, x, 1)
    size = draw(st.integers(1, x.shape[dim]))
    into = draw(
        st.sampled_from(
            [("chunk", (2, dim)), (torch.split, (size, dim)), ("split", ([size, x.shape[dim] - size], dim))]
        )
    )
    return [into, (operator.getitem, (draw(st.sampled_from([0, -1])),))]


def _tiled(draw: st.DrawFn, x: Tensor) -> tuple[str, tuple[Any, ...]]:
    (dim,) = _dims(draw, x, 1)
    return "repeat", tuple(2 if i == dim % x.dim() else 1 for i in range(x.dim()))


VIEWS = (
    lambda draw, x: (draw(st.sampled_from(["transpose", torch.transpose])), _dims(draw, x, 2)),
    lambda draw, x: ("unsqueeze", (draw(st.integers(-x.dim() - 1, x.dim())),)),
    lambda draw, x: (draw(st.sampled_from(["contiguous", "clone", "detach"])), ()),
    _merge, _split, _permute, _repeated, _expanded, _part, _piece, _tiled,
)  # fmt: skip


@settings(max_examples=400, deadline=None)
@given(chains())
def test_axes_say_what_the_views_do(chain: tuple[tuple[int, ...], list[tuple[Any, tuple[Any, ...]]]]) -> None:
    shape, views = chain
    buffer, node, tensors = traced(shape, views)
    found = tracked(node, buffer)
    if found is None:  # not understood: no statement
        return
    assert len(found.axes) == tensors[-1].dim()
    assert torch.equal(by_axes(found, shape, tuple(tensors[-1].shape)), tensors[-1])


@pytest.mark.parametrize(
    ("views", "axes"),
    [
        ([], (("B",), ("H",), ("N",), ("D",))),
        ([("transpose", (2, 3))], (("B",), ("H",), ("D",), ("N",))),
        ([("repeat_interleave", (2, 1))], (("B",), ("H", "repeat"), ("N",), ("D",))),
        ([("reshape", (6, 4, 5))], (("B", "H"), ("N",), ("D",))),
        ([("unsqueeze", (2,)), ("expand", (2, 3, 7, 4, 5)), ("reshape", (2, 21, 4, 5))],
         (("B",), ("H", "repeat"), ("N",), ("D",))),
        ([("repeat", (1, 2, 1, 1))], (("B",), ("repeat", "H"), ("N",), ("D",))),
        ([("narrow", (1, 1, 2))], (("B",), ("part",), ("N",), ("D",))),
        ([("narrow", (1, 1, 2)), (operator.getitem, ((slice(None), slice(1, 2)),))], (("B",), (), ("N",), ("D",))),
        ([(operator.getitem, ((slice(None), slice(0, 3, 2)),))], None),
        ([(operator.getitem, ((slice(None), 1),))], None),
        ([("repeat", (2, 1, 2, 3))], None),
        ([("flip", (2,))], None),
        ([("reshape", (2, 3, 2, 10))], None),
        ([("narrow", (2, 0, 2))], (("B",), ("H",), ("N",), ("D",))),
        ([(operator.getitem, ((slice(None), slice(None), slice(3)),)), ("transpose", (1, 2)), ("reshape", (2, 9, 5))],
         (("B",), ("N", "H"), ("D",))),
        ([("narrow", (2, 1, 2))], None),
        ([(operator.getitem, ((Ellipsis, slice(0, 4, 2), slice(None)),))], None),
        ([("narrow", (2, 0, 3)), ("narrow", (2, 0, 2))], None),
        ([("narrow", (3, 0, 2))], None),
        ([("roll", (1, 2))], None),
    ],
)  # fmt: skip
def test_what_is_understood(views: list[tuple[Any, tuple[Any, ...]]], axes: Axes | None) -> None:
    buffer, node, _ = traced((2, 3, 4, 5), views)
    found = tracked(node, buffer)
    assert (None if found is None else found.axes) == axes
