"""The scores of an attention that is written out: what was taken off them so far, and which nodes carry them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from enum import IntEnum
from typing import Any

import torch
from torch.fx import Node

from xquant_fx.passes.records import Attention, MaskTerm
from xquant_fx.passes.trace import argument, fake, operand


class Stage(IntEnum):
    """How far the walk has come; it may only fall."""

    CAPPED = 1
    BIASED = 2
    JOINED = 3


@dataclasses.dataclass(frozen=True)
class Scores:
    """What was taken off the scores so far, from the softmax back."""

    stage: Stage = Stage.JOINED
    scale: float = 1.0
    softcap: float = 0.0
    terms: tuple[MaskTerm, ...] = ()
    """Masks in the order of the program."""
    sinks: Node | None = None
    largest: Node | None = None
    """The subtracted largest score, which is allowed to read the scores, too."""

    def replace(self, **changes: Any) -> Scores:
        """A copy with ``changes``."""
        return dataclasses.replace(self, **changes)

    def with_term(self, term: MaskTerm) -> Scores:
        """A copy with ``term`` in front: the walk goes back through the program."""
        return self.replace(terms=(term, *self.terms))


Taken = tuple[Node, Scores]


@dataclasses.dataclass(frozen=True)
class Row:
    """One form of what lies between the scores and the softmax."""

    name: str
    stage: Stage | None
    """Stage that the row belongs to; None: any."""
    kinds: frozenset[str]
    """Kinds of the op that it takes off."""
    take: Callable[[Node, Scores, Scene], Taken | str | None]


class Scene:
    """One attention that is written out, and which nodes carry its scores."""

    def __init__(self, attention: Attention, heads: int, ends: tuple[Node, ...] = ()) -> None:
        """``ends``: what may read the softmax's input, too, and carries no scores."""
        assert attention.scores is not None
        self.attention, self.product, self.heads, self.ends = attention, attention.scores, heads, ends
        self.carriers = frozenset(_carriers(self.product.node, (attention.node, *ends)))

    def split(self, node: Node) -> tuple[Node, object] | None:
        """(scores, other operand) of an op with two operands of which one carries the scores."""
        if len(node.args) < 2:
            return None
        left, right = node.args[:2]
        if isinstance(left, Node) and left in self.carriers:
            return None if isinstance(right, Node) and right in self.carriers else (left, right)
        return (right, left) if isinstance(right, Node) and right in self.carriers else None


def _carriers(product: Node, ends: tuple[Node, ...]) -> set[Node]:
    found, queue = {product}, [product]
    while queue:
        new = [user for user in queue.pop().users if user not in found and user not in ends]
        found.update(new)
        queue += new
    return found


def keeps_last_two(node: Node) -> bool:
    """Whether the view ``node`` leaves the last two dimensions, query tokens and tokens, as they are."""
    source = operand(node)
    if source is None or len(shape_of(node)) < 3 or shape_of(node)[-2:] != shape_of(source)[-2:]:
        return False
    return not isinstance(argument(node, 1, "dtype"), torch.dtype)  # view(dtype) reads the same bits anew


def shape_of(node: Node) -> tuple[int, ...]:
    """The shape of a node's tensor; () where it is unknown."""
    value = fake(node)
    return () if value is None else tuple(value.shape)
