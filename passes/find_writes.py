"""Find appends to KV buffers: ``index_copy_``, indexed assignment, also at a position per row, growth by
concatenation, and sliding windows."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch.fx import Graph, Node

from xquant_fx.cache.allocate import quantized_empty
from xquant_fx.cache.kv_tensor import QuantizedKV
from xquant_fx.kernels.rows import write_rows_
from xquant_fx.passes.find_slides import find_slide, last_tokens_of
from xquant_fx.passes.records import Write
from xquant_fx.passes.trace import argument, fake, full_index, is_returned, is_whole, memory_of, number_by_now, value_of
from xquant_fx.passes.vocabulary import is_in_place, kind


def find_writes(graph: Graph) -> list[Write]:
    """All recognised appends to buffers [B, H, N, D] (inputs, or allocated in ``graph``), in program order."""
    finders = (_index_copy, _setitem, _row_write, concatenation, _slide)
    writes = (next(filter(None, (find(node) for find in finders)), None) for node in graph.nodes)
    return [write for write in writes if write is not None]


def other_mutations(graph: Graph, known: list[Write]) -> list[tuple[Node, Node]]:
    """(op, node it writes to), for all ops that are not ``known`` writes."""
    seen = {write.node for write in known}
    return [(node, operand) for node in graph.nodes if node not in seen for operand in written_by(node)]


def written_by(node: Node) -> list[Node]:
    """The operands that ``node`` writes to: as an op in place, by ``out=`` or by the op's schema."""
    if node.op not in ("call_method", "call_function"):
        return []
    found = list[object]([node.kwargs["out"]] if "out" in node.kwargs else [])
    if is_in_place(node):
        found.append(argument(node, 0, "input"))
    if node.op == "call_function":
        found += [argument(node, i, name) for i, name in _written_arguments(node.target)]
    if not found:
        return []
    flat = [part for each in found for part in (each if isinstance(each, tuple | list) else (each,))]
    return list(dict.fromkeys(part for part in flat if isinstance(part, Node)))


@functools.lru_cache(maxsize=4096)
def _written_arguments(target: Any) -> tuple[tuple[int, str], ...]:
    """Place and name of the arguments that ``target`` writes to, by its schema."""
    schema = getattr(getattr(target, "default", target), "_schema", None)  # of an op called without its overload, too
    if not isinstance(schema, torch.FunctionSchema):
        return ()
    aliases = [(i, a.name, a.alias_info) for i, a in enumerate(schema.arguments)]
    return tuple((i, name) for i, name, alias in aliases if alias is not None and alias.is_write)


def written_memory(graph: Graph) -> set[Node]:
    """Whose memory ops of ``graph`` write to, as far as views show (``memory_of``)."""
    return {memory_of(each) for node in graph.nodes for each in written_by(node)}


def is_opaque(node: Node) -> bool:
    """Whether ``node`` runs a graph of its own, where a write would not be seen (flex attention only reads)."""
    higher = isinstance(node.target, torch._ops.HigherOrderOperator)
    return higher and node.target is not torch.ops.higher_order.flex_attention


def is_factory(node: Node) -> bool:
    """Whether ``node`` allocates a buffer inside the graph."""
    return kind(node) == "factory"


def _is_buffer(node: object) -> bool:
    value = fake(node)
    if not isinstance(node, Node) or value is None or value.dim() != 4:
        return False
    return node.op == "placeholder" or node.target is quantized_empty or is_factory(node)


def appended(node: Node) -> object:
    """What the append ``node`` writes, as the graph has it now (of a window that a prompt fills: its last part)."""
    if kind(node) == "cat":
        return argument(node, 0, "tensors")[1]  # type: ignore[index]  # two parts: that is how it was found
    if kind(node) == "copy":
        return argument(node, 1, "src")
    return (
        argument(node, 2, "value")
        if kind(node) == "setitem" or node.target is write_rows_
        else argument(node, 3, "source")
    )


def _row_write(node: Node) -> Write | None:
    """What ``row_writes.py`` has made of an append at a position per row."""
    if node.target is not write_rows_ or not _is_buffer(node.args[0]):
        return None
    buffer, positions, x = node.args
    assert isinstance(buffer, Node) and isinstance(positions, Node) and isinstance(x, Node)
    return Write(node, buffer, x, positions, "position per row", value_of(x).shape[2], per_row=True)


def _slide(node: Node) -> Write | None:
    write = find_slide(node)
    return write if write is not None and _is_buffer(write.buffer) else None


def _index_copy(node: Node) -> Write | None:
    if kind(node) != "index_copy" or not _is_buffer(node.args[0]):
        return None
    dim, index, x = argument(node, 1, "dim"), argument(node, 2, "index"), appended(node)
    if dim not in (2, -2) or not isinstance(index, Node) or not isinstance(x, Node):
        return None
    return _write(node, node.args[0], x, index, "index_copy_")


def _setitem(node: Node) -> Write | None:
    if kind(node) != "setitem" or not _is_buffer(node.args[0]):
        return None
    buffer, index, x = node.args[0], node.args[1], appended(node)
    assert isinstance(buffer, Node)
    positions, value = _token_index(index, value_of(buffer).shape), fake(x)
    if positions is None or value is None or value.dim() < 2 or not isinstance(x, Node):
        return None
    return _write(node, buffer, x, positions, "indexed assignment")


def concatenation(node: Node) -> Write | None:
    """``cat([past, x], dim=2)`` that the graph returns, or the last tokens of it: the cache of the next step."""
    value, parts = fake(node), argument(node, 0, "tensors")
    if kind(node) != "cat" or value is None or value.dim() != 4 or argument(node, 1, "dim", 0) not in (2, -2):
        return None
    kept, keep = (None, 0) if is_returned(node) else _last_tokens(node)
    if not isinstance(parts, tuple | list) or len(parts) != 2 or not is_returned(kept or node):
        return None
    past, x = parts
    before, new = fake(past), fake(x)
    if before is None or new is None or new.dim() != 4 or not (isinstance(past, Node) and isinstance(x, Node)):
        return None
    if isinstance(before, QuantizedKV) or (past.op != "placeholder" and not _is_nothing(before)):
        return None  # a quantized buffer does not grow: it is read here
    return Write(node, node, x, slice(None, None), "concatenation", new.shape[2], past, kept, keep)


def _last_tokens(node: Node) -> tuple[Node | None, int]:
    """What ``node[:, :, -n:]`` the graph returns, and n: a sliding window's cache, whose tokens before are not kept."""
    for user in node.users:
        found = last_tokens_of(user) if is_returned(user) else None
        if found is not None and found[0] is node:
            return user, found[1]
    return None, 0


def _is_nothing(value: torch.Tensor) -> bool:
    return all(isinstance(size, int) for size in value.shape) and value.numel() == 0


def _write(node: Node, buffer: object, x: Node, positions: Node | slice, name: str) -> Write | None:
    assert isinstance(buffer, Node)
    value, tokens = fake(x), _count(positions)
    # One token may be written to several positions; otherwise what is written says how many there are.
    if value is not None and value.dim() == 4 and (not isinstance(tokens, int) or value.shape[2] != 1):
        tokens = value.shape[2]
    return Write(node, buffer, x, positions, name, tokens)


def _count(positions: Node | slice) -> object:
    """How many positions there are; None where that is unknown."""
    if isinstance(positions, Node):
        index = fake(positions)
        return None if index is None else index.numel()
    start, stop = (b.meta.get("example_value") if isinstance(b, Node) else b for b in (positions.start, positions.stop))
    if not (isinstance(start, int | torch.SymInt) and isinstance(stop, int | torch.SymInt)):
        return None
    return number_by_now(stop - start)


def _token_index(index: object, shape: torch.Size) -> Node | slice | None:
    """The index of dimension 2 if every other dimension is taken whole."""
    items = full_index(index, 4)
    if items is None or not all(is_whole(items[d], shape[d]) for d in (0, 1, 3)):
        return None
    tokens = items[2]
    if isinstance(tokens, Node):
        value = fake(tokens)
        return tokens if value is not None and value.dim() == 1 and value.dtype in (torch.int64, torch.int32) else None
    return _span(tokens, shape[2]) if isinstance(tokens, slice) and tokens.step in (None, 1) else None


def _span(tokens: slice, size: object) -> slice | None:
    """``tokens`` with both ends given and, where they are numbers, counted from the front.

    None where it is the whole buffer: that is how a sliding window is written back.
    """
    start = 0 if tokens.start is None else tokens.start
    stop = size if tokens.stop is None else tokens.stop
    if isinstance(size, int):
        start, stop = (bound + size if isinstance(bound, int) and bound < 0 else bound for bound in (start, stop))
    known = all(isinstance(bound, int | Node) for bound in (start, stop))
    return slice(start, stop) if known and (start, stop) != (0, size) else None
