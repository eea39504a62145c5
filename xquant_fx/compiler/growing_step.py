"""A compiled step whose KV cache grows by concatenation: what it returns in the place of each concatenation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from xquant_fx.cache.growing import GrowingKV
from xquant_fx.compiler.any_room import ExactRooms, OfAnyRoom
from xquant_fx.compiler.compiled_step import CompiledStep
from xquant_fx.passes.context import Context, Grown


def has_room(context: Context) -> bool:
    """Whether the step of the example inputs fits into the tensors that its growing caches have."""
    for write in context.detection.writes:
        at = None if write.past is None else context.placeholders.get(write.past)  # None too: it is made in the graph
        past = None if at is None else context.inputs[at]
        new = write.tokens if isinstance(write.tokens, int) else write.tokens.node.hint
        if isinstance(past, GrowingKV) and not past.has_room(new):
            return False
    return True


class GrowingStep:
    """Calls a compiled step, after which each cache is longer; a step that a cache has no room for runs uncompiled."""

    def __init__(self, step: CompiledStep, uncompiled: Callable[..., Any], grown: list[Grown]) -> None:
        self.step, self.uncompiled, self.grown = step, uncompiled, grown
        self.of_any_room = step.compiled if isinstance(step.compiled, OfAnyRoom) else None
        self.exactly = ExactRooms(uncompiled, "its wrapper takes what may have another size")
        self.results = {position: each for each in grown for position in each.outputs}

    def __call__(self, *args: Any) -> Any:
        """One step; raises CacheStateError if a cache's tokens were overwritten by another continuation."""
        pasts: dict[int, GrowingKV] = {each.index: args[each.index] for each in self.grown}
        new = {each.index: each.tokens_of(args) for each in self.grown}
        if not all(past.has_room(new[index]) for index, past in pasts.items()):
            return self.uncompiled(*args)
        if self.of_any_room is not None and not self.of_any_room.is_open():
            return self.exactly(*args)
        for past in pasts.values():
            past.resume()
        try:
            values = list(self.step(*args))
        except BaseException:  # Ctrl-C, too: the next step takes back what is stored of this one
            for index, past in pasts.items():
                past.may_have_stored(new[index])
            raise
        longer = {each.index: pasts[each.index].appended(new[each.index], each.keep) for each in self.grown}
        for position in sorted(self.results):
            values.insert(position, longer[self.results[position].index])
        return tuple(values)
