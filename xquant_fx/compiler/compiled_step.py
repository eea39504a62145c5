"""A compiled graph, called with the stored tensors of whatever caches are passed in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from xquant_fx.cache.left import ONCE, leave
from xquant_fx.cache.state import CacheGroup
from xquant_fx.compiler.restarts import Restarts
from xquant_fx.errors import CacheStateError
from xquant_fx.passes.context import Part, StateInputs


class CompiledStep:
    """Calls the compiled graph with the stored tensors of whatever caches are passed in.

    ``dequantized`` are the outputs that may take a buffer's place: they must not be quantized a second time.
    """

    def __init__(
        self,
        compiled: Callable[..., Any],
        keep: list[int],
        inputs: StateInputs,
        restarts: Restarts,
        dequantized: Sequence[int] = (),
    ) -> None:
        self.compiled, self.keep, self.inputs, self.restarts = compiled, keep, inputs, restarts
        self.dequantized = dequantized

    def __call__(self, *args: Any) -> Any:
        """One step; raises CacheStateError if its positions did not follow what is stored."""
        if self.restarts.give_back(args):
            return self.restarts.graph(*args)
        parts = self.inputs.parts
        found = [self._collected(number, part, args) for number, part in enumerate(parts)]
        groups = [group for group, _ in found]
        if len(parts) == 1:
            tensors = found[0][1]
        else:
            tensors = self._merged([each for _, each in found])
            if len({id(group) for group in groups}) < len(parts):
                raise CacheStateError("this graph was compiled for several caches, and was given one for two of them")
        lengths = [args[i].shape[2] for i, _ in self.inputs.lengths]
        out = self.compiled(*[args[i] for i in self.keep], *tensors, *lengths)
        for place in self.dequantized:
            leave(out[place], ONCE)
        for group, part in zip(groups, parts, strict=True):
            if part.step_tokens is not None:
                group.stepped(part.step_tokens)
        for group in groups:
            group.faults.check()
        return out

    def _collected(self, number: int, part: Part, args: tuple[Any, ...]) -> tuple[CacheGroup, list[Tensor]]:
        """The cache of one part, and the tensors that the graph takes of it.

        They are kept with the cache: each thread may have its own, and a cache that is dropped must be free to go.
        """
        states = [args[i].state for i in part.buffers]
        group = states[0].group
        known = group.collected.get((self, number))
        if known is None or known[0] != states:
            known = group.collected[self, number] = (states, part.collect(args))
        return group, known[1]

    def _merged(self, found: list[list[Tensor]]) -> list[Tensor]:
        """The tensors of all parts in the order of the graph's inputs."""
        placed = {
            place: tensor
            for part, tensors in zip(self.inputs.parts, found, strict=True)
            for (place, _, _), tensor in zip(part.slots, tensors, strict=True)
        }
        return [placed[place] for place in range(len(placed))]
