"""The walk from the softmax back to the product of queries and keys, one form after the other."""

from __future__ import annotations

import math

from torch.fx import Node

from xquant_fx.passes.forms import ROWS
from xquant_fx.passes.records import MaskTerm, Product
from xquant_fx.passes.scores import Scene, Scores, Stage, Taken, shape_of
from xquant_fx.passes.trace import fake
from xquant_fx.passes.vocabulary import kind, op_name


def walk(scene: Scene, node: object) -> Scores | str:
    """Take ops off ``node``, the softmax's input, until the product; what was found, or why that fails."""
    found, reason = walk_as_far(scene, node)
    return reason or found


def walk_as_far(scene: Scene, node: object) -> tuple[Scores, str]:
    """What was found until the product, and ""; or from the softmax back to something unknown, and what that is."""
    found = Scores()
    while isinstance(node, Node):
        others = [user for user in node.users if user is not found.largest and user not in scene.ends]
        if len(others) != 1:
            return found, "the attention scores are used for something else, too"
        if node is scene.product.node:
            whole = _take_product(scene.product, found)
            return (found, whole) if isinstance(whole, str) else (whole, "")
        taken = _take(node, found, scene)
        if isinstance(taken, str):
            return found, taken
        if taken is None:
            break
        node, found = taken
    name = op_name(node) if isinstance(node, Node) else repr(node)
    return found, f"{name} lies between the scores and the softmax"


def _take(node: Node, found: Scores, scene: Scene) -> Taken | str | None:
    for row in ROWS:
        if kind(node) not in row.kinds:
            continue
        taken = row.take(node, found, scene)
        if isinstance(taken, str):
            return taken
        if taken is None:
            continue
        if row.stage is not None and row.stage > found.stage:
            return f"{op_name(node)} ({row.name}) lies between the scores and the softmax, within the {_last(found)}"
        after, now = taken
        if now.sinks is found.sinks and math.prod(shape_of(node)) != math.prod(shape_of(after)):
            return f"{op_name(node)} makes more scores than there are"
        return after, now if row.stage is None else now.replace(stage=row.stage)
    return None


def _last(found: Scores) -> str:
    return "softcap" if found.stage == Stage.CAPPED else "masks and scales"


def _take_product(product: Product, found: Scores) -> Scores | str:
    """What a product brings itself: ``baddbmm`` adds and scales."""
    if product.added is not None and product.beta:
        if found.stage < Stage.BIASED:
            return "baddbmm adds to the scores within the softcap"
        value = fake(product.added)
        if value is None or not value.dtype.is_floating_point:
            return "baddbmm adds something that is no floating-point mask"
        term = MaskTerm(product.added, None, factor=found.scale * product.beta, scores=shape_of(product.node))
        found = found.with_term(term)
    return found.replace(scale=found.scale * product.alpha)
