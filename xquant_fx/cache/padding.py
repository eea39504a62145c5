"""Left padding of a batch: which tokens of a prompt take no part in scales."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from xquant_fx.errors import CacheStateError, ConfigError


class Padding(NamedTuple):
    """Left padding of the prompts to come."""

    start: Tensor
    """int64 [B], padding tokens in front of each row."""
    most: int
    """The largest of them."""
    width: int
    """Tokens of the mask, which are those of the prompt."""

    @classmethod
    def of(cls, padding_mask: Any) -> Padding:
        """What ``padding_mask`` [B, S] says, int or bool, 0 for padding.

        Raises:
            ConfigError: it is no such mask, or its zeros are not on the left.
        """
        if not isinstance(padding_mask, Tensor) or padding_mask.dim() != 2 or not padding_mask.numel():
            seen = tuple(padding_mask.shape) if isinstance(padding_mask, Tensor) else type(padding_mask).__name__
            raise ConfigError(f"padding_mask must be a tensor of shape [B, S], got {seen}")
        with torch.inference_mode(False):
            mask = padding_mask.clone().to(torch.bool)
            start = (~mask).sum(1)
        if not torch.equal(mask, torch.arange(mask.shape[1], device=mask.device) >= start[:, None]):
            raise ConfigError("padding_mask must be left padding: 0s, then 1s in every row")
        return cls(start, int(start.max()), mask.shape[1])

    def rows(self, batch: int) -> Tensor:
        """``start`` of a batch that generate() may have multiplied (beams, several return sequences)."""
        if batch % self.start.shape[0]:
            raise ConfigError(f"padding_mask has {self.start.shape[0]} rows, which do not divide the batch of {batch}")
        return self.start.repeat_interleave(batch // self.start.shape[0])

    def check_prompt(self, tokens: int) -> None:
        """Raise CacheStateError unless a first step of ``tokens`` can be (the beginning of) the padded prompt."""
        if tokens <= self.most:
            raise CacheStateError(
                f"padding_mask says that a row begins with {self.most} tokens of padding, and the first step brings "
                f"{tokens}: give the mask of this prompt (set_padding_mask), or longer chunks (prefill_chunk_size)"
            )
        if tokens > self.width:
            raise CacheStateError(
                f"padding_mask is {self.width} tokens wide, the first step brings {tokens}: give the mask of all that "
                "the prompt has, what a soft prompt puts before it included (set_padding_mask)"
            )

    def check_chunk(self, tokens: int, chunk: int, left: int) -> None:
        """Raise CacheStateError unless ``tokens`` can go on with a prompt in pieces of ``chunk``, ``left`` to come."""
        if tokens != left and (tokens != chunk or tokens > left):
            raise CacheStateError(
                f"padding_mask is {self.width} tokens wide, the prompt had {self.width - left}: reset() the cache and "
                "give the mask of the prompt (set_padding_mask)"
            )
