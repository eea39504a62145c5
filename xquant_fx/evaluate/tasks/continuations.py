"""Logits of continuations of a context that is read through a quantized cache, and how much of it was quantized.

A program that decodes prefills its prompt in full precision, and only the steps after it read the cache. So which
tokens are steps decides what a log likelihood measures. By default the last token of the context and all of the
continuation are: every token that is scored has been predicted from the cache, the first one too, which of a prompt in
one piece the prefill predicts. All steps are one pass (``simulate.py``), or are taken one by one.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from xquant_fx.cache.huggingface import XQuantCache
from xquant_fx.errors import ArgumentError
from xquant_fx.evaluate.simulate import Prefilled, reference_logits, simulated_logits
from xquant_fx.evaluate.steps import step_logits
from xquant_fx.kernels.schemes import SCHEMES
from xquant_fx.plan.config import XQuantConfig
from xquant_fx.plan.plan import Plan


@dataclasses.dataclass(frozen=True)
class Through:
    """How texts are read.

    Raises:
        ArgumentError: a negative number of steps.
    """

    config: XQuantConfig | Plan | None = None
    """Of the cache; None: full precision, by the same arithmetic."""
    context_steps: int | None = 1
    """Tokens at the end of a context that are decode steps, too; those before them are prefilled in full precision.
    0: none, as where the context is one prompt; None: all but the very first token."""
    steps: bool = False
    """Real decode steps, one by one; else all in one pass, which gives the same."""

    def __post_init__(self) -> None:
        if self.context_steps is not None and self.context_steps < 0:
            raise ArgumentError(f"context_steps must be None or at least 0, got {self.context_steps}")

    def prompt(self, context: int) -> int:
        """How many tokens of a context are prefilled; the first one always is."""
        return 1 if self.context_steps is None else max(context - self.context_steps, 1)


class Share:
    """What share of the tokens that were read was quantized: of keys and values, mean over layers and steps."""

    def __init__(self) -> None:
        self.total, self.steps = 0.0, 0

    @property
    def mean(self) -> float | None:
        """0 to 1; None before the first step."""
        return self.total / self.steps if self.steps else None

    def add(self, cache: XQuantCache | None, positions: Tensor) -> None:
        """Count steps of a sequence at ``positions`` (int64 [n], tokens stored before each); no cache, no count."""
        if cache is None or not cache.states or not len(positions):
            return
        each = [quantized(state.spec, positions) / positions.clamp_min(1) for state in cache.states]
        self.total += torch.stack(each).mean(0).sum().item()
        self.steps += len(positions)


def quantized(spec: Any, stored: Tensor) -> Tensor:
    """How many of ``stored`` tokens (int64 [n]) of a buffer a step reads quantized: int64 [n]; sinks do not count."""
    if not spec.quantized:
        return torch.zeros_like(stored)
    limits = SCHEMES[spec.scheme].quantized_limit(stored, spec.group_size, spec.residual_length)
    return (limits - spec.sink_tokens).clamp_min(0)


@torch.no_grad()
def continuation_logits(
    model: Any, context: Sequence[int], continuations: Sequence[Sequence[int]], through: Through, share: Share
) -> list[Tensor]:
    """Logits [tokens, V] that predict each token of each continuation of one context.

    Args:
        model: a Hugging Face model.
        context: token ids, one at least.
        continuations: token ids, one at least in each.
        through: how they are read.
        share: where the steps are counted.

    Raises:
        ArgumentError: an empty context or continuation, or a model that only real steps can measure.
    """
    if not context or not continuations or not all(continuations):
        raise ArgumentError("a context and each of its continuations must hold a token or more")
    n, longest = len(context), max(map(len, continuations))
    # Rows are padded on the right: a step sees nothing of what comes after it.
    ids = torch.tensor([[*context, *each, *[each[-1]] * (longest - len(each))] for each in continuations])
    ids, prompt = ids.to(model.device), through.prompt(n)
    keep = torch.arange(max(n - 1, prompt), n + longest - 1, device=model.device)
    window = _continued(Prefilled.of(model, ids[:1], prompt), ids)
    parts = [window.last.expand(len(ids), -1, -1)] if prompt == n else []
    if len(keep):
        logits, cache = _steps(window, keep, through)
        parts.append(logits)
        for each in continuations:
            share.add(cache, keep[keep < n + len(each) - 1].cpu())
    logits = torch.cat(parts, 1)
    return [row[: len(each)] for row, each in zip(logits, continuations, strict=True)]


def _continued(window: Prefilled, ids: Tensor) -> Prefilled:
    """The one prompt of ``window`` continued by each row of ``ids`` [C, T], which all begin with it."""
    if len(ids) == 1:
        return window
    cache = copy.deepcopy(window.cache)
    cache.batch_repeat_interleave(len(ids))
    queries = {layer: q.expand(len(ids), -1, -1, -1) for layer, q in window.queries.items()}
    return window._replace(ids=ids, cache=cache, queries=queries)


def _steps(window: Prefilled, keep: Tensor, through: Through) -> tuple[Tensor, XQuantCache | None]:
    """(logits [C, len(keep), V] at positions ``keep`` after the prompt, the cache; None in full precision)."""
    if through.config is None:
        return (window.rest(keep) if through.steps else reference_logits(window, keep)), None
    if through.steps:
        return step_logits(window.model, window.ids, window.prompt, keep, through.config)
    return simulated_logits(window, keep, through.config)
