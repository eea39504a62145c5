"""``FullPrecisionWindow``: a sliding window of an ``XQuantCache`` that stays as transformers makes it.

Its buffers are never taken over, whatever the backend's options are: the cache has decided. Beyond that it keeps what
an ``XQuantCache`` promises of all its layers: a new prompt of any batch after ``reset()``, a sentence where a step does
not fit, and one where the step before broke off between two layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import StaticSlidingWindowLayer

from xquant_fx.cache.left import keep_buffers_of
from xquant_fx.errors import CacheStateError
from xquant_fx.plan.spec import why_not_tokens


class FullPrecisionWindow(StaticSlidingWindowLayer):
    """The sliding window ``like``, which is not quantized, for ``reason``; ``layers`` are all layers of its cache."""

    keys: Any
    values: Any

    def __new__(cls, *args: Any, **kwargs: Any) -> FullPrecisionWindow:
        new = super().__new__(cls)
        keep_buffers_of(new)  # of copies, too, which have no __init__
        return new

    def __init__(self, like: Any, layers: Sequence[Any], reason: str) -> None:
        super().__init__(max_cache_len=like.max_cache_len, sliding_window=like.max_cache_len)
        if hasattr(like, "_is_croppable"):  # transformers 5.24: no token ever leaves the window
            self._is_croppable = like._is_croppable
        self.layers, self.reason = layers, reason
        self.masked = False
        """Whether masks were made for it since it was empty: a model steps through all layers of the cache."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append; returns what attention sees.

        Raises:
            CacheStateError: the tokens do not fit the cache, or the step before broke off; nothing is changed.
        """
        if self.is_initialized:
            reason = self._why_not(key_states, value_states)
            if reason and self.cumulative_length_int:
                raise CacheStateError(f"a sliding window in full precision: {reason}")
            self.is_initialized = not reason
        if not torch.compiler.is_dynamo_compiling():
            self._check_whole(key_states.shape[2])
        return super().update(key_states, value_states, *args, **kwargs)

    def _why_not(self, key_states: Tensor, value_states: Tensor) -> str:
        # Not by a generator with :=, at which Dynamo of torch 2.11 breaks the graph.
        for old, x in ((self.keys, key_states), (self.values, value_states)):
            if reason := why_not_tokens(x, old.shape, old.dtype):
                return reason
        return ""

    def _check_whole(self, new: int) -> None:
        """The first window of a cache finds that the layers before it have appended ``new`` tokens, and no others."""
        windows = [layer for layer in self.layers if isinstance(layer, FullPrecisionWindow)]
        if not self.masked or windows[0] is not self:
            return
        expected, where = self.cumulative_length_int + new, "before"
        for index, layer in enumerate(self.layers):
            if layer is self:
                expected, where = self.cumulative_length_int, "behind"
            elif hasattr(layer, "cumulative_length") and int(layer.get_seq_length()) != expected:
                raise CacheStateError(
                    f"a sliding window holds {self.cumulative_length_int} tokens, layer {index} {where} it "
                    f"{int(layer.get_seq_length())}, in a step of {new}: the step before was interrupted in between; "
                    "windows in full precision take nothing back, reset() empties the cache"
                )

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(tokens that attention sees, offset of the first)."""
        self.masked = True
        return super().get_mask_sizes(query_length)

    def reset(self) -> None:
        """Empty the layer; its memory is kept for a prompt that fits."""
        super().reset()  # type: ignore[no-untyped-call]
        self.masked = False
