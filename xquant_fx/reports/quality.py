"""How far a quantized cache moves a model: text, next-token choice, next-token distribution."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from xquant_fx.errors import ArgumentError


@dataclasses.dataclass(frozen=True)
class Agreement:
    """How far two texts agree, as token ids."""

    first_difference: int | None
    """Position of the first token that differs; None if the texts are equal."""
    share: float
    """Positions that hold the same token, divided by the length of the longer text."""


def agreement(reference: Tensor, other: Tensor) -> Agreement:
    """Compare two texts, token ids of one dimension. Free-running texts part for good at one difference."""
    if reference.dim() != 1 or other.dim() != 1:
        raise ArgumentError(f"texts must have one dimension, got {tuple(reference.shape)} and {tuple(other.shape)}")
    common, longer = sorted((len(reference), len(other)))
    equal = reference[:common] == other[:common].to(reference.device)
    differing = (~equal).nonzero().flatten().tolist() + [common] * (common < longer)
    return Agreement(differing[0] if differing else None, int(equal.sum()) / longer if longer else 1.0)


def top1_agreement(reference: Tensor, other: Tensor) -> float:
    """Share of positions where both logits [..., vocabulary] have their maximum at the same token."""
    _check_logits(reference, other)
    return (reference.argmax(-1) == other.argmax(-1)).double().mean().item()


def kl_divergence(reference: Tensor, other: Tensor) -> float:
    """Mean KL(reference || other) in nats over all positions of logits [..., vocabulary], in fp64."""
    _check_logits(reference, other)
    log_p, log_q = (x.double().log_softmax(-1) for x in (reference, other))
    p = log_p.exp()
    per_position = torch.where(p > 0, p * (log_p - log_q), 0.0).sum(-1)
    # A NaN must not hide behind a clamp; what is clamped is rounding of about 1e-17 below zero.
    return per_position.clamp_min(0.0).mean().item()


def teacher_forced_logits(model: Any, ids: Tensor, prompt_length: int, **kwargs: Any) -> Tensor:
    """Logits [B, T - prompt_length, vocabulary] of a Hugging Face model made to write ``ids`` [B, T].

    Goes through ``model.generate``, so that the steps are those that generation takes: the prompt
    in one piece, then one token a step. (A single pass over all tokens would attend to keys and
    values that are not quantized yet.) ``kwargs``, such as ``past_key_values``, go to ``generate``.
    """
    new_tokens = ids.shape[1] - prompt_length
    out = model.generate(
        ids[:, :prompt_length],
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        do_sample=False,
        logits_processor=[_Forced(ids)],
        output_logits=True,
        return_dict_in_generate=True,
        **kwargs,
    )
    return torch.stack(out.logits, 1)


class _Forced:
    """A logits processor that leaves one choice: the next token of ``ids``."""

    def __init__(self, ids: Tensor) -> None:
        self.ids = ids

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        token = self.ids[:, input_ids.shape[1], None].to(scores.device)
        return torch.full_like(scores, -torch.inf).scatter_(1, token, 0.0)


def _check_logits(reference: Tensor, other: Tensor) -> None:
    if reference.shape != other.shape:
        raise ArgumentError(f"logits must have one shape, got {tuple(reference.shape)} and {tuple(other.shape)}")
