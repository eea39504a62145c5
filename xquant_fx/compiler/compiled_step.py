"""A compiled graph, called with the stored tensors of whatever cache is passed in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from xquant_fx.passes.context import StateInputs


class CompiledStep:
    """Calls the compiled graph with the stored tensors of whatever cache is passed in."""

    def __init__(
        self, compiled: Callable[..., Any], keep: list[int], quantized: list[int], inputs: StateInputs
    ) -> None:
        self.compiled, self.keep, self.quantized, self.inputs = compiled, keep, quantized, inputs

    def __call__(self, *args: Any) -> Any:
        """One step; raises CacheStateError if its positions did not follow what is stored."""
        states = [args[i].state for i in self.quantized]
        # Kept with the cache: each thread may have its own, and a cache that is dropped must be free to go.
        known = states[0].group.collected.get(self)
        if known is None or known[0] != states:
            known = states[0].group.collected[self] = (states, self.inputs.collect(args))
        lengths = [args[i].shape[2] for i, _ in self.inputs.lengths]
        out = self.compiled(*[args[i] for i in self.keep], *known[1], *lengths)
        for group in {id(s.group): s.group for s in states}.values():
            if self.inputs.step_tokens is not None:
                group.stepped(self.inputs.step_tokens)
            group.faults.check()
        return out
