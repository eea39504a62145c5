"""Find the layers of a graph: stretches of it that are the same but for what they are given.

Nodes are compared by what they do and by the shapes that they do it to, never by name. A stretch ends behind a kernel
of ours, with which nothing is fused, so that what is compiled stretch by stretch becomes the same kernels.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from sympy import Symbol  # type: ignore[import-untyped]
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import Graph, Node

from xquant_fx.compiler.open_numbers import is_number, known_of, number_of
from xquant_fx.passes.find_writes import is_opaque, other_mutations
from xquant_fx.passes.trace import fake, memory_of
from xquant_fx.passes.vocabulary import op_name

#: Fewer equal stretches are not worth it: what stands around them is compiled, too.
LEAST = 4
#: Layers in one stretch, where each second or sixth is of another kind, say.
MOST_LAYERS = 12


class Piece(NamedTuple):
    """Nodes in a row."""

    nodes: list[Node]
    given: list[Node]
    """What they read from outside, in the order of first use."""
    form: Hashable
    """Equal for pieces that do the same to what they are given."""


class Repetition(NamedTuple):
    """``times`` equal stretches of ``period`` nodes, from number ``begin`` on."""

    begin: int
    period: int
    times: int


def pieces_of(graph: Graph) -> list[Piece]:
    """All nodes that compute, in order, in as many equal pieces as there are; one piece if none repeats."""
    nodes = [node for node in graph.nodes if node.op not in ("placeholder", "output")]
    return [_piece(stretch) for stretch in _stretches(nodes)]


def why_not_apart(graph: Graph, pieces: Sequence[Piece]) -> str:
    """Why ``pieces`` cannot be compiled one by one; empty if they can.

    What goes from one to the other must be a tensor of known shape, and no view of memory that another piece writes.
    Numbers that are known in a step only, such as how long a cache is, may be among the inputs, and sizes of those that
    are read by pieces of which there is one.
    """
    times = Counter(piece.form for piece in pieces)
    repeated = {given for piece in pieces if times[piece.form] > 1 for given in piece.given}
    for node in graph.find_nodes(op="placeholder"):
        if reason := _why_not_given(node, node in repeated):
            return reason
    inside = {node: i for i, piece in enumerate(pieces) for node in piece.nodes}
    for node in graph.nodes:
        if node.op in ("call_module", "get_attr") or is_opaque(node):
            return f"{node.name} holds something of its own"
        if node.op in ("call_method", "call_function") and "as_strided" in op_name(node):
            return f"{node.name} counts from where a storage begins, which is elsewhere in each layer's"
    for node, target in other_mutations(graph, []):
        memory = memory_of(target)
        if memory.op != "placeholder" and inside.get(memory) != inside[node]:
            return f"{node.name} writes to what another piece computed"
    for given in {given for piece in pieces for given in piece.given if given.op != "placeholder"}:
        if not _is_static(fake(given)) or memory_of(given).op == "placeholder":
            return f"{given.name} is no tensor of known shape and memory of its own"
    return ""


def _why_not_given(node: Node, repeated: bool) -> str:
    """Why the input ``node`` cannot be given to pieces; ``repeated``: to some of which there are several."""
    if is_number(node):
        follows = node.users and not number_of(node).is_Atom
        return f"{node.name} is a number that follows from others" if follows else ""
    has_shape = fake(node) is not None if not repeated else _is_static(fake(node))
    return "" if has_shape else f"{node.name} is no tensor of known shape"


def _is_static(value: Tensor | None) -> bool:
    return value is not None and all(type(size) is int for size in (*value.shape, *value.stride()))


def _stretches(nodes: Sequence[Node]) -> Iterator[Sequence[Node]]:
    found = _longest(nodes)
    if found is None:
        if nodes:
            yield nodes
        return
    end = found.begin + found.times * found.period
    if not any(_is_kernel(node) for node in nodes[end:]):
        end -= found.period  # the last layer and what follows: only wrappers with a kernel of ours are known to us
    yield from _stretches(nodes[: found.begin])
    for begin in range(found.begin, end, found.period):
        yield nodes[begin : begin + found.period]
    yield from _stretches(nodes[end:])


def _longest(nodes: Sequence[Node]) -> Repetition | None:
    """The repetition that spares most nodes; of several the one where the least crosses its borders."""
    looks = [hash(look) for look in map(_look, nodes)]
    ends = [i for i, node in enumerate(nodes) if _is_kernel(node)]
    alike = dict[int, list[int]]()
    for i in ends:
        alike.setdefault(looks[i], []).append(i)
    periods = {
        b - a for places in alike.values() for i, a in enumerate(places) for b in places[i + 1 : i + MOST_LAYERS]
    }
    crossing = _crossing(nodes)
    found = [
        (-(count - 1) * period, crossing[end + 1], Repetition(end + 1, period, count))
        for period in sorted(periods)
        for begin, stop in _runs(looks, period)
        for end in ends
        if begin <= end + 1 and (count := (stop - end - 1) // period) >= LEAST
    ]
    for _, _, repetition in sorted(found):
        if (times := _equal(nodes, repetition)) >= LEAST:
            return repetition._replace(times=times)
    return None


def _runs(looks: Sequence[int], period: int) -> Iterator[tuple[int, int]]:
    """(begin, end) of stretches in which each node looks like that one period before, or is in the first period."""
    begin = None
    for i in range(len(looks) - period + 1):
        if i < len(looks) - period and looks[i] == looks[i + period]:
            begin = i if begin is None else begin
        elif begin is not None:
            yield begin, i + period
            begin = None


def _equal(nodes: Sequence[Node], found: Repetition) -> int:
    """How many of the stretches, from the first on, are equal in all."""
    stretches = (nodes[found.begin + i * found.period :][: found.period] for i in range(found.times))
    first = _piece(next(stretches)).form
    count = 1
    for stretch in stretches:
        if _piece(stretch).form != first:
            break
        count += 1
    return count


def _crossing(nodes: Sequence[Node]) -> list[int]:
    """Bytes of values that are computed before each node, and used there or later; one more for the end."""
    number = {node: i for i, node in enumerate(nodes)}
    changes = [0] * (len(nodes) + 2)
    for i, node in enumerate(nodes):
        value = fake(node)
        size = value.numel() * value.itemsize if value is not None and _is_static(value) else 0
        until = max((number.get(user, len(nodes)) for user in node.users), default=i)
        changes[i + 1] += size
        changes[until + 1] -= size
    total, found = 0, list[int]()
    for change in changes[:-1]:
        total += change
        found.append(total)
    return found


def _is_kernel(node: Node) -> bool:
    """Whether ``node`` is an op of ours, and one tensor."""
    return isinstance(node.target, OpOverload) and node.target.namespace == "xquant" and fake(node) is not None


def _look(node: Node) -> Hashable:
    """What ``node`` does, without who gives it its operands."""
    return _described(node, described_value)


def _piece(nodes: Sequence[Node]) -> Piece:
    inside, given = {node: i for i, node in enumerate(nodes)}, dict[Node, int]()

    def name(operand: Node) -> Hashable:
        if operand in inside:
            return "computed", inside[operand]
        place = given.setdefault(operand, len(given))
        if is_number(operand):  # which others are the same, and what is known of it, shows in the code of a piece
            same = [i for node, i in given.items() if is_number(node) and number_of(node) == number_of(operand)]
            return "given", place, same[0], tuple(_known_of(operand))
        return "given", place, described_value(operand)

    form = tuple(_described(node, name) for node in nodes)
    return Piece(list(nodes), list(given), form)


def _known_of(number: Node) -> list[str]:
    symbol, env = number_of(number), number.meta["example_value"].node.shape_env
    return known_of(env, {symbol: Symbol("n")}) if symbol.is_symbol else [str(symbol)]


def _described(node: Node, name: Callable[[Node], Hashable]) -> Hashable:
    given = compared(node.args, name), compared(node.kwargs, name)
    return node.op, node.target, given, described_value(node)


def described_value(node: Node) -> Hashable:
    """Layout of the tensor that ``node`` gives, or of what type its value is."""
    value = fake(node)
    if value is None or not _is_static(value):
        return str(type(node.meta.get("example_value")))
    return tuple(value.shape), value.stride(), value.dtype, value.device


def compared(value: Any, name: Callable[[Node], Hashable], leaf: Callable[[Any], Hashable] | None = None) -> Hashable:
    """An argument as something that can be compared: nodes by ``name``, what holds no others by ``leaf``."""
    leaf = leaf or _leaf
    if isinstance(value, Node):
        return name(value)
    if isinstance(value, tuple | list):
        return type(value).__name__, tuple(compared(each, name, leaf) for each in value)
    if isinstance(value, dict):
        return "dict", tuple((key, compared(each, name, leaf)) for key, each in value.items())
    if isinstance(value, slice):
        return "slice", tuple(compared(each, name, leaf) for each in (value.start, value.stop, value.step))
    return leaf(value)


def _leaf(value: Any) -> Hashable:
    """Numbers of different types differ."""
    if isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool):  # have no hash, or one that is guarded on
        return type(value).__name__, str(value)
    if isinstance(value, float) and (math.isnan(value) or value == 0):
        return "float", repr(value)
    return type(value).__name__, value
