"""What may lie between the product with the keys and the softmax: one row per form.

The walk goes from the softmax back to the product and takes one op after the other off the scores. Each row
belongs to a stage, and stages may only fall:

    JOINED   softmax(cat([scores, sink logits]))          the largest subtracted, sink logits
    BIASED   scores * scale + mask, mask filled in        any number of masks and scales, in any order
    CAPPED   softcap * tanh(scores * scale / softcap)     the softcap, and scales within it

``walk_scores.py`` has the walk. A row's function gets the node, what was found so far and the facts of the
attention. It returns the scores' next node with what is found now, a sentence that says why the form is none that
the op knows, or None where the row does not apply. To teach the passes a new form of mask, add a row.
"""

from __future__ import annotations

import math

import torch
from torch.fx import Node

from xquant_fx.passes.records import MaskTerm
from xquant_fx.passes.scores import Row, Scene, Scores, Stage, Taken, keeps_last_two, shape_of
from xquant_fx.passes.trace import argument, fake, is_view_like, keeps_numbers, operand, value_of
from xquant_fx.passes.vocabulary import kind, op_name

#: What programs fill in for "not to be seen" is at most this: beside any score its weight is 0.
NOT_SEEN = -1e4

_FILLED_WITH = {"full": (1, "fill_value"), "tensor": (0, "data")}


def _number(value: object) -> float | None:
    """A number, or the one number of a tensor without dimensions that the graph makes of one.

    Not where the tensor's dtype makes another number of it. ``in_place.py`` sees to it that the tensor stays so.
    """
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, Node) and kind(value) == "factory" and op_name(value) in ("full", "tensor"):
        number, tensor = _number(argument(value, *_FILLED_WITH[op_name(value)])), fake(value)
        if number is None or tensor is None or tensor.dim():
            return None
        whole = tensor.dtype in (torch.int32, torch.int64) and number.is_integer()
        return number if whole or tensor.dtype.is_floating_point else None
    return None


def _scaled(node: Node) -> tuple[Node, float] | None:
    """(what is multiplied or divided by a number, the factor); ``alpha`` or ``rounding_mode`` make it another op."""
    if len(node.args) != 2 or node.kwargs:
        return None
    left, right = node.args
    number = _number(right)
    if isinstance(left, Node) and number is not None:
        if kind(node) == "mul":
            return left, number
        return (left, 1 / number) if number else None
    number = _number(left)
    return (right, number) if kind(node) == "mul" and isinstance(right, Node) and number is not None else None


def take_largest(node: Node, found: Scores, scene: Scene) -> Taken | None:
    """``scores - scores.max(-1, keepdim=True)``: the softmax is the same without it.

    Not if sink logits are joined afterwards, from which it is not subtracted.
    """
    inner, largest = operand(node), operand(node, 1)
    if found.largest is not None or found.sinks is not None or node.kwargs or inner is None or largest is None:
        return None
    chain: Node | None = largest
    while chain is not None and is_view_like(chain):
        chain = operand(chain)
    of_rows = chain is not None and kind(chain) == "max" and argument(chain, 1, "dim") == -1
    if shape_of(largest)[-1:] != (1,):
        return None  # turned: no longer one number per row
    if chain is None or not of_rows or operand(chain) is not inner or not argument(chain, 2, "keepdim", False):
        return None
    return inner, found.replace(largest=chain)


def take_sinks(node: Node, found: Scores, scene: Scene) -> Taken | str | None:
    """``cat([scores, sinks], -1)``: one logit per head, without a value."""
    parts = argument(node, 0, "tensors")
    if argument(node, 1, "dim", 0) not in (-1, 3) or not isinstance(parts, tuple | list) or len(parts) != 2:
        return "something is joined to the scores that is not one logit per head"
    scores, extra = parts
    sinks = _one_logit_per_head(extra, scene)
    plain = found.sinks is None and found.scale == 1.0  # a scale would be one of the sink logits, too
    if not plain or sinks is None or not isinstance(scores, Node) or scores not in scene.carriers:
        return "something is joined to the scores that is not one logit per head"
    return scores, found.replace(sinks=sinks)


def _one_logit_per_head(node: object, scene: Scene) -> Node | None:
    """The [1, Hq, 1, 1] tensor that ``node`` expands."""
    shape = (1, scene.heads, 1, 1)
    while isinstance(node, Node) and fake(node) is not None:
        if tuple(value_of(node).shape) == shape:
            return node
        if kind(node) != "expand" and not keeps_numbers(node):
            return None
        node = operand(node)
    return None


def take_added(node: Node, found: Scores, scene: Scene) -> Taken | str | None:
    """``scores + mask``: a mask, a bias, or one of several."""
    parts = scene.split(node)
    if parts is None or node.kwargs.get("alpha", 1) != 1 or set(node.kwargs) - {"alpha"}:
        return None
    scores, mask = parts
    value = fake(mask)
    if not isinstance(mask, Node) or value is None or not value.dtype.is_floating_point:
        return None  # a bool that is added is a number like any other
    return scores, found.with_term(MaskTerm(mask, None, factor=found.scale, scores=shape_of(node)))


def take_filled(node: Node, found: Scores, scene: Scene) -> Taken | str | None:
    """``scores.masked_fill(mask, least)`` and ``where(mask, scores, least)``."""
    parts = _fill_parts(node, scene)
    if parts is None:
        return None
    scores, condition, number, where = parts
    value = fake(condition)
    if value is None or value.dtype != torch.bool:
        return None
    if not number * found.scale <= NOT_SEEN:
        return f"{op_name(node)} fills the scores with {number}, which does not mean that they are not to be seen"
    return scores, found.with_term(MaskTerm(condition, number * found.scale, where, scores=shape_of(node)))


def _fill_parts(node: Node, scene: Scene) -> tuple[Node, Node, float, bool] | None:
    """(scores, condition, number filled in, where the condition is this)."""
    if kind(node) == "masked_fill":
        scores, condition, number = (argument(node, i, n) for i, n in enumerate(("input", "mask", "value")))
        where = True
    else:
        condition, scores, number = (argument(node, i, n) for i, n in enumerate(("condition", "input", "other")))
        where = False
        if isinstance(number, Node) and number in scene.carriers:
            scores, number, where = number, scores, True
    value = _number(number)
    if not (isinstance(scores, Node) and scores in scene.carriers and isinstance(condition, Node)) or value is None:
        return None
    return scores, condition, value, where


def take_softcap(node: Node, found: Scores, scene: Scene) -> Taken | None:
    """``softcap * tanh(scores / softcap)``."""
    outer = _scaled(node)
    if outer is None or kind(outer[0]) != "tanh" or found.softcap or found.scale != 1.0:
        return None
    tanh, softcap = outer
    quotient = operand(tanh)
    if quotient is None or kind(quotient) not in ("mul", "div") or len(tanh.users) != 1 or len(quotient.users) != 1:
        return None
    inner = _scaled(quotient)
    if inner is None or not math.isclose(inner[1] * softcap, 1.0, rel_tol=1e-6):
        return None
    return inner[0], found.replace(softcap=abs(softcap))  # tanh is odd


def take_scale(node: Node, found: Scores, scene: Scene) -> Taken | None:
    """``scores * scale`` and ``scores / scale``."""
    scaled = _scaled(node)
    return None if scaled is None else (scaled[0], found.replace(scale=found.scale * scaled[1]))


def take_cast(node: Node, found: Scores, scene: Scene) -> Taken | None:
    """A cast to another floating-point dtype: its rounding alone is lost."""
    scores = operand(node)
    return (scores, found) if scores is not None and keeps_numbers(node) else None


def take_view(node: Node, found: Scores, scene: Scene) -> Taken | None:
    """Batch and heads in one dimension or in two: query tokens and keys stay the last two."""
    scores = operand(node)
    return (scores, found) if scores is not None and keeps_last_two(node) else None


#: Tried in this order.
ROWS = (
    Row("largest subtracted", Stage.JOINED, frozenset({"sub"}), take_largest),
    Row("sink logits", Stage.JOINED, frozenset({"cat"}), take_sinks),
    Row("mask added", Stage.BIASED, frozenset({"add"}), take_added),
    Row("mask filled", Stage.BIASED, frozenset({"masked_fill", "where"}), take_filled),
    Row("softcap", Stage.CAPPED, frozenset({"mul", "div"}), take_softcap),
    Row("scale", None, frozenset({"mul", "div"}), take_scale),
    Row("cast", None, frozenset({"cast", "contiguous"}), take_cast),
    Row("view", None, frozenset({"view", "reshape"}), take_view),
)
