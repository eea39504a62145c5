"""A graph whose KV buffers have a length that Dynamo leaves open, as one of buffers with room for more.

What a program does along that length besides storing and attention are masks: the numbers of all tokens are compared,
or masks come in as wide as a cache is. Each column of such a mask must be what it would be in a wider one: then the
graph of a wider cache does the same, if what lies behind the length is hidden (``growth_masks.py``).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import GraphModule, Node

from xquant_fx.cache.kv_tensor import QuantizedKV
from xquant_fx.passes.flex_masks import POINTWISE
from xquant_fx.passes.graph import LENGTH, clone, put_number, resized, simplified
from xquant_fx.passes.trace import argument, fake
from xquant_fx.passes.vocabulary import ELEMENTWISE, is_in_place, kind, op_name

#: What may be done along the length, besides what is done element by element.
_ELEMENTWISE = (ELEMENTWISE - {"dropout", "cat", "max"}) | {"cast", "contiguous", "detach", "clone"}
_DIMS = frozenset({"expand", "unsqueeze", "squeeze", "transpose", "permute", "mT", "T", "movedim"})
_RESHAPES = frozenset({"view", "reshape"})
_FILLED = frozenset({"zeros", "ones", "full", "new_zeros", "new_ones", "new_full"})


class FixedLengthError(Exception):
    """Why a graph is not one of buffers of any length."""


class Wide(NamedTuple):
    """The graph of buffers with more room, of the same inputs."""

    gm: GraphModule
    masks: Mapping[int, tuple[int, int]]
    """Of the inputs that are masks: along which dimension they are as long as buffers are, and the room."""


def open_lengths(gm: GraphModule) -> dict[Any, int]:
    """The lengths of quantized buffers that Dynamo left open, as symbols, and the room of graphs for each."""
    found: dict[Any, int] = {}
    for node in gm.graph.find_nodes(op="placeholder"):
        value = fake(node)
        if type(value) is QuantizedKV and value.spec.any_room:
            found[simplified(value.shape[2])] = value.spec.shape[2]
    return found


def wide(gm: GraphModule) -> Wide:
    """``gm`` as a graph of buffers with more room.

    Raises:
        FixedLengthError: it cannot be.
    """
    rooms = open_lengths(gm)
    if any(not getattr(length, "is_symbol", False) for length in rooms):
        raise FixedLengthError("how long a cache is follows from other numbers")
    made = clone(gm)
    lengths, marked = list[Node](), dict[Node, int]()
    for node in made.graph.nodes:
        value = node.meta.get("example_value")
        if isinstance(value, torch.SymInt) and simplified(value) in rooms:
            lengths.append(node)
        elif (changed := _widened(node, value, rooms)) is not value:
            node.meta["example_value"] = changed
            marked[node] = _dim(node, value, rooms)
            if node.op == "placeholder" and isinstance(value, QuantizedKV):
                node.meta[LENGTH] = value.shape[2]
    of_buffers = _of_buffers(made, marked)
    for node in lengths:
        _put_room(node, rooms[simplified(node.meta["example_value"])], of_buffers)
    masks = {}
    for place, node in enumerate(made.graph.find_nodes(op="placeholder")):
        if node in marked and node not in of_buffers:
            masks[place] = marked[node], fake(node).shape[marked[node]]  # type: ignore[union-attr]  # a tensor
    for node in marked.keys() - of_buffers:
        _check_mask(node, marked)
    made.recompile()
    return Wide(made, masks)


def _widened(node: Node, value: Any, rooms: Mapping[Any, int]) -> Any:
    """``value`` of ``node`` where buffers have that room, or itself."""
    if type(value) is QuantizedKV:
        open_length = value.spec.any_room and node.op == "placeholder"
        return QuantizedKV(value.spec, value.anchor) if open_length or _mentions(value.shape, rooms) else value
    if type(value) is FakeTensor:
        return resized(value, lambda size: _at(size, rooms))
    if any(_mentions((each,), rooms) for each in _numbers(value)):
        raise FixedLengthError(f"{op_name(node)} counts with how long a cache is")
    return value


def _numbers(value: Any) -> Iterator[Any]:
    """All numbers that Dynamo left open in the value of a node that is no tensor: of several tensors, those of each."""
    if isinstance(value, tuple | list):
        for each in value:
            yield from _numbers(each)
    elif isinstance(value, Tensor):
        yield from value.shape
    elif isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool):
        yield value


def _mentions(sizes: Sequence[Any], rooms: Mapping[Any, int]) -> bool:
    symbolic = (size.node for size in sizes if isinstance(size, torch.SymInt | torch.SymFloat | torch.SymBool))
    return any(node.shape_env.replace(node.expr).free_symbols & rooms.keys() for node in symbolic)


def _at(size: Any, rooms: Mapping[Any, int]) -> Any:
    """A size or a stride where buffers have that room; other symbols stay."""
    if not _mentions((size,), rooms):
        return size
    expression = simplified(size).subs(rooms)
    return int(expression) if expression.is_number else size.node.shape_env.create_symintnode(expression, hint=None)


def _dim(node: Node, value: Any, rooms: Mapping[Any, int]) -> int:
    """Along which dimension ``node`` is as long as buffers are.

    Raises:
        FixedLengthError: along several, or some multiple of it.
    """
    dims = [dim for dim, size in enumerate(value.shape) if _mentions((size,), rooms)]
    if len(dims) != 1 or simplified(value.shape[dims[0]]) not in rooms:
        raise FixedLengthError(f"{op_name(node)} gives what is not as long as a cache along one dimension")
    return dims[0]


def _of_buffers(gm: GraphModule, marked: Mapping[Node, int]) -> set[Node]:
    """What is as long as buffers are and computed from them: attention, of which passes leave nothing."""
    found: set[Node] = set()
    for node in gm.graph.nodes:
        is_buffer = node.op == "placeholder" and isinstance(fake(node), QuantizedKV)
        if node in marked and (is_buffer or found & set(node.all_input_nodes)):
            found.add(node)
    return found


def _put_room(node: Node, room: int, of_buffers: set[Node]) -> None:
    """``room`` in the place of a length where it says how large something is."""
    for user in list(node.users):
        is_size = kind(user) in _DIMS | _RESHAPES or (op_name(user) in _FILLED | {"arange"} and not _fills(node, user))
        if not is_size and not (user in of_buffers and kind(user) in ("getitem", "narrow", "view", "reshape")):
            raise FixedLengthError(f"{op_name(user)} takes how long a cache is")
        put_number(node, user, room)


def _fills(node: Node, user: Node) -> bool:
    """Whether ``user`` makes a tensor that is full of ``node``."""
    place = {"full": 1, "new_full": 2}.get(op_name(user))
    return place is not None and argument(user, place, "fill_value") is node


def _check_mask(node: Node, marked: Mapping[Node, int]) -> None:
    """Raise FixedLengthError unless ``node`` is a mask whose columns do not depend on how many there are."""
    for user in node.users:
        if user not in marked and kind(user) != "shape" and not _is_mask_of(node, user):
            raise FixedLengthError(f"{op_name(user)} reads what is as long as a cache")
    if node.op != "placeholder" and not _keeps_columns(node, marked):
        raise FixedLengthError(f"{op_name(node)} may not do in a longer cache what it does in a shorter one")


def _is_mask_of(node: Node, user: Node) -> bool:
    return kind(user) == "sdpa" and argument(user, 3, "attn_mask") is node and node not in list(user.args[:3])


def _keeps_columns(node: Node, marked: Mapping[Node, int]) -> bool:
    name, what = op_name(node), kind(node)
    if is_in_place(node):
        return False
    if name == "arange":
        begin, step = (node.args[0] if len(node.args) > 1 else 0), node.args[2:]
        in_order = type(begin) is int and begin == 0 and step in ((), (1,))
        return in_order and not {"start", "end", "step"} & node.kwargs.keys()
    if name in _FILLED or what in _ELEMENTWISE or name in POINTWISE or what in _DIMS:
        return True
    given = [each for each in node.all_input_nodes if each in marked]
    if what in _RESHAPES:
        return len(given) == 1 and _behind(node, marked) == _behind(given[0], marked)
    return what == "getitem" and len(given) == 1 and given[0] is node.args[0] and _takes_all(node.args[1])


def _behind(node: Node, marked: Mapping[Node, int]) -> int:
    """Elements of one column."""
    return int(fake(node).shape[marked[node] + 1 :].numel())  # type: ignore[union-attr]  # a tensor


def _takes_all(index: Any) -> bool:
    """Whether an index takes all along each dimension, from the first on, and may add some."""
    parts = index if isinstance(index, tuple | list) else (index,)
    return all(
        part is None or part is Ellipsis or (isinstance(part, slice) and not part.start and part.step in (None, 1))
        for part in parts
    )
