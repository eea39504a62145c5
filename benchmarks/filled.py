"""Caches that hold random keys and values, so that no benchmark of decode steps waits for a prompt."""

from __future__ import annotations

from typing import Any, TypeVar

import torch

C = TypeVar("C")


@torch.no_grad()
def fill(cache: C, model: Any, tokens: int, batch: int = 1) -> C:
    """``cache`` with random keys and values of ``tokens`` tokens in every layer of ``model``, a Hugging Face one."""
    config, store = model.config.get_text_config(decoder=True), cache.update  # type: ignore[attr-defined]
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    shape = (batch, config.num_key_value_heads, tokens, dim)
    for layer in range(config.num_hidden_layers):
        store(*(torch.randn(shape, dtype=model.dtype, device=model.device) for _ in range(2)), layer)
    return cache
