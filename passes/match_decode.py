"""Decide whether one attention can become a single ``decode_attention`` op, and say why not.

Matched: scaled_dot_product_attention, or a product, the forms of ``forms.py``, softmax, and a product, whose keys
and values are the buffer itself or heads of it, repeated for the query heads. Nothing is changed.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch.fx import Node

from xquant_fx.passes.facts import is_sliding
from xquant_fx.passes.late_sinks import late_sinks
from xquant_fx.passes.layouts import mask_shape, output_layout, query_layout
from xquant_fx.passes.pair_heads import NOT_HEADS, heads_of_operand, paired
from xquant_fx.passes.records import Absorbed, Attention, Decode, Layout, MaskTerm, Pairing, Source
from xquant_fx.passes.scores import Scene, keeps_last_two, shape_of
from xquant_fx.passes.trace import argument, fake, keeps_numbers, operand, same_value, value_of
from xquant_fx.passes.track_axes import TAKEN, tracked
from xquant_fx.passes.vocabulary import FLEX, kind
from xquant_fx.passes.walk_scores import walk, walk_as_far


def match_decode(attention: Attention, key: Source, value: Source, absorbed: Absorbed | None = None) -> Decode | str:
    """The op's arguments, or why ``attention`` reads dequantized keys and values instead.

    Args:
        absorbed: of latents, what lies between them and the attention.
    """
    query = fake(attention.query)
    if query is None or fake(key.root) is None or fake(value.root) is None:
        return "the shapes of query and cache are unknown"
    if not all(isinstance(size, int) for size in query.shape):
        return "the number of query tokens is dynamic"
    if kind(attention.node) == "flex":
        return f"flex_attention stays: {attention.node.meta.get(FLEX)}"
    read = _tokens(attention, key, value, absorbed)
    if isinstance(read, str):
        return read
    tokens, taken = read
    is_one = attention.scores is None
    found = _one_op(attention, key, value, absorbed, tokens) if is_one else _written_out(attention, key, value)
    if isinstance(found, str):
        return found
    if not (math.isfinite(found.scale) and math.isfinite(found.softcap)):
        return f"the scale {found.scale} or the softcap {found.softcap} is not finite"
    found = dataclasses.replace(found, taken=taken)
    return _why_not_types(attention, found, key, value) or _why_not_masks(found, key, tokens) or found


def first_tokens(operand: Node, root: Node) -> tuple[Any, Any]:
    """How many tokens of the buffer ``root`` its view ``operand`` has, and up to where: None if that is all of them."""
    found = tracked(operand, root)
    sizes = {} if found is None else found.sizes
    return sizes.get("N", value_of(root).shape[2]), sizes.get(TAKEN)


def _tokens(attention: Attention, key: Source, value: Source, absorbed: Absorbed | None) -> tuple[Any, Any] | str:
    """The same of an attention."""
    if absorbed is not None:
        return value_of(key.root).shape[2], None
    read, of_values = first_tokens(attention.key, key.root), first_tokens(attention.value, value.root)
    if not same_value(read[1], of_values[1]):
        return "keys and values are read up to different tokens"
    if read[1] is not None and (key.root.op != "placeholder" or is_sliding(key.root)):
        return "of what grows or slides the first tokens are read"
    return read


def _one_op(attention: Attention, key: Source, value: Source, absorbed: Absorbed | None, tokens: Any) -> Decode | str:
    node, query = attention.node, value_of(attention.query)
    defaults = ((3, "attn_mask", None), (4, "dropout_p", 0.0), (5, "is_causal", False), (6, "scale", None))
    mask, dropout, causal, scale = (argument(node, *each) for each in defaults)
    if causal is not False or dropout != 0.0:
        return "is_causal or dropout_p is set"
    if not (scale is None or isinstance(scale, int | float)):
        return "the scale is no number"
    if query.dim() != 4:
        return "the query has no shape [B, H, q, D]"
    grouped = bool(argument(node, 7, "enable_gqa", False))
    sides = ((attention.key, key.root, "keys"), (attention.value, value.root, "values"))
    pairing: Pairing | str = Pairing()
    if absorbed is None:
        of_keys, of_values = (_kv_heads(*side, query.shape, grouped) for side in sides)
        pairing = _paired(of_keys, of_values, key.root)
    if isinstance(pairing, str):
        return pairing
    scale = 1 / math.sqrt(query.shape[3]) if scale is None else float(scale)
    terms = _mask_of_sdpa(mask, (*query.shape[:3], tokens))
    return Decode(node, attention.query, scale, terms=terms, heads=query.shape[1], pairing=pairing, absorbed=absorbed)


def _kv_heads(taken: Node, root: Node, what: str, query: torch.Size, grouped: bool) -> tuple[int, ...] | str:
    """The head of the buffer ``root`` that each query head of SDPA reads, whose operand is ``taken``."""
    heads, buffer = heads_of_operand(taken, root, what), value_of(root).shape
    if isinstance(heads, str):
        return heads
    if query[1] % len(heads) or query[0] != buffer[0]:
        return f"query {tuple(query)} and {what} {tuple(buffer)} do not fit"
    if len(heads) not in (1, query[1]) and not grouped:  # the product of one broadcasts over the query heads
        return f"{query[1]} query heads and {len(heads)} {what} heads"
    return tuple(head for head in heads for _ in range(query[1] // len(heads)))


def _paired(keys: tuple[int, ...] | str, values: tuple[int, ...] | str, buffer: Node) -> Pairing | str:
    if isinstance(keys, str) or isinstance(values, str):
        return keys if isinstance(keys, str) else str(values)
    return paired(keys, values, value_of(buffer).shape[1])


def masks_of(attention: Attention, key: Source, value: Source) -> tuple[MaskTerm, ...]:
    """What is known of the masks of an attention over the buffer of ``key``, fused or not, of any number of queries."""
    if attention.kind != "scaled_dot_product_attention":
        form = match_decode(attention, key, value)
        return form.terms if isinstance(form, Decode) else _masks_behind_scores(attention)
    return _mask_of_sdpa(argument(attention.node, 3, "attn_mask"), ())


def _masks_behind_scores(attention: Attention) -> tuple[MaskTerm, ...]:
    """Masks of an attention that is written out and not fused, as far as they are known from the softmax back."""
    softmax, shape = attention.node, shape_of(attention.node)
    if attention.scores is None or not shape or argument(softmax, 1, "dim") not in (-1, len(shape) - 1):
        return ()
    heads = shape[1] if len(shape) == 4 else 1
    return walk_as_far(Scene(attention, heads), argument(softmax, 0, "input"))[0].terms


def _mask_of_sdpa(mask: object, scores: tuple[int, ...]) -> tuple[MaskTerm, ...]:
    if not isinstance(mask, Node):
        return ()
    value = fake(mask)
    is_bool = value is not None and value.dtype == torch.bool
    return (MaskTerm(mask, -math.inf if is_bool else None, where=False, scores=scores),)


def _written_out(attention: Attention, key: Source, value: Source) -> Decode | str:
    """From the softmax back to the scores' product, and on to the product with the values."""
    softmax, scores, output = attention.node, attention.scores, attention.output
    assert scores is not None and output is not None
    rank = len(value_of(softmax).shape) if fake(softmax) is not None else 4
    if argument(softmax, 1, "dim") not in (-1, rank - 1):
        return "softmax is not over the last dimension"
    laid_out = _lay_out(attention, key, value)
    if isinstance(laid_out, str):
        return laid_out
    of_query, pairing, heads, of_output = laid_out
    late = late_sinks(softmax, output.node, heads)
    scene = Scene(attention, heads, () if late is None else (late.sum,))
    found = walk(scene, argument(softmax, 0, "input"))
    if isinstance(found, str):
        return found
    if late is not None and found.sinks is not None:
        return "sink logits join the softmax twice"
    weights = softmax if found.sinks is None else _without_last(softmax)
    if weights is None:
        return "something is joined to the scores that is not one logit per head"
    if not _reaches(weights, output.node):
        return "the attention weights are used for something else, too"
    end, sinks = (output.node, found.sinks) if late is None else (late.output, late.logits)
    return Decode(
        end, attention.query, found.scale, found.softcap, found.terms, sinks, heads, of_query, of_output,
        scene.carriers, pairing,
    )  # fmt: skip


def _lay_out(attention: Attention, key: Source, value: Source) -> tuple[Layout, Pairing, int, Layout] | str:
    scores, output = attention.scores, attention.output
    assert scores is not None and output is not None
    key_axes, value_axes = tracked(attention.key, key.root), tracked(attention.value, value.root)
    if key_axes is None or value_axes is None:
        return f"{'keys' if key_axes is None else 'values'} {NOT_HEADS}"
    batch = value_of(key.root).shape[0]
    of_query = query_layout(scores, attention.key, key_axes, batch)
    if isinstance(of_query, str):
        return of_query
    heads = len(of_query[1])
    of_output = output_layout(output, attention.value, value_axes, batch, heads)
    if isinstance(of_output, str):
        return of_output
    pairing = _paired(of_query[1], of_output[1], key.root)
    return pairing if isinstance(pairing, str) else (of_query[0], pairing, heads, of_output[0])


def _without_last(softmax: Node) -> Node | None:
    """``weights[..., :-1]``, if that is all that is read of them."""
    (user, *others) = softmax.users
    index = user.args[1] if kind(user) == "getitem" else None
    cut = index in ((Ellipsis, slice(None, -1, None)), (*[slice(None)] * 3, slice(None, -1, None)))
    return user if cut and not others else None


def _reaches(weights: Node, output: Node) -> bool:
    """Whether ``output`` multiplies the weights as they are, and nothing else reads them."""
    node = weights
    while len(node.users) == 1:
        (user,) = node.users
        if user is output:
            return True
        dropout = kind(user) == "dropout" and _no_dropout(user)
        view = kind(user) in ("view", "reshape") and keeps_last_two(user)
        if not (dropout or keeps_numbers(user) or view) or operand(user) is not node:
            return False
        node = user
    return False


def _no_dropout(node: Node) -> bool:
    return argument(node, 1, "p", 0.5) == 0.0 or argument(node, 2, "training", True) is False


def _why_not_types(attention: Attention, found: Decode, key: Source, value: Source) -> str:
    query, output = value_of(attention.query), fake(found.output)
    shapes = [tuple(value_of(source.root).shape[:3]) for source in (key, value)]
    if shapes[0] != shapes[1]:
        return f"keys and values differ in shape: {shapes[0]} and {shapes[1]}"
    for taken, source, what in ((attention.key, key, "keys"), (attention.value, value, "values")):
        if value_of(taken).dtype != query.dtype or value_of(source.root).dtype != query.dtype:
            return f"query, {what} and cache differ in dtype"
    if output is None or output.dtype != query.dtype:
        return "the output has another dtype than the query"
    return ""


def _why_not_masks(found: Decode, key: Source, tokens: Any) -> str:
    batch = value_of(key.root).shape[0]
    fills = {term.fill for term in found.terms if term.fill is not None}
    if len(fills) > 1 and any(math.isfinite(fill) for fill in fills):
        return f"the scores are filled with different numbers: {sorted(fills)}"
    for term in found.terms:
        mask = fake(term.node)
        if mask is None or not mask.dim() or mask.shape[-1] != tokens:
            return "the mask has no shape [B, H, q, max_cache_len]"
        if mask_shape(tuple(mask.shape), term.scores, batch, found.heads) is None:
            return f"the mask {tuple(mask.shape)} does not fit the scores {term.scores}"
        if mask.dtype not in (torch.bool, torch.float32, value_of(found.query).dtype):
            return f"a mask of {mask.dtype}"
    return ""
