"""Uses of one row of a batch: ``buffer[row : row + 1, ...]``, ``buffer[row, ...]``, and writes to them."""

from __future__ import annotations

import operator
from typing import Any, NamedTuple

import torch
from torch.fx import Node

from xquant_fx.passes.trace import argument, value_of
from xquant_fx.passes.vocabulary import kind


class RowUse(NamedTuple):
    """One use of a buffer, of one row alone."""

    node: Node
    row: int | Node
    rest: tuple[Any, ...]
    """What is taken of, or written to, the row: an index behind its number."""
    drops: bool
    """Whether the row is a number, which leaves a dimension out."""

    @property
    def writes(self) -> bool:
        """Whether it is ``buffer[row, ...] = x``."""
        return self.node.target is operator.setitem


def row_use(node: Node, buffer: Node) -> RowUse | None:
    """What ``node`` does with one row of ``buffer`` [B, H, N, D]; None if it does something else, or with more."""
    if not node.args or node.args[0] is not buffer:
        return None
    if kind(node) == "select" and argument(node, 1, "dim") == 0:
        row: Any = argument(node, 2, "index")
        return RowUse(node, row, (), True) if _is_row(row, buffer) else None
    if node.target not in (operator.getitem, operator.setitem):
        return None
    index = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
    first: Any = index[0] if index else None
    if not isinstance(first, slice):
        return RowUse(node, first, index[1:], True) if _is_row(first, buffer) else None
    row = first.start
    is_one = first.step in (None, 1) and _follows(first.stop, row) and _is_row(row, buffer)
    return RowUse(node, row, index[1:], False) if is_one else None


def adds_rows(node: Node) -> bool:
    """Whether ``node`` is ``row[None]`` or ``row.unsqueeze(0)``."""
    if node.target is operator.getitem:
        return node.args[1] in (None, (None,), (None, Ellipsis))
    return kind(node) == "unsqueeze" and argument(node, 1, "dim") in (0, -4)


def why_one_row(write: Node, buffer: Node) -> str:
    """Why ``write`` to one row of ``buffer`` that is not quantized is no append, or ""."""
    uses = [use for use in (row_use(user, buffer) for user in buffer.users) if use is not None]
    views = {use.node for use in uses if not use.writes} | {v for use in uses for v in use.node.users if adds_rows(v)}
    if all(use.node is not write for use in uses) and write.args[0] not in views:
        return ""
    return "into one row; a step that writes all rows, each at a position of its own, takes such a batch over"


def _is_row(row: Any, buffer: Node) -> bool:
    if type(row) is int:
        return bool(0 <= row < value_of(buffer).shape[0])
    return _is_number(row)


def _is_number(value: Any) -> bool:
    return isinstance(value, Node) and isinstance(value.meta.get("example_value"), torch.SymInt)


def _follows(stop: Any, row: Any) -> bool:
    """Whether ``stop`` is ``row + 1``."""
    if type(row) is int:
        return bool(stop == row + 1)
    is_sum = _is_number(row) and isinstance(stop, Node) and kind(stop) == "add"
    return is_sum and set(stop.args) == {row, 1}
