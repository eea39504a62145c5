"""Real decode steps through an ``XQuantCache``, the text given token by token."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from xquant_fx.cache.huggingface import XQuantCache
from xquant_fx.evaluate.models import cache_argument, forward
from xquant_fx.plan.config import XQuantConfig
from xquant_fx.plan.plan import Plan


@torch.no_grad()
def step_logits(
    model: Any, ids: Tensor, prompt: int, keep: Tensor, config: XQuantConfig | Plan, compiled: bool = False
) -> tuple[Tensor, XQuantCache]:
    """(logits [B, len(keep), V] at positions ``keep``, the cache): the prompt in one piece, then a token a step.

    Args:
        model: a Hugging Face model.
        ids: int64 [B, T]; the last token is not read.
        prompt: tokens in the first piece.
        keep: int64, positions from ``prompt`` on.
        config: settings or plan of the cache.
        compiled: compile the steps with the backend "xquant"; else they run eagerly, on dequantized values.
    """
    cache = XQuantCache(model.config, max_cache_len=ids.shape[1], config=config)
    forward(model, ids[:, :prompt], cache, torch.tensor([prompt - 1], device=ids.device))
    step = torch.compile(model.forward, backend="xquant") if compiled else model.forward
    given, wanted = cache_argument(model, cache), set(keep.tolist())
    kept = []
    for position in range(prompt, ids.shape[1] - 1):
        logits = step(ids[:, position : position + 1], use_cache=True, **given).logits
        if position in wanted:
            kept.append(logits[:, -1].clone())
    return torch.stack(kept, 1), cache
