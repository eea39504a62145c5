"""First prompts of a ``StaticCache``: in full precision, until a graph of a step says how it is to be stored.

Nothing is to be learned from their graphs, whose buffers are made in them: so they are not traced. Their queries are
noted on the keys' buffers, for the takeover (``queries.py``).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from xquant_fx.cache.prompt_keys import PromptKeys
from xquant_fx.cache.queries import note


class StaticPrompt:
    """One prompt of a new cache: while it lasts, the first ``update`` of each layer notes its queries."""

    def __init__(self, cache: Any) -> None:
        self.layers = [layer for layer in cache.layers if hasattr(layer, "keys")]
        self.tokens: dict[int, int] = {}
        """Of each layer that has got some."""
        for index in range(len(self.layers)):
            self.layers[index].update = self._noted_by(index)

    def end(self) -> None:
        """From now on, layers are updated by their class."""
        for layer in self.layers:
            vars(layer).pop("update", None)

    @property
    def was_alone(self) -> bool:
        """Whether it was a prompt, and nothing came behind it (waits for the device)."""
        counted = (int(self.layers[index].get_seq_length()) == n for index, n in self.tokens.items())
        return bool(self.tokens) and all(counted)

    def _noted_by(self, index: int) -> Callable[..., tuple[Tensor, Tensor]]:
        def update(key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            layer = self.layers[index]
            del layer.update
            keys, values = layer.update(key_states, value_states, *args, **kwargs)
            self.tokens[index] = key_states.shape[2]
            return PromptKeys.of(keys, partial(note, layer.keys)), values

        return update
