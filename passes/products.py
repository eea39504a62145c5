"""Matrix products in one form: operands and, where shapes are known, the letters of an einsum."""

from __future__ import annotations

from string import ascii_letters

from torch.fx import Node

from xquant_fx.passes.records import Attention, Product
from xquant_fx.passes.trace import argument, fake
from xquant_fx.passes.vocabulary import PRODUCTS, kind


def is_product(node: Node) -> bool:
    """Whether ``node`` multiplies matrices."""
    return product_of(node) is not None


def product_of(node: Node) -> Product | None:
    """``node`` as a product; None if it is none, or one of other than two operands."""
    spelling = kind(node)
    if spelling not in PRODUCTS:
        return None
    if spelling == "einsum":
        return _einsum(node)
    if spelling == "baddbmm":
        return _baddbmm(node)
    left, right = argument(node, 0, "input"), argument(node, 1, "other", node.kwargs.get("mat2"))
    if not (isinstance(left, Node) and isinstance(right, Node)):
        return None
    return Product(node, left, right, _letters(left, right))


def _letters(left: Node, right: Node) -> tuple[str, str, str] | None:
    """The equation of ``left @ right``: batch dimensions are aligned at their end."""
    a, b = fake(left), fake(right)
    if a is None or b is None or a.dim() < 2 or b.dim() < 2:
        return None
    row, inner, column = list(ascii_letters[:3])
    batch = ascii_letters[3 : 1 + max(a.dim(), b.dim())]
    ours, theirs = batch[len(batch) - a.dim() + 2 :], batch[len(batch) - b.dim() + 2 :]
    return ours + row + inner, theirs + inner + column, batch + row + column


def _baddbmm(node: Node) -> Product | None:
    added, left, right = (argument(node, i, name) for i, name in enumerate(("input", "batch1", "batch2")))
    beta, alpha = (argument(node, i, name, 1.0) for i, name in ((3, "beta"), (4, "alpha")))
    if not (isinstance(added, Node) and isinstance(left, Node) and isinstance(right, Node)):
        return None
    if not (isinstance(beta, int | float) and isinstance(alpha, int | float)):
        return Product(node, left, right, None, added=added)
    return Product(node, left, right, _letters(left, right), alpha=float(alpha), added=added, beta=float(beta))


def _einsum(node: Node) -> Product | None:
    text, rest = node.args[0], node.args[1:]
    operands = tuple(rest[0]) if len(rest) == 1 and isinstance(rest[0], tuple | list) else rest
    if len(operands) != 2 or not isinstance(text, str) or not all(isinstance(part, Node) for part in operands):
        return None
    left, right = operands
    return Product(node, left, right, _equation(text, left, right))  # type: ignore[arg-type]


def _equation(text: str, left: object, right: object) -> tuple[str, str, str] | None:
    """Of an explicit equation without diagonals, whose letters are as many as the dimensions."""
    terms, arrow, result = text.replace(" ", "").partition("->")
    letters = terms.split(",")
    if not arrow or len(letters) != 2:
        return None
    unused = "".join(letter for letter in ascii_letters if letter not in text)
    sides = []
    for part, node in zip(letters, (left, right), strict=True):
        value = fake(node)
        part = part if value is None else _without_ellipsis(part, value.dim(), unused)
        if value is not None and value.dim() != len(part):
            return None
        sides.append(part)
    result = result.replace("...", max((part for part in _ellipses(letters, sides)), key=len, default=""))
    parts = (*sides, result)
    plain = all(part.isalpha() and len(set(part)) == len(part) for part in parts)
    return (sides[0], sides[1], result) if plain else None


def _without_ellipsis(part: str, dims: int, unused: str) -> str:
    """``...`` spelt out: dimensions of two operands that are aligned at their end get the same letters."""
    count = dims - len(part.replace("...", ""))
    return part.replace("...", unused[16 - count : 16]) if 0 <= count <= 16 else part


def _ellipses(before: list[str], after: list[str]) -> list[str]:
    """What ``...`` became in each operand."""
    return [
        new[old.index("...") : old.index("...") + len(new) - len(old) + 3]
        for old, new in zip(before, after, strict=True)
        if "..." in old
    ]


def query_tokens(attention: Attention) -> object:
    """Tokens of the query: an int, or symbolic; None where its shape is unknown.

    Of scores that are written out, it is the last dimension that the query has and the keys have not.
    """
    query, scores = fake(attention.query), attention.scores
    if query is None or scores is None or scores.equation is None:
        return None if query is None or query.dim() < 2 else query.shape[-2]
    left, right, result = scores.equation
    ours, theirs = (left, right) if scores.right is attention.key else (right, left)
    own = [letter for letter in result if letter in ours and letter not in theirs]
    return query.shape[ours.index(own[-1])] if own else 1


def other_operand(product: Product, node: Node) -> Node | None:
    """The operand that is not ``node``; None if ``node`` is no operand."""
    if product.left is node:
        return product.right
    return product.left if product.right is node else None
