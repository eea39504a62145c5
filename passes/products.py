"""Matrix products in one form: operands and, where shapes are known, the letters of an einsum."""

from __future__ import annotations

from string import ascii_letters

from torch.fx import Node

from xquant_fx.passes.records import Product
from xquant_fx.passes.trace import argument, fake
from xquant_fx.passes.vocabulary import PRODUCTS, kind


def is_product(node: Node) -> bool:
    """Whether ``node`` multiplies matrices."""
    return kind(node) in PRODUCTS and product_of(node) is not None


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
    nodes = all(isinstance(part, Node) for part in (added, left, right))
    numbers = all(isinstance(factor, int | float) for factor in (beta, alpha))
    if not nodes:
        return None
    assert isinstance(added, Node) and isinstance(left, Node) and isinstance(right, Node)
    if not numbers:
        return Product(node, left, right, None, added=added)
    equation = _letters(left, right)
    return Product(node, left, right, equation, alpha=float(alpha), added=added, beta=float(beta))  # type: ignore[arg-type]


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


def other_operand(product: Product, node: Node) -> Node | None:
    """The operand that is not ``node``; None if ``node`` is no operand."""
    if product.left is node:
        return product.right
    return product.left if product.right is node else None
