"""The first step of caches that grow by concatenation: their results leave the step quantized.

The step attends to what an eager step would, in full precision. Behind each attention a node is put that quantizes
the keys and values it read, and the graph returns what that node gives, so that at no time more than one layer's
tokens are there in full precision (of a prompt; a cache that was filled by eager code brings its own).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_arg

from xquant_fx.cache.group import CacheGroup
from xquant_fx.cache.growing import GrowingKV
from xquant_fx.cache.growth import Growth, with_lasting_room
from xquant_fx.cache.queries import Notes
from xquant_fx.cache.state import KVState
from xquant_fx.compiler.compiled_prompts import Stretches
from xquant_fx.compiler.planning import geometry_of
from xquant_fx.compiler.prompt_queries import queries_of, show_query
from xquant_fx.kernels.cpu.at_hand import wanted
from xquant_fx.passes.records import Buffer, Detection
from xquant_fx.plan.plan import Plan


class GrowingTakeover:
    """Runs a step whose KV cache grows by concatenation and is in full precision yet, or empty."""

    def __init__(self, detection: Detection, any_room: bool = False, stretches: Stretches | None = None) -> None:
        """With ``any_room`` later steps are compiled for any room (``Growth.any_room``)."""
        self.gm, self.plans, self.any_room = detection.gm, detection.plans, any_room
        self.queries = queries_of(detection)
        self.quantizing = {_behind_attention(detection, buffer, self.queries): buffer for buffer in detection.ordinary}
        if stretches is not None:
            stretches.compile(self.gm, detection, {*self.queries.values(), *(b.node for b in detection.ordinary)})
        detection.gm.recompile()

    def __call__(self, *args: Any) -> Any:
        """Run the step on these arguments, which hold a cache that was not seen before; several threads may."""
        with wanted():
            return _Step(self, args).run(*args)


class _Step(torch.fx.Interpreter):
    """One run of such a step, with the caches that it makes."""

    def __init__(self, takeover: GrowingTakeover, args: Sequence[Any]) -> None:
        super().__init__(takeover.gm)
        inputs = zip(takeover.gm.graph.find_nodes(op="placeholder"), args, strict=True)
        self.notes = {node: Notes(each) for node, each in inputs if isinstance(each, Tensor)}
        self.plans, self.queries, self.quantizing = takeover.plans, takeover.queries, takeover.quantizing
        self.any_room = takeover.any_room
        self.caches: dict[int, _NewCache] = {}

    def run_node(self, n: Node) -> Any:
        """Quantize, where a node says so."""
        buffer = self.quantizing.get(n)
        if buffer is None:
            return super().run_node(n)
        whole = self.env[buffer.node]
        if buffer.group not in self.caches:
            self.caches[buffer.group] = _NewCache(self.plans[buffer.group], whole, self.any_room)
        state = self.caches[buffer.group].allocate(buffer, whole)
        if buffer.write.past in self.notes:
            state.take_queries(self.notes[buffer.write.past].squares_of(whole))
        show_query(state, buffer.write.node, self.queries, self.env)
        state.store(whole, torch.arange(whole.shape[2], device=whole.device))
        state.group.drop()  # nobody reads the prompt in full precision any more
        kept, tokens = buffer.write.keep, whole.shape[2]
        return GrowingKV.of(Growth(state, tokens, self.any_room), begin=max(tokens - kept, 0) if kept else 0)


class _NewCache:
    """The states of one cache, allocated one by one in the order of the program."""

    def __init__(self, plan: Plan, like: Tensor, any_room: bool) -> None:
        self.plan, self.any_room = plan, any_room
        self.group = CacheGroup(plan, like.shape[0], like.device)
        self.states: dict[tuple[int, str], KVState] = {}

    def allocate(self, buffer: Buffer, like: Tensor) -> KVState:
        """An empty state for what ``like`` [B, H, T, D] holds."""
        entry = self.plan.layers[buffer.layer].of(buffer.role)
        lower = None if entry.partner is None else self.states.get((entry.partner, buffer.role))
        shape, dtype, rotary, window, _ = geometry_of(buffer, like, self.any_room)
        spec = entry.bind(buffer.layer, shape, dtype, None if lower is None else lower.spec, rotary, window)
        spec = with_lasting_room(spec, shape[2])
        state = KVState(spec, self.group, lower if spec.borrowed else None)
        self.states[buffer.layer, buffer.role] = state
        return state


def _behind_attention(detection: Detection, buffer: Buffer, queries: Mapping[Node, Node]) -> Node:
    """A node behind the last attention that reads ``buffer``, which the graph returns in its place.

    It takes the query, too: what no node needs any more is not kept (``torch.fx.Interpreter``).
    """
    graph, grown, returned = detection.gm.graph, buffer.node, buffer.write.returned
    readers = {site.attention.value_reader for site in detection.sites if grown in site.buffers}
    last = next(node for node in reversed(graph.nodes) if node in readers)
    with graph.inserting_after(last):
        query = queries.get(buffer.write.node)
        node = graph.call_function(_stands_for, (grown, query if query is not None and query < last else None))
    output = graph.output_node()
    output.args = map_arg(output.args, lambda n: node if n is returned else n)
    return node


def _stands_for(whole: Tensor, query: Tensor | None) -> Tensor:
    raise AssertionError("run by GrowingTakeover")
