"""Which tokens are read: windows of one length, evenly spaced over a text."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from xquant_fx.errors import ArgumentError


def token_ids(tokenizer: Any, text: str) -> tuple[list[int], list[int]]:
    """(what the tokenizer puts in front of every text, the text itself), as token ids."""
    whole = tokenizer(text, verbose=False)["input_ids"]
    plain = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    begin = whole.index(plain[0]) if plain else 0
    return whole[:begin], plain


def cut_windows(tokenizer: Any, text: str, tokens: int, count: int) -> Tensor:
    """``count`` windows [count, tokens] of a text as int64 ids: from the middle of each of ``count`` equal parts.

    Each begins as the tokenizer begins a text (with a BOS token, for many models). Windows of a short text overlap.

    Raises:
        ArgumentError: the text has fewer tokens than a window, or ``count`` is not positive.
    """
    begin, ids = token_ids(tokenizer, text)
    new = tokens - len(begin)
    if count < 1 or new < 1:
        raise ArgumentError(f"a text is cut into 1 window or more of 1 token or more, got {count} of {tokens}")
    if len(ids) < new:
        raise ArgumentError(f"the text must hold a window of {tokens} tokens, it has {len(ids) + len(begin)}")
    spare = len(ids) - new
    starts = [spare * (2 * i + 1) // (2 * count) for i in range(count)]
    return torch.tensor([[*begin, *ids[start : start + new]] for start in starts])
