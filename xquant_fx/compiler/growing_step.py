"""A compiled step whose KV cache grows by concatenation: what it returns in the place of each concatenation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.fx import GraphModule

from xquant_fx.cache.growing import GrowingKV
from xquant_fx.compiler.compiled_step import CompiledStep
from xquant_fx.passes.context import Grown
from xquant_fx.passes.records import Detection


def has_room(found: Detection, inputs: Sequence[Any]) -> bool:
    """Whether the step of these example inputs fits into the tensors that its growing caches have."""
    index = {node: i for i, node in enumerate(n for n in found.gm.graph.nodes if n.op == "placeholder")}
    for write in found.writes:
        past = None if write.past is None else inputs[index[write.past]]
        new = write.tokens if isinstance(write.tokens, int) else write.tokens.node.hint
        if isinstance(past, GrowingKV) and not past.has_room(new):
            return False
    return True


class GrowingStep:
    """Calls a compiled step, after which each cache is longer; a step that a cache has no room for runs uncompiled."""

    def __init__(self, step: CompiledStep, uncompiled: GraphModule, grown: list[Grown]) -> None:
        self.step, self.uncompiled, self.grown = step, uncompiled, grown
        self.results = {position: each for each in grown for position in each.outputs}

    def __call__(self, *args: Any) -> Any:
        """One step; raises CacheStateError if a cache's tokens were overwritten by another continuation."""
        pasts: dict[int, GrowingKV] = {each.index: args[each.index] for each in self.grown}
        new = {each.index: each.tokens_of(args) for each in self.grown}
        if not all(past.has_room(new[index]) for index, past in pasts.items()):
            return self.uncompiled(*args)
        for past in pasts.values():
            past.resume()
        values = list(self.step(*args))
        longer = {index: past.growth.grown(new[index]) for index, past in pasts.items() if past.growth is not None}
        for position in sorted(self.results):
            values.insert(position, longer[self.results[position].index])
        return tuple(values)
