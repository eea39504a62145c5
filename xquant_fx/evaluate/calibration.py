"""The text that a plan is chosen on: built in, given, or written by the model itself.

The built-in text has four parts of 8 kB: dialogue of two novels (Conan Doyle, The Lost World; Gaskell, Wives and
Daughters; public domain), technical prose and Python of this project. Windows are evenly spaced over them.
"""

from __future__ import annotations

import dataclasses
from importlib.resources import files
from typing import Any

import torch
from torch import Tensor

from xquant_fx.errors import ArgumentError
from xquant_fx.evaluate.models import load_tokenizer
from xquant_fx.evaluate.windows import cut_windows

#: In the place of a text: the model writes it.
SAMPLED = "sampled"


@dataclasses.dataclass(frozen=True)
class Windows:
    """What is read of a text, in tokens."""

    count: int
    tokens: int
    """Of a window."""
    prompt: int
    """Of a window, read in full precision first."""
    stride: int = 1
    """Every so many of the tokens after the prompt is measured."""

    @classmethod
    def for_model(cls, config: Any) -> Windows:
        """Eight windows of 1,216 tokens, 64 of them after the prompt; or as long as the model's context is.

        Losses grow with what lies in the cache, and not alike in all layers: short prompts choose other plans.
        """
        context = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None) or 1216
        tokens = min(1216, context)
        return cls(8, tokens, tokens - min(64, tokens // 2))

    @property
    def positions(self) -> Tensor:
        """What is measured of a window: int64."""
        return torch.arange(self.prompt, self.tokens - 1, self.stride)


def calibration_ids(model: Any, text: str | Tensor | None, tokenizer: Any, windows: Windows) -> Tensor:
    """Token ids [count, tokens], int64, on the model's device.

    Args:
        model: a Hugging Face model.
        text: any text; None: the built-in one; ``SAMPLED``: what the model writes; or token ids [n, T], taken as they
            are.
        tokenizer: of the model; None: the one that lies beside its weights.
        windows: how many, how long.

    Raises:
        ArgumentError: the text is too short, or no tokenizer is found.
    """
    if isinstance(text, Tensor):
        return _checked(text).to(model.device)
    if text == SAMPLED:
        return sampled_ids(model, windows)
    content = text or files("xquant_fx.evaluate").joinpath("calibration.txt").read_text(encoding="utf-8")
    found = tokenizer if tokenizer is not None else load_tokenizer(model)
    return cut_windows(found, content, windows.tokens, windows.count).to(model.device)


def _checked(ids: Tensor) -> Tensor:
    if ids.dim() != 2 or ids.dtype != torch.int64 or ids.shape[1] < 4:
        raise ArgumentError(
            f"token ids must be int64 [windows, tokens] of 4 tokens or more, got {ids.dtype} {list(ids.shape)}"
        )
    return ids


@torch.no_grad()
def sampled_ids(model: Any, windows: Windows) -> Tensor:
    """What the model writes after its BOS token at temperature 1, the same each time: int64 [count, tokens]."""
    begin = model.config.get_text_config(decoder=True).bos_token_id or 0
    ids = torch.full((windows.count, 1), begin, device=model.device)
    with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(0)
        return model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
            min_new_tokens=windows.tokens - 1, max_new_tokens=windows.tokens - 1,
        )  # fmt: skip
