"""Drive a model step by step, alone or in lock step with the independent reference."""

from __future__ import annotations

import torch
from reference_cache import ReferenceCache
from torch import Tensor
from torch._dynamo.utils import counters

from xquant_fx.compiler.backend import compile_graph
from xquant_fx.compiler.options import parse
from xquant_fx.compiler.tracing_time import watch_tracing
from xquant_fx.compiler.trial import Asked


def interpreted(calls: list | None = None, **options):
    """The backend with the rewritten graph run op by op instead of compiled: all of the pass, none of Inductor.

    Each rewritten graph is compared with the program's at 16 bits first (``self_check``), and must not be refused.
    """
    options = {"self_check": True, **options}

    def backend(gm, inputs, **_):
        refused = counters["xquant"]["self_check refused"]

        def run(graph, example_inputs, request, settings):
            if calls is not None:
                calls.append(graph)
            return graph.forward

        compiled = compile_graph(gm, inputs, parse(None, options), run)
        assert counters["xquant"]["self_check refused"] == refused, "a self-check refused a graph"
        return compiled

    backend.asked = lambda *_: Asked(parse(None, options), by_inductor=False)  # for ``leave_prompts_untraced``
    watch_tracing(backend)  # as the real one, until torch._dynamo.reset()
    return backend


@torch.no_grad()
def logits_of(step, ids: Tensor, cache, **kwargs) -> Tensor:
    """Logits [B, q, V] of one step."""
    return step(ids, past_key_values=cache, use_cache=True, **kwargs).logits


def run_steps(steps, ids: Tensor, cache) -> Tensor:
    """Feed ``ids`` [B, T] in pieces: ``steps`` is a list of (callable, tokens). Logits [B, T, V]."""
    out, at = [], 0
    for step, tokens in steps:
        out.append(logits_of(step, ids[:, at : at + tokens], cache))
        at += tokens
    return torch.cat(out, 1)


def lockstep(model, steps, ids: Tensor, cache, config) -> tuple[Tensor, Tensor, ReferenceCache]:
    """Run ``steps`` on ``cache`` and on the reference, which takes over codes at ties.

    Returns both runs' logits [B, T, V] and the reference cache (with the count of ties).
    """
    reference = ReferenceCache(len(cache.layers), config)
    mine, theirs, at = [], [], 0
    for step, tokens in steps:
        piece = ids[:, at : at + tokens]
        mine.append(logits_of(step, piece, cache))
        theirs.append(logits_of(model.forward, piece, reference))
        if at == 0:
            reference.adopt_from(cache)
        reference.flush()
        at += tokens
    return torch.cat(mine, 1), torch.cat(theirs, 1), reference


def relative_error(a: Tensor, b: Tensor) -> float:
    """Norm of the difference over the norm of ``b``, in float64."""
    a, b = a.double(), b.double()
    return float((a - b).norm() / b.norm())


def ties(reference: ReferenceCache) -> tuple[int, int]:
    """(codes taken over at ties, codes compared)."""
    sides = [side for layer in reference.layers for side in (layer.key, layer.value)]
    return sum(s.ties for s in sides), sum(s.total for s in sides)
