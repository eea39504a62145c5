"""Passes that begin in the middle of a model: layers below keep the outputs that an earlier pass noted.

A pass that differs from another one from some layer on need not compute what lies below. Where the decoder's layers
are found, and running none of them gives the logits again, they are left out; else every pass runs whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from xquant_fx.plan.model_weights import decoder_layers


class Noted:
    """Outputs of a model's layers in one pass."""

    def __init__(self, model: Any) -> None:
        self.layers = decoder_layers(model)
        self.outputs: list[Any] = []

    @contextmanager
    def noting(self) -> Iterator[None]:
        """Note the outputs of the pass that runs in the block."""
        self.outputs = [None] * len(self.layers)
        hooks = [layer.register_forward_hook(self._hook(i)) for i, layer in enumerate(self.layers)]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    @contextmanager
    def from_layer(self, first: int) -> Iterator[None]:
        """In the block, layers below ``first`` (counted over all layers of the model) give what was noted."""
        replaced = self.layers[:first]
        try:
            for layer, output in zip(replaced, self.outputs, strict=False):
                layer.forward = _constant(output)  # an attribute of the object hides the method of its class
            yield
        finally:
            for layer in replaced:
                layer.__dict__.pop("forward", None)

    def forget(self) -> None:
        """Let every pass run whole."""
        self.layers, self.outputs = [], []

    def _hook(self, index: int) -> Any:
        def note(module: Any, args: Any, output: Any) -> None:
            self.outputs[index] = output

        return note


def _constant(output: Any) -> Any:
    return lambda *args, **kwargs: output
