"""Stretches of a graph that nothing but ordinary tensors goes through, between what reads or writes a cache.

A prompt's graph runs op by op, as its attention and its appends are kernels and Python of ours. What lies between, most
of a layer, can be compiled (``compiled_prompts.py``). Stretches are compared by what they do and by shapes, of which
some are symbols of the graph's own: equal ones are equal whatever these turn out to be.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterable, Iterator, Mapping
from typing import Any

from torch import SymBool, SymFloat, SymInt, Tensor
from torch._ops import HigherOrderOperator, OpOverload, OpOverloadPacket
from torch.fx import Graph, Node
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from xquant_fx.cache.allocate import quantized_empty
from xquant_fx.compiler.open_numbers import is_number, number_of
from xquant_fx.compiler.repeats import Piece, compared
from xquant_fx.passes.find_writes import other_mutations
from xquant_fx.passes.graph import simplified
from xquant_fx.passes.trace import fake, is_view_like, memory_of
from xquant_fx.passes.vocabulary import kind, op_name

#: Fewer ops that compute than these are called sooner than what is made of them.
LEAST = 4
#: Where functions come from that a graph may hold as well as any compiler.
_KNOWN_MODULES = ("torch", "_operator", "operator", "math", "builtins")
#: Ops that change what those behind them mean.
_STATES = ("autocast", "set_grad_enabled", "inference_mode", "stream")
_NUMBERS = (int, float, bool, SymInt, SymFloat, SymBool)
#: Ops that do nothing to anything in a graph.
_NOTES = ("_log_api_usage_once",)


def why_none(graph: Graph) -> str:
    """Why nothing of ``graph`` can be compiled by itself; empty if it can."""
    called = (op_name(node) for node in graph.nodes if node.op in ("call_function", "call_method"))
    found = next((name for name in called if any(state in name for state in _STATES)), None)
    return "" if found is None else f"{found} changes what the ops behind it mean"


def stretches_of(graph: Graph, cached: Collection[Node], read_by: Collection[Node]) -> list[Piece]:
    """What can be compiled by itself, in order.

    Args:
        graph: it is not changed.
        cached: inputs and nodes that hold, or may hold in a step, what is quantized.
        read_by: nodes that read such, whose results are ordinary tensors.
    """
    closed = _closed(graph, cached, read_by)
    found = (stretch for stretch in _open(graph, closed) if _is_worth_it(stretch) and _gives_tensors(stretch))
    numbers = {number_of(node): node for node in graph.find_nodes(op="placeholder") if is_number(node)}
    pieces = (_with_numbers(_piece(stretch), numbers) for stretch in found)
    return [piece for piece in pieces if piece is not None]


def _closed(graph: Graph, cached: Collection[Node], read_by: Collection[Node]) -> set[Node]:
    """Nodes that stay as they are: they read or write a cache, change what they are given, or are not known to us."""
    written = {memory_of(target) for _, target in other_mutations(graph, [])}
    closed = {node for node, _ in other_mutations(graph, [])}
    holding = {*cached, *graph.find_nodes(op="call_function", target=quantized_empty)}
    for node in graph.nodes:
        if node.op not in ("call_function", "call_method", "call_module"):
            continue
        if any(given in holding for given in node.all_input_nodes):
            closed.add(node)
            if node not in read_by:
                holding.add(node)
        elif node in holding or _is_unknown(node) or memory_of(node) in written:
            closed.add(node)
    return closed


def _is_unknown(node: Node) -> bool:
    """Whether ``node`` is none of torch's ops, of shapes that are known before it has run."""
    if node.op == "call_module" or isinstance(node.target, HigherOrderOperator) or kind(node) == "sdpa":
        return True
    if isinstance(node.target, OpOverload | OpOverloadPacket):
        of_aten = str(node.target).startswith("aten.")
    else:
        module = getattr(node.target, "__module__", None)
        of_aten = module is None or module.split(".")[0] in _KNOWN_MODULES
    value = fake(node)
    return not of_aten or (value is not None and bool(free_unbacked_symbols(value)))


def _open(graph: Graph, closed: Collection[Node]) -> Iterator[list[Node]]:
    """Stretches between ``closed`` nodes, and those that numbers follow from."""
    stretch = list[Node]()
    for node in graph.nodes:
        if node.op in ("placeholder", "get_attr"):
            continue
        beside = node.op != "output" and node not in closed and _is_beside(node)
        if beside and not set(node.all_input_nodes) & set(stretch):
            continue
        if beside or node.op == "output" or node in closed:
            yield stretch
            stretch = []
        else:
            stretch.append(node)


def _is_beside(node: Node) -> bool:
    """Whether ``node`` gives numbers, which stretches are given, or nothing to nobody."""
    value = node.meta.get("example_value")
    if isinstance(value, tuple | list) and value:
        return all(isinstance(each, _NUMBERS) for each in value)
    return isinstance(value, _NUMBERS) or op_name(node) in _NOTES


def _is_worth_it(stretch: Iterable[Node]) -> bool:
    return sum(not is_view_like(node) for node in stretch) >= LEAST


def returned(stretch: Iterable[Node]) -> list[Node]:
    """The nodes that others read."""
    inside = set(stretch)
    return [node for node in stretch if any(user not in inside for user in node.users)]


def _gives_tensors(stretch: list[Node]) -> bool:
    return all(fake(node) is not None for node in returned(stretch))


def _piece(nodes: list[Node]) -> Piece:
    inside, given = {node: i for i, node in enumerate(nodes)}, dict[Node, int]()

    def name(operand: Node) -> Hashable:
        if operand in inside:
            return "computed", inside[operand]
        return "given", given.setdefault(operand, len(given)), _described(operand)

    form = tuple(
        (node.op, node.target, compared(node.args, name), compared(node.kwargs, name), _described(node))
        for node in nodes
    )
    return Piece(nodes, list(given), form)


def _with_numbers(piece: Piece, numbers: Mapping[Any, Node]) -> Piece | None:
    """``piece``, given those of ``numbers``, too, that nothing it is given is, or has for a size; None: there are none.

    Of a number that follows from others nobody could tell these.
    """
    told = {size for node in piece.given for size in _open_sizes(node) if size.is_Symbol}
    sizes = [size for node in (*piece.given, *piece.nodes) for size in (*_open_sizes(node), *_open_strides(node))]
    missing = sorted({symbol for size in sizes for symbol in size.free_symbols} - told, key=str)
    if not all(symbol in numbers for symbol in missing):
        return None
    return piece._replace(given=[*piece.given, *(numbers[symbol] for symbol in missing)])


def _open_sizes(node: Node) -> list[Any]:
    """What Dynamo left open of the number, or the sizes of the tensor, that ``node`` gives."""
    value = node.meta.get("example_value")
    return [simplified(size) for size in (getattr(value, "shape", None) or (value,)) if isinstance(size, SymInt)]


def _open_strides(node: Node) -> list[Any]:
    value = fake(node)
    return [] if value is None else [simplified(each) for each in value.stride() if isinstance(each, SymInt)]


def _described(node: Node) -> Hashable:
    """What is known of the value of ``node``, in the graph's symbols."""
    value = node.meta.get("example_value")
    if isinstance(value, Tensor):
        sizes = [str(simplified(size)) for size in (*value.shape, *value.stride())]
        return type(value).__name__, *sizes, value.dtype, value.device
    return type(value).__name__, str(simplified(value)) if isinstance(value, SymInt) else str(value)
