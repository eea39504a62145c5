"""Sink logits that join the softmax behind it, by the share that they leave to the tokens.

softmax(cat([s, sink]))[..., :-1] @ v  =  (softmax(s) @ v) * sigmoid(logsumexp(s) - sink)
"""

from __future__ import annotations

from typing import NamedTuple

from torch.fx import Node

from xquant_fx.passes.scores import shape_of
from xquant_fx.passes.trace import argument, keeps_numbers, operand
from xquant_fx.passes.vocabulary import kind


class LateSinks(NamedTuple):
    """What is computed behind the product with the values."""

    output: Node
    """The product of the attention's result and the share, which the op computes."""
    sum: Node
    """``logsumexp`` of the softmax's input."""
    logits: Node
    """[1, Hq, 1] or [1, Hq, 1, 1]."""


def late_sinks(softmax: Node, output: Node, heads: int) -> LateSinks | None:
    """Sink logits by which alone ``output`` [B, Hq, q, D], of ``softmax``, is weighed; None if there are none."""
    user = next(iter(output.users)) if len(output.users) == 1 else None
    if user is None or kind(user) != "mul" or len(user.args) != 2 or user.kwargs:
        return None
    left, right = operand(user), operand(user, 1)
    share = right if left is output else left
    shape = shape_of(output)
    if share is None or len(shape) != 4 or shape_of(user) != shape or shape_of(share) != (*shape[:3], 1):
        return None
    sigmoid = _behind_views(share)
    difference = None if sigmoid is None or kind(sigmoid) != "sigmoid" else _behind_views(operand(sigmoid))
    if sigmoid is None or difference is None or kind(difference) != "sub" or difference.kwargs:
        return None
    total, logits = _behind_views(operand(difference)), operand(difference, 1)
    if total is None or logits is None or not _is_sum_of(total, softmax):
        return None
    per_head = (1, heads, *[1] * (len(shape_of(difference)) - 2))
    alike = shape_of(difference)[:3] == shape[:3] and shape_of(total)[:3] == shape[:3]
    return LateSinks(user, total, logits) if alike and shape_of(logits) == per_head else None


def _behind_views(node: Node | None) -> Node | None:
    """What ``node`` is with another number of dimensions or dtype, if all that lies between is read by it alone."""
    while node is not None and len(node.users) == 1:
        if not (keeps_numbers(node) or kind(node) == "unsqueeze" or _adds_dimensions(node)):
            return node
        node = operand(node)
    return None


def _adds_dimensions(node: Node) -> bool:
    """Whether ``node`` is ``x[..., None]`` or the like."""
    index = argument(node, 1, "index") if kind(node) == "getitem" else None
    items = index if isinstance(index, tuple) else (index,)
    return kind(node) == "getitem" and all(item is None or item is Ellipsis or item == slice(None) for item in items)


def _is_sum_of(node: Node, softmax: Node) -> bool:
    """Whether ``node`` is the logarithm of the sum that ``softmax`` divides by."""
    scores = operand(softmax)
    last = (-1, len(shape_of(softmax)) - 1)
    dim = argument(node, 1, "dim")
    return kind(node) == "logsumexp" and scores is not None and operand(node) is scores and _one(dim) in last


def _one(dim: object) -> object:
    return dim[0] if isinstance(dim, tuple | list) and len(dim) == 1 else dim
