"""A case as the text of a Python program: a decoder, and how its cache is made and listed."""

from __future__ import annotations

from fuzz import attention, weights
from fuzz.appends import GROWN, POSITIONS, append, indented
from fuzz.case import IN_PLACE, LENGTH, Case
from fuzz.holders import GROWING, HOLDERS

HEAD = """\
import dataclasses
import math

import torch
from torch import Tensor, nn

F = nn.functional
LAYERS, HEADS, KV, D, B, N = {layers}, {heads}, {kv_heads}, {dim}, {batch}, {length}
DTYPE = torch.{dtype}


{before}def make(tensors):
{make}


def empty():
    return make([torch.zeros({shape}, dtype=DTYPE) for _ in range(2 * LAYERS)])


def leaves(cache):
    return {leaves}


def parts(cache):
    return {parts}


class Decoder(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        width = HEADS * D
        self.embed, self.place = nn.Embedding(48, width), nn.Embedding(2 * N, width)
        self.q, self.o = products(width, width), products(width, width)
        self.k, self.v = products(width, KV * D), products(width, KV * D)
        self.sinks = nn.Parameter(torch.randn(HEADS))
        self.to(DTYPE)

    def forward(self, ids, pos, p, pad, cache):
        B, t = ids.shape
        x = self.embed(ids) + self.place(pos)
{position}
{longer}{each_layer}
        return x @ self.embed.weight.T, {returned}
"""

#: One layer; they are written one after the other, since a graph break in a loop keeps all of it from being compiled.
LAYER = """
i = {number}
q = self.q[i](x).view(B, t, HEADS, D).transpose(1, 2) * 2.0
k, v = self.k[i](x).view(B, t, KV, D).transpose(1, 2), self.v[i](x).view(B, t, KV, D).transpose(1, 2)
K, V = {keys}, {values}
{layer}
x = x + self.o[i](y.transpose(1, 2).reshape(B, t, HEADS * D))"""


def source(case: Case) -> str:
    """The program's text."""
    holder, grows = HOLDERS[case.holder], case.append == "cat"
    shape = GROWN[case.layout][0]
    layers = [
        LAYER.format(number=i, keys=holder.keys, values=holder.values, layer=_layer(case, i))
        for i in range(case.layers)
    ]
    before = holder.before + weights.DIFFERS[case.differs][0] + weights.PRODUCTS[case.products]
    as_made = "tuple" if case.holder == "tuple" else "list"
    return HEAD.format(
        layers=case.layers, heads=case.heads, kv_heads=case.kv_heads, dim=case.dim, batch=case.batch, length=LENGTH,
        dtype=case.dtype, before=before, make=indented(holder.make, 1),
        shape=shape.replace("N", "0") if grows else shape, leaves=holder.leaves, parts=holder.parts or "leaves(cache)",
        position=indented(POSITIONS[case.position], 2), longer="        longer = []\n" if grows else "",
        each_layer=indented("".join(layers), 2),
        returned=f"{as_made}(longer)" if grows and case.holder in GROWING else "cache",
    )  # fmt: skip


def _layer(case: Case, number: int) -> str:
    """All lines of one layer between its projections."""
    after_append, after_scores = IN_PLACE[case.in_place]
    _, before_append, after_mask, usual, odd = weights.DIFFERS[case.differs]
    constant = odd if number == case.odd else usual
    masks = attention.RAGGED_MASKS if case.ragged else attention.MASKS
    parts = [before_append.format(constant), append(case.append, case.layout, HOLDERS[case.holder])]
    if case.append == "cat":
        parts.append("longer.append((K, V))")
    parts.append(after_append)
    if case.graph_break == "before attention":
        parts.append("torch._dynamo.graph_break()")
    whole = GROWN[case.layout][1]
    read = attention.READS[case.read]
    parts += [f"{side}_ = {read.format(whole.format(side))}" for side in "KV"]
    parts += ["total = K_.shape[2]", masks[case.mask], after_mask.format(constant)]
    parts += [f"{name} = {_repeated(case, side)}" for name, side in (("keys", "K_"), ("values", "V_"))]
    parts += _attention(case, after_scores)
    if case.graph_break == "between layers":
        parts.append("torch._dynamo.graph_break()")
    return "\n".join(part for part in parts if part)


def _repeated(case: Case, side: str) -> str:
    return side if case.heads == case.kv_heads else attention.REPEATS[case.repeat].format(side)


def _attention(case: Case, after_scores: str) -> list[str]:
    if case.attention != "written out":
        return [attention.SDPA[case.attention], after_scores]
    return [
        attention.PRODUCTS[case.product], attention.BEFORE[case.before], after_scores,
        attention.APPLIED[case.applied], attention.AFTER[case.after], attention.WEIGHTS[case.weights],
        attention.OUTPUTS[case.output],
    ]  # fmt: skip
