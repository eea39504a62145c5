"""Pasts that a graph carries on without an append that is recognised: it returns them moved, with more among them.

What attention reads is put together of an input by ops that move numbers (``cat``, ``pad``, ``flip``), and so is a
result of the graph that has the sizes of that input but for one: the cache of the next step. Where it is longer than
the input, numbers may be changed one by one on the way, too (a past that decays, keys that are turned anew).
No rewrite depends on this; people are told of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch.fx import Graph, Node

from xquant_fx.passes.trace import argument, fake, is_view_like, operand, value_of
from xquant_fx.passes.vocabulary import ELEMENTWISE, kind, op_name

#: Ops that give what they get, but for some places.
UPDATES = (
    "index_copy", "index_put", "index_add", "index_fill", "where", "scatter", "slice_scatter", "select_scatter",
    "masked_scatter", "roll",
)  # fmt: skip
#: And those that only choose, repeat or order numbers, beside what is a view (``is_view_like``).
MOVES = (*UPDATES, "pad", "constant_pad_nd", "flip", "index_select", "gather", "take_along_dim", "unbind", "select")
FAR = 64  # nodes to look at, going back from one


def moved_from(
    node: Node, put_into: Callable[[Node], Iterable[Node]], stop: Callable[[Node], bool], changed: bool = False
) -> Iterator[Node]:
    """The inputs that ``node`` is put together of, nearest first.

    Args:
        put_into: what ops in place put into a tensor that the graph makes.
        stop: what is not looked behind.
        changed: whether ops element by element count as moves, too.
    """
    queue = [node]
    for _, each in zip(range(FAR), queue, strict=False):  # the queue grows meanwhile
        if each.op == "placeholder":
            yield each
        elif not stop(each):
            parts = each.all_input_nodes if is_move(each) or (changed and kind(each) in ELEMENTWISE) else []
            queue += [n for n in dict.fromkeys([*parts, *put_into(each)]) if n not in queue]


def is_move(node: Node) -> bool:
    """Whether ``node`` moves numbers of its operands and computes none."""
    return is_view_like(node) or kind(node) in ("cat", "stack") or op_name(node) in MOVES


def behind_views(node: Node) -> Node:
    """What ``node`` is a view of."""
    while node.all_input_nodes and (is_view_like(node) or op_name(node) in ("unbind", "select")):
        node = node.all_input_nodes[0]
    return node


def results(graph: Graph) -> list[Node]:
    """The tensors that ``graph`` returns."""
    return list(dict.fromkeys(node for node in graph.output_node().all_input_nodes if fake(node) is not None))


def may_be_past(node: Node) -> bool:
    """Whether it is an input with the dimensions of keys or values that no optimizer owns."""
    value = fake(node)
    if node.op != "placeholder" or value is None or value.dim() < 3 or not value.dtype.is_floating_point:
        return False
    return not isinstance(value, torch.nn.Parameter) and not (value.requires_grad and value.is_leaf)


def differences(past: Node, new: torch.Tensor) -> int:
    """In how many sizes the input ``past`` and ``new`` differ: a cache before and after a step in one at most."""
    old = fake(past)
    if not may_be_past(past) or old is None or old.dim() != new.dim() or old.dtype != new.dtype:
        return new.dim()
    return sum(str(x) != str(y) for x, y in zip(old.shape, new.shape, strict=True))


def size(past: Node) -> float:
    """Elements of an input; one of a size left open is larger than any other."""
    value = fake(past)
    count = 0 if value is None else value.numel()
    return count if isinstance(count, int) else float("inf")


def is_near(node: Node, operand: Node) -> bool:
    """Whether ``operand`` is ``node`` but for what is done element by element (rotated keys)."""
    queue = [operand]
    for _, each in zip(range(FAR), queue, strict=False):  # the queue grows meanwhile
        if each is node:
            return True
        if kind(each) in ELEMENTWISE or is_view_like(each):
            queue += [n for n in each.all_input_nodes if n not in queue]
    return False


def of_convolution(write: Node, target: Node, state: Node) -> bool:
    """Whether ``write`` copies ``cat([state, new], -1)[..., -n:]`` over the state: what came last.

    So the state of a causal convolution [B, C, n] goes on. Keys and values have channels there.
    """
    last = _uncast(operand(write, 1))
    if kind(write) != "copy" or target is not state or last is None or kind(last) != "getitem":
        return False
    index, whole = last.args[1], _uncast(operand(last))
    if not isinstance(index, tuple) or not isinstance(index[-1], slice) or index[-1] == slice(None):
        return False
    if whole is None or kind(whole) != "cat" or argument(whole, 1, "dim", 0) not in (-1, value_of(state).dim() - 1):
        return False
    return all(part in (Ellipsis, slice(None)) for part in index[:-1]) and state in whole.all_input_nodes


def _uncast(node: Node | None) -> Node | None:
    while node is not None and kind(node) == "cast":
        node = operand(node)
    return node
