"""Let queries absorb the linear layers that make keys and values of latents (``match_latent.py``).

    q . k = (q_c W_k) . c + q_r . r          p v = (p c) W_v

The op attends with q_r to the rotary keys r, with the latents c as its values; scores of the latents come as a mask.
Latents are dequantized once for these, [B, 1, N, R], and never projected to keys and values of each head.
"""

from __future__ import annotations

import math

import torch
from torch.fx import Graph, Node

from xquant_fx.passes.graph import call
from xquant_fx.passes.records import Absorbed, Projection
from xquant_fx.passes.trace import value_of


def absorb_query(
    graph: Graph, query: Node, latents: Node, mask: Node | None, absorbed: Absorbed, scale: float
) -> tuple[Node, Node]:
    """(rotary part of ``query`` [B, H, q, D], ``mask`` with the scores of ``latents`` added, [B, H, q, N])."""
    of_latent, rotary = (
        call(graph, torch.narrow, (query, 3, part.start, part.stop - part.start))
        for part in (absorbed.query, absorbed.rotary)
    )
    weight = _rows(graph, absorbed.key, value_of(query).shape[1])
    of_latent = call(graph, torch.einsum, ("bhqd,hdr->bhqr", of_latent, weight))
    scores = _scores(graph, of_latent, latents, scale)
    if mask is None:
        return rotary, scores
    if value_of(mask).dtype == torch.bool:
        return rotary, call(graph, torch.where, (mask, scores, -math.inf))
    return rotary, call(graph, torch.add, (scores, mask))


def project_result(graph: Graph, result: Node, projection: Projection) -> Node:
    """What weighed latents ``result`` [B, H, q, R] are as values, [B, H, q, D]."""
    weight = _rows(graph, projection, value_of(result).shape[1])
    return call(graph, torch.einsum, ("bhqr,hdr->bhqd", result, weight))


def _rows(graph: Graph, projection: Projection, heads: int) -> Node:
    """[H, D, R], a view of the linear layer's weight."""
    weight = call(graph, torch.unflatten, (projection.weight, 0, (heads, projection.width)))
    return call(graph, torch.narrow, (weight, 1, projection.first, projection.size))


def _scores(graph: Graph, query: Node, latents: Node, scale: float) -> Node:
    """float32 [B, H, q, N]: as one product per sequence, as ``matmul`` would copy latents for each head."""
    heads, tokens = value_of(query).shape[1:3]
    rows = call(graph, torch.flatten, (query, 1, 2))
    stored = call(graph, torch.transpose, (call(graph, torch.squeeze, (latents, 1)), 1, 2))
    rows, stored = (call(graph, torch.Tensor.to, (each, torch.float32)) for each in (rows, stored))
    scores = call(graph, torch.bmm, (rows, stored))
    return call(graph, torch.mul, (call(graph, torch.unflatten, (scores, 1, (heads, tokens))), scale))
