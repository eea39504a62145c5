"""Decide whether one attention can become a single ``decode_attention`` op, and say why not.

Matched: scaled_dot_product_attention, or matmul, scale, softcap, mask, softmax, matmul, whose keys and
values are the buffer itself or its KV heads repeated for grouped queries. Nothing is changed.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch.fx import Node

from xquant_fx.passes.records import Attention, Source
from xquant_fx.passes.trace import argument, fake, keeps_numbers, op_name, source_of
from xquant_fx.passes.track_axes import axes_of, expected


@dataclasses.dataclass(frozen=True)
class Decode:
    """One attention as ``decode_attention`` takes it."""

    output: Node
    """The node whose value [B, Hq, q, D] the op computes."""
    query: Node
    mask: Node | None
    scale: float
    softcap: float
    sinks: Node | None = None
    """A logit a head [1, Hq, 1, 1] that joins the softmax without a value."""


def match_decode(attention: Attention, key: Source, value: Source, writers: dict[Node, Node]) -> Decode | str:
    """The op's arguments, or why ``attention`` reads dequantized keys and values instead."""
    query = fake(attention.query)
    if query is None or query.dim() != 4:
        return "the query has no shape [B, H, q, D]"
    if not isinstance(query.shape[2], int):
        return "the number of query tokens is dynamic"
    if attention.how == "scaled_dot_product_attention":
        found = _sdpa(attention)
    elif attention.how == "flex_attention":
        return "flex_attention is not fused"
    else:
        found = _softmax(attention)
    if isinstance(found, str):
        return found
    if not (math.isfinite(found.scale) and math.isfinite(found.softcap)):
        return f"the scale {found.scale} or the softcap {found.softcap} is not finite"
    return _why_not_operands(attention, found, key, value, writers) or _why_not_mask(found, fake(key.root)) or found


def _why_not_operands(
    attention: Attention, found: Decode, key: Source, value: Source, writers: dict[Node, Node]
) -> str:
    query, output = fake(attention.query), fake(found.output)
    shapes = [tuple(fake(source.root).shape[:3]) for source in (key, value)]
    if shapes[0] != shapes[1]:
        return f"keys and values differ in shape: {shapes[0]} and {shapes[1]}"
    for operand, source, what in ((attention.key, key, "keys"), (attention.value, value, "values")):
        axes, buffer = axes_of(operand, source.root, writers), fake(source.root)
        last = "DN" if what == "keys" and found.output is not attention.node else "ND"
        plain, repeated = (expected(buffer.shape, "B", heads, *last) for heads in ("H", "H repeat"))
        if axes not in (plain, repeated):
            return f"{what} are neither the cache nor its heads repeated"
        if query.shape[1] % buffer.shape[1] or query.shape[0] != buffer.shape[0]:
            return f"query {tuple(query.shape)} and {what} {tuple(buffer.shape)} do not fit"
        if fake(operand).dtype != query.dtype or buffer.dtype != query.dtype:
            return f"query, {what} and cache differ in dtype"
        grouped = bool(argument(attention.node, 7, "enable_gqa", False)) if found.output is attention.node else False
        one = buffer.shape[1] == 1  # whose product broadcasts over the query heads
        if axes == plain and not (grouped or one) and query.shape[1] != buffer.shape[1]:
            return f"{query.shape[1]} query heads and {buffer.shape[1]} {what} heads"
    if output is None or output.dtype != query.dtype:
        return "the output has another dtype than the query"
    return ""


def _why_not_mask(found: Decode, buffer: torch.Tensor) -> str:
    mask = fake(found.mask)
    if found.mask is None:
        return ""
    if mask is None or mask.dim() not in (2, 3, 4) or mask.shape[-1] != buffer.shape[2]:
        return "the mask has no shape [B, H, q, max_cache_len]"
    query = fake(found.query).shape
    full = (1,) * (4 - mask.dim()) + tuple(mask.shape)
    if any(size not in (1, want) for size, want in zip(full[:3], query[:3], strict=True)):
        return f"the mask {tuple(mask.shape)} does not fit the query {tuple(query)}"
    return "" if mask.dtype in (torch.bool, torch.float32, fake(found.query).dtype) else f"a mask of {mask.dtype}"


def _sdpa(attention: Attention) -> Decode | str:
    node = attention.node
    rest = ((3, "attn_mask", None), (4, "dropout_p", 0.0), (5, "is_causal", False), (6, "scale", None))
    mask, dropout, causal, scale = (argument(node, *each) for each in rest)
    if causal is not False or dropout != 0.0:
        return "is_causal or dropout_p is set"
    if not (scale is None or isinstance(scale, int | float)):
        return "the scale is no number"
    if scale is None:
        scale = 1 / math.sqrt(fake(attention.query).shape[3])
    return Decode(node, attention.query, mask, float(scale), 0.0)


def _softmax(attention: Attention) -> Decode | str:
    """Walk from the softmax back to the scores' product and on to the product with the values."""
    softmax = attention.node
    if argument(softmax, 1, "dim") not in (-1, 3):
        return "softmax is not over the last dimension"
    scores, sinks, weights = argument(softmax, 0, "input"), None, softmax
    joined = _joined(scores)
    if joined is not None:
        scores, sinks = joined[0], _a_logit_a_head(joined[1], attention)
        weights = _without_last(softmax)
        if sinks is None or weights is None:
            return "something is joined to the scores that is not a logit a head"
    before = _Scores(attention)
    reason = before.walk(scores)
    if reason:
        return reason
    output = _value_product(weights, attention.value)
    if output is None:
        return "the attention weights are used for something else, too"
    return Decode(output, attention.query, before.mask, before.scale, before.softcap, sinks)


def _joined(node: object) -> tuple[Node, Node] | None:
    """``cat([scores, sinks], -1)``, its own largest perhaps subtracted."""
    if isinstance(node, Node) and op_name(node) in ("sub", "isub") and isinstance(node.args[0], Node):
        inner, largest = node.args[0], node.args[1]
        chain = source_of(largest, {}).root if isinstance(largest, Node) else inner
        of_rows = op_name(chain) in ("max", "amax") and argument(chain, 1, "dim") == -1
        if not of_rows or chain.args[0] is not inner or len(inner.users) != 2:
            return None
        node = inner
    if not isinstance(node, Node) or op_name(node) not in ("cat", "concat") or argument(node, 1, "dim", 0) != -1:
        return None
    parts = argument(node, 0, "tensors")
    return (parts[0], parts[1]) if len(parts) == 2 and all(isinstance(part, Node) for part in parts) else None


def _a_logit_a_head(node: Node, attention: Attention) -> Node | None:
    """The [1, Hq, 1, 1] tensor that ``node`` expands."""
    shape = (1, fake(attention.query).shape[1], 1, 1)
    while fake(node) is not None and tuple(fake(node).shape) != shape:
        if op_name(node) != "expand" and not keeps_numbers(node):
            return None
        node = node.args[0]
    return node if fake(node) is not None else None


def _without_last(softmax: Node) -> Node | None:
    """``weights[..., :-1]``, if that is all that is read of them."""
    (user, *others) = softmax.users
    index = user.args[1] if op_name(user) == "getitem" else None
    cut = index in ((Ellipsis, slice(None, -1, None)), (*[slice(None)] * 3, slice(None, -1, None)))
    return user if cut and not others else None


class _Scores:
    """What lies between the product of query and keys and the softmax, taken from its end."""

    def __init__(self, attention: Attention) -> None:
        self.attention = attention
        self.mask: Node | None = None
        self.scale, self.softcap = 1.0, 0.0
        self.capped = False

    def walk(self, node: object) -> str:
        """Take ops off until the product; returns why that fails, or ""."""
        while isinstance(node, Node):
            if len(node.users) != 1:
                return "the attention scores are used for something else, too"
            if _is_product(node, self.attention.query, self.attention.key):
                return ""
            following = self._step(node, op_name(node).rstrip("_").removeprefix("i"))
            if following is None:
                break
            node = following
        name = op_name(node) if isinstance(node, Node) else repr(node)
        return f"{name} lies between the scores and the softmax"

    def _step(self, node: Node, name: str) -> Node | None:
        args = node.args
        if keeps_numbers(node):
            return args[0]
        if node.kwargs:  # alpha, rounding_mode: another sum or quotient
            return None
        if name in ("mul", "truediv", "div") and isinstance(args[1], int | float):
            factor = float(args[1]) if name == "mul" else 1 / args[1]
            return self._softcap(args[0], factor) or self._scaled(args[0], factor)
        if name == "add" and self.mask is None and not self.capped and self.scale == 1.0:
            scores = [a for a in args[:2] if isinstance(a, Node) and _leads_to(a, self.attention.key)]
            others = [a for a in args[:2] if isinstance(a, Node) and a not in scores]
            if len(scores) == 1 and len(others) == 1 and not _is_bool(others[0]):
                self.mask = others[0]
                return scores[0]
        return None

    def _scaled(self, node: Node, factor: float) -> Node | None:
        self.scale *= factor
        return node

    def _softcap(self, node: object, cap: float) -> Node | None:
        """``cap * tanh(scores / cap)``."""
        if self.capped or self.scale != 1.0 or not isinstance(node, Node) or op_name(node) != "tanh":
            return None
        inner = node.args[0]
        if len(node.users) != 1 or not isinstance(inner, Node) or len(inner.users) != 1 or inner.kwargs:
            return None
        name = op_name(inner).rstrip("_")
        if name not in ("mul", "truediv", "div") or not isinstance(inner.args[1], int | float):
            return None
        if not math.isclose(inner.args[1], cap if name != "mul" else 1 / cap, rel_tol=1e-6):
            return None
        self.softcap, self.capped = abs(cap), True  # tanh is odd
        return inner.args[0]


def _is_product(node: Node, left: Node, right: Node) -> bool:
    return op_name(node) in ("matmul", "__matmul__") and tuple(node.args[:2]) == (left, right)


def _leads_to(node: Node, key: Node, depth: int = 12) -> bool:
    """Whether ``node`` is computed from the product with ``key`` through elementwise ops."""
    if depth == 0:
        return False
    if op_name(node) in ("matmul", "__matmul__"):
        return key in node.args
    return any(_leads_to(n, key, depth - 1) for n in node.all_input_nodes[:1])


def _value_product(softmax: Node, value: Node) -> Node | None:
    """The product of the weights and ``value``, if nothing else reads the weights."""
    node = softmax
    while len(node.users) == 1:
        (user,) = node.users
        if _is_product(user, node, value):
            return user
        dropout = user.target is torch.nn.functional.dropout and _no_dropout(user)
        if not (dropout or keeps_numbers(user)) or user.args[0] is not node:
            return None
        node = user
    return None


def _is_bool(node: Node) -> bool:
    """Whether ``node`` is a mask that says True for what may be seen; added, it is a number like any other."""
    return fake(node) is not None and fake(node).dtype == torch.bool


def _no_dropout(node: Node) -> bool:
    return argument(node, 1, "p", 0.5) == 0.0 or argument(node, 2, "training", True) is False

