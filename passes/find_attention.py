"""Find attention: SDPA and flex attention calls, and every softmax between two matrix products."""

from __future__ import annotations

from torch.fx import Graph, Node

from xquant_fx.passes.products import other_operand, product_of
from xquant_fx.passes.records import Attention, Product
from xquant_fx.passes.trace import argument, fake, is_view_like
from xquant_fx.passes.vocabulary import ELEMENTWISE, FLEX, kind

MAX_DEPTH = 24
NAMES = {"sdpa": "scaled_dot_product_attention", "flex": "flex_attention"}


def find_attention(graph: Graph) -> list[Attention]:
    """All attention ops of ``graph`` in program order."""
    found = (_one_op(node) or _softmax(node) for node in graph.nodes)
    return [attention for attention in found if attention is not None]


def _one_op(node: Node) -> Attention | None:
    if kind(node) not in NAMES:
        return None
    query, key, value = (argument(node, i, name) for i, name in enumerate(("query", "key", "value")))
    if not (isinstance(query, Node) and isinstance(key, Node) and isinstance(value, Node)):
        return None
    return Attention(node, NAMES["flex" if FLEX in node.meta else kind(node)], query, key, value)


def _softmax(node: Node) -> Attention | None:
    if kind(node) != "softmax":
        return None
    scores, output = _score_product(argument(node, 0, "input")), _value_product(node)
    if scores is None or output is None:
        return None
    product, value = output
    query, key = _query_and_key(scores)
    return Attention(node, "softmax between matrix products", query, key, value, scores, product)


def _query_and_key(product: Product) -> tuple[Node, Node]:
    """The key is the operand that has the last dimension of the scores, along which softmax runs."""
    if product.equation is not None:
        left, _, scores = product.equation
        if scores and scores[-1] in left:
            return product.right, product.left
    return product.left, product.right


def _is_elementwise(node: Node) -> bool:
    return kind(node) in ELEMENTWISE or is_view_like(node)


def _score_product(node: object, depth: int = 0) -> Product | None:
    """The product that the softmax's input comes from; the scores may be any operand of an add."""
    if not isinstance(node, Node) or depth > MAX_DEPTH:
        return None
    product = product_of(node)
    if product is not None:
        return product
    if not _is_elementwise(node):
        return None
    found = (_score_product(parent, depth + 1) for parent in node.all_input_nodes)
    return next((product for product in found if product is not None), None)


def _value_product(node: Node, depth: int = 0) -> tuple[Product, Node] | None:
    """The product that the probabilities go into, and its value operand."""
    if depth > MAX_DEPTH:
        return None
    for user in node.users:
        product = product_of(user)
        value = other_operand(product, node) if product is not None else None
        if product is not None and value is not None:
            return product, value
        if is_view_like(user) or (_is_elementwise(user) and _same_shape(user, node)):
            found = _value_product(user, depth + 1)
            if found is not None:
                return found
    return None


def _same_shape(result: Node, operand: Node) -> bool:
    """Probabilities that scale something larger (a router's, say) are no attention's."""
    a, b = fake(result), fake(operand)
    return a is None or b is None or a.shape == b.shape
