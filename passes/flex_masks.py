"""What flex attention lets be seen, of all pairs of tokens at once: a mask of bool [B or 1, H or 1, q or 1, N or 1].

A mask_mod, and a score_mod that hides, are graphs of one pair of tokens. Their ops are copied for four ``arange``, each
along its own dimension (``Evaluation``); the blocks of a ``BlockMask`` are spread over their tokens.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from xquant_fx.passes.graph import call
from xquant_fx.passes.trace import argument, fake, memory_of
from xquant_fx.passes.vocabulary import is_in_place, kind, op_name

#: Ops that give of all pairs of tokens what they give of each.
POINTWISE = frozenset(
    {"add", "sub", "mul", "truediv", "floordiv", "div", "floor_divide", "mod", "remainder", "fmod", "neg",
     "abs", "pow", "lshift", "rshift", "minimum", "maximum", "clamp", "lt", "le", "gt", "ge", "eq", "ne", "and",
     "or", "xor", "invert", "and_", "or_", "logical_and", "logical_or", "logical_xor", "logical_not",
     "bitwise_and", "bitwise_or", "bitwise_xor", "bitwise_not", "where", "to", "bool", "int", "long", "float"}
)  # fmt: skip
#: A number as a tensor, by ``size=()``.
_NUMBERS = frozenset({"new_ones", "new_zeros", "new_full"})

#: Numbers of rows, heads, new tokens and tokens of the cache, each along its own of four dimensions.
Dims = tuple[Node, Node, Node, Node]


class NotUnderstood(Exception):
    """Why an attention stays flex attention."""


class Masks:
    """The masks of ``graph``, made at its insertion point; layers whose masks are the same share them."""

    def __init__(self, graph: Graph) -> None:
        self.graph, self.made = graph, dict[Any, Any]()

    def _once(self, key: Any, make: Callable[[], Any], tensors: Iterable[Any] = ()) -> Any:
        """What ``make`` gives, as made before for ``key``; anew if the graph writes to one of the ``tensors``."""
        shown = {memory_of(each) for each in tensors if isinstance(each, Node)}
        if shown and any(is_in_place(node) and memory_of(node) in shown for node in self.graph.nodes):
            return make()
        if key not in self.made:
            self.made[key] = make()
        return self.made[key]

    def dims(self, sizes: tuple[int, ...], device: torch.device) -> Dims:
        """The numbers of an attention of these four sizes."""
        return self._once((sizes, device), lambda: tuple(self._numbers(*each, device) for each in enumerate(sizes)))  # type: ignore[no-any-return]

    def _numbers(self, dim: int, size: int, device: torch.device) -> Node:
        numbers = call(self.graph, torch.arange, (size,), dict(device=device))
        return call(self.graph, torch.reshape, (numbers, [1] * dim + [-1] + [1] * (3 - dim)))

    def by_score_mod(self, body: GraphModule, dims: Dims, captured: tuple[Any, ...]) -> Node | None:
        """What a score_mod leaves to be seen; None if all: it changes no score that it leaves."""
        score = next(iter(body.graph.nodes))
        result = body.graph.output_node().args[0]
        if result is score:
            return None
        by_hand = isinstance(result, Node) and kind(result) == "where" and result.args[1:] in [(score, -float("inf"))]
        if not by_hand or len(score.users) != 1 or not isinstance(result, Node):
            raise NotUnderstood("its score_mod is no torch.where(seen, score, -inf)")
        return self._of_pairs(body, result.args[0], (None, *dims), captured)

    def by_blocks(
        self, body: GraphModule, blocks: tuple[Any, ...], dims: Dims, captured: tuple[Any, ...]
    ) -> Node | None:
        """What a BlockMask, whose mask_mod is ``body``, lets be seen; None if all."""
        _, length, counts, listed, full_counts, full_listed = blocks[:6]
        width, tokens = blocks[-2], shape_of(dims[3])[3]
        ones = isinstance(counts, Node) and kind(counts) == "factory" and op_name(counts) == "ones"
        result = body.graph.output_node().args[0]
        of_all = isinstance(result, Node) and op_name(result) == "new_ones"
        seen = None if of_all else self._of_pairs(body, result, dims, captured)
        if ones and width >= tokens:  # what flex attention makes where it is given no block mask
            return seen
        if not isinstance(length, int) or length != tokens:
            raise NotUnderstood(f"its block mask is for {length} keys, and there are {tokens}")

        def join() -> Node:
            within = _tokens_of_blocks(self.graph, counts, listed, dims[3], width, tokens)
            found = within if seen is None else call(self.graph, operator.and_, (seen, within))
            if full_counts is None:
                return found
            whole = _tokens_of_blocks(self.graph, full_counts, full_listed, dims[3], width, tokens)
            return call(self.graph, operator.or_, (found, whole))

        return self._once((seen, *blocks[2:6], dims[3]), join, blocks[2:6])  # type: ignore[no-any-return]

    def _of_pairs(
        self, body: GraphModule, result: Any, inputs: tuple[Node | None, ...], captured: tuple[Any, ...]
    ) -> Node:
        """``result`` of ``body``, a graph of one pair of tokens, of all pairs."""
        key = (body.code, str(result), inputs, captured)
        made = self._once(key, lambda: Evaluation(self.graph, body, (*inputs, *captured)).of(result), captured)
        return made  # type: ignore[no-any-return]


def shape_of(node: Any) -> torch.Size:
    """Shape of the tensor ``node``."""
    return _tensor(node).shape


def device_of(node: Any) -> torch.device:
    """Device of the tensor ``node``."""
    return _tensor(node).device


def _tensor(node: Any) -> torch.Tensor:
    value = fake(node)
    if value is None:
        raise NotUnderstood("shapes are unknown")
    return value


def _tokens_of_blocks(graph: Graph, counts: Any, listed: Any, tokens: Node, width: int, length: int) -> Node:
    """Whether each of ``length`` tokens is in one of the first ``counts`` [B, H, 1] blocks ``listed`` [B, H, 1, n]."""
    shape = shape_of(listed)
    if shape[2] != 1:
        raise NotUnderstood("its blocks have fewer query tokens than the step")
    numbers = [call(graph, torch.arange, (n,), dict(device=device_of(listed))) for n in (shape[3], -(-length // width))]
    of_slots = call(graph, operator.lt, (numbers[0], call(graph, torch.unsqueeze, (counts, -1))))
    is_block = call(graph, operator.eq, (call(graph, torch.unsqueeze, (listed, -1)), numbers[1]))
    both = call(graph, operator.and_, (is_block, call(graph, torch.unsqueeze, (of_slots, -1))))
    present = call(graph, torch.any, (both, -2))
    block = call(graph, operator.floordiv, (call(graph, torch.reshape, (tokens, [-1])), width))
    return call(graph, torch.index_select, (present, -1, block))


class Evaluation:
    """Copies what a result needs of ``body`` to ``graph``, with ``inputs`` for its placeholders."""

    def __init__(self, graph: Graph, body: GraphModule, inputs: tuple[Any, ...]) -> None:
        self.graph = graph
        places = body.graph.find_nodes(op="placeholder")
        if len(places) != len(inputs):
            raise NotUnderstood("its score_mod or mask_mod takes other arguments than torch 2.11 and 2.13 give it")
        self.made: dict[Node, Any] = dict(zip(places, inputs, strict=True))
        #: What has been looked up so far of a tensor of more dimensions: (the tensor, indices).
        self.part: dict[Node, tuple[Any, tuple[Any, ...]]] = {}

    def of(self, result: Any) -> Node:
        """The node of ``result``, of bool."""
        found = self._value(result)
        value = fake(found)
        if value is None or value.dtype != torch.bool:
            raise NotUnderstood("its mask is no tensor of bool")
        if value.dim() == 0:
            found = call(self.graph, torch.reshape, (found, [1] * 4))
        return found  # type: ignore[no-any-return]

    def _value(self, node: Any) -> Any:
        if not isinstance(node, Node):
            return node
        if node not in self.made:
            self.made[node] = self._copy(node)
        if self.made[node] is None:
            raise NotUnderstood("its mask depends on scores, or on a row of a table")
        return self.made[node]

    def _copy(self, node: Node) -> Any:
        if node.op not in ("call_function", "call_method"):
            raise NotUnderstood(f"its mask_mod has a {node.op}")
        if kind(node) == "getitem":
            return self._looked_up(node)
        name = op_name(node)
        is_number = name in _NUMBERS and argument(node, 1, "size", None) in ((), [])
        if is_in_place(node) or not (is_number or name in POINTWISE or name.strip("_") in POINTWISE):
            raise NotUnderstood(f"its mask_mod has a {name}, which is not known to work element by element")
        args, kwargs = map_arg((node.args, node.kwargs), self._value)
        target = node.target if node.op == "call_function" else getattr(torch.Tensor, str(node.target))
        return call(self.graph, target, args, kwargs)

    def _looked_up(self, node: Node) -> Any:
        """``table[b, kv]``, also as ``table[b][kv]``: all indices at once, whose dimensions broadcast."""
        table, index = node.args
        if isinstance(table, Node) and kind(table) == "getitem" and table not in self.made:
            self.made[table] = self._looked_up(table)
        before, indices = self.part.get(table, (None, ())) if isinstance(table, Node) else (None, ())
        whole = before if indices else self._value(table)
        given = index if isinstance(index, tuple) else (index,)
        indices = (*indices, *(self._value(each) for each in given))
        if not all(isinstance(each, int | Node) for each in indices):
            raise NotUnderstood("its mask_mod looks up a slice")
        if len(shape_of(whole)) > len(indices):
            self.part[node] = whole, indices
            return None
        return call(self.graph, operator.getitem, (whole, indices))
