"""Find attention: SDPA and flex attention calls, and every softmax between two matrix products."""

from __future__ import annotations

import operator

import torch
from torch.fx import Graph, Node

from xquant_fx.passes.records import Attention
from xquant_fx.passes.trace import argument, fake, is_view_like, op_name

SDPA = torch.nn.functional.scaled_dot_product_attention
FLEX = torch.ops.higher_order.flex_attention
SOFTMAX = frozenset({torch.softmax, torch.nn.functional.softmax, torch.special.softmax})
EINSUM = frozenset({torch.einsum, torch.functional.einsum})
MATMUL = frozenset({torch.matmul, torch.bmm, torch.baddbmm, operator.matmul}) | EINSUM
MATMUL_METHODS = frozenset({"matmul", "bmm", "baddbmm", "__matmul__"})

# What may stand between the scores and the softmax (scale, mask, softcap, sinks, casts), and
# between the softmax and the product with the values. In-place spellings (add_, iadd) count too.
ELEMENTWISE = frozenset(
    {
        "mul", "multiply", "truediv", "div", "divide", "true_divide", "add", "sub", "subtract", "neg", "iadd",
        "imul", "itruediv", "isub", "masked_fill", "where", "tanh", "cat", "max", "amax", "maximum", "minimum",
        "dropout", "clamp", "clip", "nan_to_num",
    }
)
MAX_DEPTH = 24


def find_attention(graph: Graph) -> list[Attention]:
    """All attention ops of ``graph`` in program order."""
    found = (_fused(node) or _softmax(node) for node in graph.nodes)
    return [attention for attention in found if attention is not None]


def _operands(node: Node, how: str, query: object, key: object, value: object) -> Attention | None:
    if isinstance(query, Node) and isinstance(key, Node) and isinstance(value, Node):
        return Attention(node, how, query, key, value)
    return None


def _fused(node: Node) -> Attention | None:
    if node.op != "call_function" or node.target not in (SDPA, FLEX):
        return None
    how = "flex_attention" if node.target is FLEX else "scaled_dot_product_attention"
    return _operands(node, how, *(argument(node, i, name) for i, name in enumerate(("query", "key", "value"))))


def _softmax(node: Node) -> Attention | None:
    is_function = node.op == "call_function" and node.target in SOFTMAX
    if not is_function and not (node.op == "call_method" and node.target == "softmax"):
        return None
    product, value = _score_product(argument(node, 0, "input")), _value_operand(node)
    if product is None or value is None:
        return None
    return _operands(node, "softmax between matrix products", *_query_and_key(product), value)


def is_matmul(node: Node) -> bool:
    """Whether ``node`` multiplies matrices."""
    if node.op == "call_method":
        return node.target in MATMUL_METHODS
    if node.op != "call_function" or node.target not in MATMUL:
        return False
    return node.target not in EINSUM or len(_einsum_operands(node)) == 2


def matmul_operands(node: Node) -> tuple[object, object]:
    """Left and right operand."""
    if node.target in EINSUM:
        left, right = _einsum_operands(node)
        return left, right
    if node.target is torch.baddbmm or node.target == "baddbmm":
        return argument(node, 1, "batch1"), argument(node, 2, "batch2")
    return argument(node, 0, "input"), argument(node, 1, "other", node.kwargs.get("mat2"))


def _einsum_operands(node: Node) -> tuple[object, ...]:
    rest = node.args[1:]
    return tuple(rest[0]) if len(rest) == 1 and isinstance(rest[0], tuple | list) else rest


def _query_and_key(product: Node) -> tuple[object, object]:
    """The key is the operand that has the last dimension of the scores, along which softmax runs."""
    left, right = matmul_operands(product)
    if product.target in EINSUM and isinstance(product.args[0], str):
        terms, _, scores = product.args[0].replace(" ", "").partition("->")
        if scores and scores[-1] in terms.split(",")[0]:
            return right, left
    return left, right


def _is_elementwise(node: Node) -> bool:
    name = op_name(node)
    return (name if name in ELEMENTWISE else name.rstrip("_")) in ELEMENTWISE or is_view_like(node)


def _score_product(node: object, depth: int = 0) -> Node | None:
    """The product that the softmax's input comes from; the scores may be any operand of an add."""
    if not isinstance(node, Node) or depth > MAX_DEPTH:
        return None
    if is_matmul(node):
        return node
    if not _is_elementwise(node):
        return None
    found = (_score_product(parent, depth + 1) for parent in node.all_input_nodes)
    return next((product for product in found if product is not None), None)


def _value_operand(node: Node, depth: int = 0) -> object | None:
    """Value operand of the product that the probabilities go into."""
    if depth > MAX_DEPTH:
        return None
    for user in node.users:
        if is_matmul(user) and node in matmul_operands(user):
            left, right = matmul_operands(user)
            return right if left is node else left
        if is_view_like(user) or (_is_elementwise(user) and _same_shape(user, node)):
            found = _value_operand(user, depth + 1)
            if found is not None:
                return found
    return None


def _same_shape(result: Node, operand: Node) -> bool:
    """Probabilities that scale something larger (a router's, say) are no attention's."""
    a, b = fake(result), fake(operand)
    return a is None or b is None or a.shape == b.shape
