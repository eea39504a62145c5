"""Attention to latents: find the linear layers that make keys and values of them, so that queries can absorb these.

    c [B, 1, N, R], rotary keys r [B, 1, N, Dr]                            stored
    k = cat([linear(c, W) -> views -> heads, r of each head], -1)          or written into parts of an empty tensor
    v = linear(c, W) -> views -> heads

With W_k and W_v [H, D, R], the rows of W that make keys and values, each score is a sum of two parts, and the values
are projected once instead of once per token:

    q . k = (q_c W_k) . c + q_r . r          p v = (p c) W_v

Nothing is changed here; ``absorb_query.py`` does it.
"""

from __future__ import annotations

from typing import Any

from torch.fx import Node

from xquant_fx.kernels.layout import STEP_TOKENS
from xquant_fx.passes.facts import Facts
from xquant_fx.passes.find_writes import is_factory
from xquant_fx.passes.pair_heads import heads_of_operand
from xquant_fx.passes.records import Absorbed, Attention, Projection
from xquant_fx.passes.trace import argument, fake, is_view_like, operand, value_of
from xquant_fx.passes.track_axes import TAKEN, expected, followed, regrouped, tracked
from xquant_fx.passes.vocabulary import kind

#: Why attention to latents is not one op.
LATENT = "keys or values are computed from what is stored (latent attention)"
Part = tuple[Node, Node, int]
"""A part of the keys' channels, what reads it, and its first channel."""


def match_latent(attention: Attention, rotary: Node, latent: Node, facts: Facts) -> Absorbed | str:
    """How the queries of ``attention`` absorb the layers between them and the buffer ``latent``, or why they do not."""
    query = fake(attention.query)
    if attention.kind != "scaled_dot_product_attention" or query is None or query.dim() != 4:
        return f"{LATENT}, and the attention is no scaled_dot_product_attention"
    shapes = [value_of(node).shape for node in (rotary, latent)]
    if rotary is latent or any(shape[1] != 1 for shape in shapes):
        return f"{LATENT} that is not one latent and one rotary key for all heads"
    if not isinstance(query.shape[2], int) or query.shape[2] > STEP_TOKENS:
        return f"{LATENT}, for more than {STEP_TOKENS} query tokens at once"
    heads, parts = query.shape[1], _parts(attention, facts)
    value = _projection(attention.value, latent, heads)
    made = [_projection(node, latent, heads) for node, _, _ in parts]
    if value is None or len(parts) != 2 or sum(each is not None for each in made) != 1:
        return f"{LATENT}, not by linear layers from one latent beside a rotary part"
    at = 0 if made[0] is not None else 1
    key, rest = made[at], parts[1 - at]
    of_rest = heads_of_operand(rest[0], rotary, "keys")
    if key is None or isinstance(of_rest, str) or len(of_rest) not in (1, heads):
        return f"{LATENT}, not by linear layers from one latent beside a rotary part"
    channels = [slice(first, first + value_of(node).shape[3]) for node, _, first in parts]
    return Absorbed(key, value, channels[at], channels[1 - at], rest[:2], _assembling(attention))


def _assembling(attention: Attention) -> tuple[Node, ...]:
    """What writes parts of the keys into a tensor of their own."""
    return tuple(user for user in attention.key.users if user is not attention.node)


def _parts(attention: Attention, facts: Facts) -> list[Part]:
    """The parts that the channels of the keys are put together from, in order; none where that is not understood."""
    keys, size = attention.key, value_of(attention.key).shape[3]
    if kind(keys) == "cat":
        tensors: Any = argument(keys, 0, "tensors")
        found = [(node, keys) for node in tensors] if argument(keys, 1, "dim", 0) in (-1, 3) else []
        starts = [sum(value_of(node).shape[3] for node in tensors[:i]) for i in range(len(found))]
        parts = [(node, reader, start) for (node, reader), start in zip(found, starts, strict=True)]
        return parts if len(keys.users) == 1 else []
    if not is_factory(keys):
        return []
    parts = []
    for user in _assembling(attention):
        index, part = argument(user, 1, "index"), argument(user, 2, "value")
        last = index[-1] if kind(user) == "setitem" and isinstance(index, tuple) else None
        if facts.order[user] > facts.order[attention.node] or not _is_whole(index) or not isinstance(part, Node):
            return []
        if not isinstance(last, slice) or last.step not in (None, 1) or user.args[0] is not keys:
            return []
        channels = range(size)[last]
        if fake(part) is None or value_of(part).dim() != 4 or value_of(part).shape[3] != len(channels):
            return []
        parts.append((part, user, channels.start))
    parts.sort(key=lambda part: part[2])
    ends = [first + value_of(node).shape[3] for node, _, first in parts]
    return parts if [first for _, _, first in parts] == [0, *ends[:-1]] and ends[-1:] == [size] else []


def _is_whole(index: object) -> bool:
    """Whether ``index`` takes all but, perhaps, of the last of four dimensions."""
    items = index[:-1] if isinstance(index, tuple) else (None,)
    return items in ((Ellipsis,), (slice(None),) * 3)


def _projection(node: Node, latent: Node, heads: int) -> Projection | None:
    """The rows of a linear layer's weight that make ``node`` [B, heads, N, D] of ``latent``; None if that is not so."""
    first, size = 0, value_of(node).shape[-1] if fake(node) is not None else 0
    while (cut := _cut(node)) is not None:
        node, first = cut[0], first + cut[1]
    chain: list[Node] = []
    while kind(node) != "linear":
        before = operand(node)
        if not is_view_like(node) or before is None:
            return None
        chain.append(node)
        node = before
    weight, x = argument(node, 1, "weight"), operand(node)
    of_weight, shape = fake(weight), value_of(latent).shape
    if argument(node, 2, "bias") is not None or x is None or not isinstance(weight, Node) or of_weight is None:
        return None
    if of_weight.dim() != 2 or of_weight.shape[0] % heads or not _is_latent(x, latent):
        return None
    width = of_weight.shape[0] // heads
    sizes = {"B": shape[0], "N": shape[2], "H": heads, "D": width}
    whole = (shape[0], heads, shape[2], width)
    rows = regrouped(expected(whole, "B", "N", "H", "D"), sizes, tuple(value_of(node).shape))
    axes = None if rows is None else followed(list(reversed(chain)), rows, sizes)
    return Projection(node, x, weight, width, first, size) if axes == expected(whole, *"BHND") else None


def _cut(node: Node) -> tuple[Node, int] | None:
    """(tensor, first channel) of which ``node`` takes some channels in a row."""
    before = operand(node)
    if kind(node) != "getitem" or before is None or fake(node) is None:
        return None
    rank, index = value_of(node).dim(), node.args[1]
    if kind(before) == "split":
        pieces, x, dim = before.meta.get("example_value"), operand(before), argument(before, 2, "dim", 0)
        if x is None or dim not in (-1, rank - 1) or not isinstance(index, int) or not isinstance(pieces, tuple | list):
            return None
        return x, sum(piece.shape[-1] for piece in pieces[: index % len(pieces)])
    last = index[-1] if isinstance(index, tuple) and _is_whole(index) else None
    if not isinstance(last, slice) or last.step not in (None, 1) or fake(before) is None or value_of(before).dim() != 4:
        return None
    return before, range(value_of(before).shape[-1])[last].start


def _is_latent(x: Node, latent: Node) -> bool:
    """Whether ``x`` holds all of ``latent`` [B, 1, N, R], in order, with R as its last dimension."""
    found, (batch, _, tokens, channels) = tracked(x, latent), expected(value_of(latent).shape, *"BHND")
    if found is None or TAKEN in found.sizes or not found.axes or found.axes[-1] != channels:
        return False
    return [dim for dim in found.axes[:-1] if dim] == [dim for dim in (batch, tokens) if dim]
