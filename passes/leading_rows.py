"""Rewrite a graph that takes the first rows of a buffer for more rows, so that these are an input of their own.

    keys[:2, :, pos] = k                            rows[:, :, pos] = k
    attention(q, keys[:2], ...)             =>      attention(q, rows, ...)

for ``keys`` [8, H, N, D]. Programs that allocate for the largest batch do so. One row that is taken by its number,
``keys[0:1]``, is a row of a batch whose rows come and go (``row_uses.py``).
"""

from __future__ import annotations

from typing import Any

from torch.fx import Graph, Node

from xquant_fx.passes.find_writes import written_by
from xquant_fx.passes.graph import input_beside, note_added
from xquant_fx.passes.trace import argument, fake, full_index, is_whole, value_of
from xquant_fx.passes.vocabulary import kind


def takes_rows(buffer: Node) -> bool:
    """Whether some use of ``buffer`` takes first rows of it, and not all."""
    value = fake(buffer)
    is_known = value is not None and value.dim() in (3, 4) and isinstance(value.shape[0], int)
    return is_known and any(_rows(use, buffer) is not None for use in buffer.users)


def leading_rows(buffer: Node) -> int | None:
    """How many rows all uses of ``buffer`` take, from the first on, where tokens are appended to them; else None."""
    if not takes_rows(buffer):
        return None
    uses = list(buffer.users)
    rows = {_rows(use, buffer) for use in uses}
    found = rows.pop() if len(rows) == 1 else None
    return found if found is not None and any(_appends(use) for use in uses) else None


def take_leading_rows(graph: Graph, buffer: Node, value: Any) -> Node:
    """Put an input of the rows that ``leading_rows`` has found in the place of ``buffer``; ``value`` is known of it."""
    rows = input_beside(graph, buffer, value)
    note_added(rows)
    for use in list(buffer.users):
        _, *rest = _index(use)
        use.args = (rows, (slice(None), *rest), *use.args[2:])
        if kind(use) == "getitem" and all(item == slice(None) for item in rest):
            use.replace_all_uses_with(rows)
            graph.erase_node(use)
    graph.erase_node(buffer)
    return rows


def _index(use: Node) -> list[Any]:
    return full_index(use.args[1], value_of(use.args[0]).dim()) or []  # type: ignore[arg-type]


def _rows(use: Node, buffer: Node) -> int | None:
    if kind(use) not in ("getitem", "setitem") or use.args[0] is not buffer:
        return None
    if list(use.all_input_nodes).count(buffer) != 1:
        return None
    first = next(iter(_index(use)), None)
    if not isinstance(first, slice) or (first.start, first.step) != (None, None) or type(first.stop) is not int:
        return None
    return first.stop if 0 < first.stop < value_of(buffer).shape[0] else None


def _appends(use: Node) -> bool:
    """Whether ``use`` writes to some tokens of the rows: of a buffer with tokens first, these would be the rows."""
    if kind(use) == "setitem":
        shape = value_of(use.args[0]).shape  # type: ignore[arg-type]
        return not all(is_whole(item, size) for item, size in zip(_index(use)[1:], shape[1:], strict=True))
    if not all(item == slice(None) for item in _index(use)[1:]):
        return False
    return any(use in written_by(user) and _is_along_tokens(user) for user in use.users)


def _is_along_tokens(write: Node) -> bool:
    if kind(write) == "index_copy":
        dim = argument(write, 1, "dim")
        return isinstance(dim, int) and dim % value_of(write.args[0]).dim() != 0  # type: ignore[arg-type]
    return kind(write) == "setitem" and is_whole(next(iter(_index(write)), None), None) and _appends(write)
