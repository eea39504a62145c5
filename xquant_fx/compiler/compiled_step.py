"""A compiled graph, called with the stored tensors of whatever cache is passed in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from xquant_fx.cache.group import BufferName, CacheGroup
from xquant_fx.cache.state import KVState
from xquant_fx.passes.context import StateInputs


class Known(NamedTuple):
    """What a compiled graph takes of one cache, and which of its buffers it writes."""

    states: list[KVState]
    tensors: list[Tensor]
    groups: list[tuple[CacheGroup, frozenset[BufferName]]]
    """Each cache with its buffers that the graph appends to."""


class CompiledStep:
    """Calls the compiled graph with the stored tensors of whatever cache is passed in."""

    def __init__(
        self,
        compiled: Callable[..., Any],
        keep: list[int],
        quantized: list[int],
        written: frozenset[int],
        inputs: StateInputs,
    ) -> None:
        self.compiled, self.keep, self.quantized, self.inputs = compiled, keep, quantized, inputs
        self.written = written
        """Arguments that the graph appends to."""

    def __call__(self, *args: Any) -> Any:
        """One step; raises CacheStateError if its positions did not follow what is stored, or the last broke off."""
        known = self._known(args)
        for group, names in known.groups:
            if names:
                group.enter(names)
        try:
            out = self.compiled(*[args[i] for i in self.keep], *known.tensors)
        except BaseException:  # Ctrl-C, too
            for group, names in known.groups:
                group.interrupted |= bool(names)
            raise
        for group, names in known.groups:
            if self.inputs.step_tokens is not None:
                group.stepped(self.inputs.step_tokens)
            group.faults.check()
            group.leave(names)
        return out

    def _known(self, args: tuple[Any, ...]) -> Known:
        states = [args[i].state for i in self.quantized]
        # Kept with the cache: each thread may have its own, and a cache that is dropped must be free to go.
        known = states[0].group.collected.get(self)
        if known is None or known.states != states:
            groups = {id(s.group): s.group for s in states}.values()
            written = [args[i].state for i in self.written]
            named = [(group, frozenset(s.name for s in written if s.group is group)) for group in groups]
            known = Known(states, self.inputs.collect(args), named)
            states[0].group.collected[self] = known
        return known
