"""A compiled graph, called with the stored tensors of whatever caches are passed in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from xquant_fx.cache.folded_weights import FoldedInputs
from xquant_fx.cache.group import BufferName, CacheGroup
from xquant_fx.cache.left import ONCE, leave
from xquant_fx.cache.turns import turns_of
from xquant_fx.compiler.restarts import Restarts
from xquant_fx.errors import CacheStateError
from xquant_fx.passes.context import Part, StateInputs

#: A cache, and which of its buffers the graph appends to.
Entered = tuple[CacheGroup, frozenset[BufferName]]


class CompiledStep:
    """Calls the compiled graph with the stored tensors of whatever caches are passed in.

    ``dequantized`` are the outputs that may take a buffer's place: they must not be quantized a second time.
    """

    def __init__(
        self,
        compiled: Callable[..., Any],
        keep: list[int],
        written: frozenset[int],
        inputs: StateInputs,
        restarts: Restarts,
        dequantized: Sequence[int] = (),
    ) -> None:
        self.compiled, self.keep, self.inputs, self.restarts = compiled, keep, inputs, restarts
        self.folded = FoldedInputs(inputs.folded)
        self.dequantized = dequantized
        self.written = written
        """Arguments that the graph appends to."""

    def __call__(self, *args: Any) -> Any:
        """One step; raises CacheStateError if its positions did not follow what is stored, or the last broke off."""
        if self.restarts.give_back(args):
            return self.restarts.graph(*args)
        parts = self.inputs.parts
        found = [self._collected(number, part, args) for number, part in enumerate(parts)]
        groups = [group for group, _, _ in found]
        if len(parts) == 1:
            tensors = found[0][1]
        else:
            tensors = self._merged([each for _, each, _ in found])
            if len({id(group) for group in groups}) < len(parts):
                raise CacheStateError("this graph was compiled for several caches, and was given one for two of them")
        lengths = [args[i].shape[2] for i, _ in self.inputs.lengths]
        folded = self.folded.of(args) if self.inputs.folded else []
        entered = [(group, names) for group, _, names in found if names]
        with entered[0][0].turn if len(entered) == 1 else turns_of([group.turn for group, _ in entered]):
            for group, names in entered:
                group.enter(names)
            return self._run(args, [*tensors, *lengths, *folded], groups, entered)

    def _run(self, args: tuple[Any, ...], stored: list[Any], groups: list[CacheGroup], entered: list[Entered]) -> Any:
        before = self.restarts.before(args) if self.restarts.computed else []
        try:
            out = self.compiled(*[args[i] for i in self.keep], *stored)
        except BaseException:  # Ctrl-C, too
            for group, _ in entered:
                group.interrupted = True
            raise
        for place in self.dequantized:
            leave(out[place], ONCE)
        for group, part in zip(groups, self.inputs.parts, strict=True):
            if part.step_tokens is not None:
                group.stepped(part.step_tokens)
        for group in groups:
            group.faults.check()
        self.restarts.check(args, before)
        for group, names in entered:
            group.leave(names)
        return out

    def _collected(
        self, number: int, part: Part, args: tuple[Any, ...]
    ) -> tuple[CacheGroup, list[Tensor], frozenset[BufferName]]:
        """The cache of one part, the tensors that the graph takes of it, and the buffers that it appends to.

        They are kept with the cache: each thread may have its own, and a cache that is dropped must be free to go.
        """
        states = [args[i].state for i in part.buffers]
        group = states[0].group
        group.settle()  # tensors that are collected already are not asked for
        known = group.collected.get((self, number))
        if known is None or known[0] != states:
            names = frozenset(args[i].state.name for i in part.buffers if i in self.written)
            known = group.collected[self, number] = (states, part.collect(args), names)
        return group, known[1], known[2]

    def _merged(self, found: list[list[Tensor]]) -> list[Tensor]:
        """The tensors of all parts in the order of the graph's inputs."""
        placed = {
            place: tensor
            for part, tensors in zip(self.inputs.parts, found, strict=True)
            for (place, _, _), tensor in zip(part.slots, tensors, strict=True)
        }
        return [placed[place] for place in range(len(placed))]
