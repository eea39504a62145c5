"""A cache's first step: take over ordinary KV buffers that the user's program allocated.

What a takeover relies on is proven first (``proof.py``), at each call anew: a graph serves many caches. Then the graph
of that step is run as it stands, op by op, without compiling: just before a buffer is
appended to, what it holds is quantized and the buffer becomes a :class:`QuantizedKV`, which
quantizes and dequantizes in eager code. Dynamo then sees quantized buffers and compiles the next
step for them; that graph serves every later step and every later cache.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from xquant_fx.cache.allocate import allocate
from xquant_fx.cache.convert import quantize_in_place
from xquant_fx.cache.group import CacheGroup
from xquant_fx.cache.kv_tensor import QuantizedKV
from xquant_fx.cache.queries import take_note
from xquant_fx.cache.ragged import RaggedState
from xquant_fx.cache.state import KVState
from xquant_fx.compiler.dynamo_frames import forget_compiled_frame
from xquant_fx.compiler.left_alone import report_buffers
from xquant_fx.compiler.options import Request
from xquant_fx.compiler.planning import bind_buffers
from xquant_fx.compiler.prompt_queries import early_queries_of, show_query
from xquant_fx.compiler.proof import Call
from xquant_fx.kernels.cpu.at_hand import wanted
from xquant_fx.passes.find_sites import buffer_name
from xquant_fx.passes.records import Buffer, Detection
from xquant_fx.plan.spec import KVSpec
from xquant_fx.warn_once import warn_once


class Takeover(torch.fx.Interpreter):
    """Stands in for a compiled graph whose KV buffers are still ordinary tensors."""

    def __init__(self, detection: Detection, request: Request) -> None:
        super().__init__(detection.gm)
        self.gm, self.request = detection.gm, request
        self.plans = detection.plans
        self.buffers = detection.ordinary
        self.queries = early_queries_of(detection)

    def __call__(self, *args: Any) -> Any:
        """Run the step on these arguments, which hold a cache that was not seen before."""
        tensors = [args[b.index] for b in self.buffers if b.index is not None]
        if any(isinstance(t, QuantizedKV) for t in tensors):  # Dynamo took the buffers of a module for the same ones
            forget_compiled_frame()
            return self.run(*args)
        call = self._call(args)
        reasons = [(b, call.why_not(b.node, b.write)) for b in self.buffers]
        left = [(buffer, reason) for buffer, reason in reasons if reason] or self._apart(call)
        if left:  # the next call is judged anew, and compiled as what it is then
            report_buffers([(buffer_name(buffer.node), reason) for buffer, reason in left], self.request)
            forget_compiled_frame()
            return self.run(*args)
        with wanted():
            return _Step(self, call, tensors).take_over(*args)

    def _call(self, args: tuple[Any, ...]) -> Call:
        placeholders = self.gm.graph.find_nodes(op="placeholder")
        foresights = {buffer.write.node: buffer.foresight for buffer in self.buffers}
        return Call(self.gm, dict(zip(placeholders, args, strict=True)), foresights)

    def _apart(self, call: Call) -> list[tuple[Buffer, str]]:
        """Buffers of one cache, as it seemed when the graph was judged, that are appended at different positions."""
        firsts: dict[int, int | tuple[int, ...] | None] = {}
        for buffer in self.buffers:
            if buffer.write.slide is not None:  # which goes on from where it was not at the beginning
                continue
            first = call.first_position(buffer.write)
            if firsts.setdefault(buffer.group, first) != first:
                reason = f"the buffer is appended at position {first}, others of its cache at {firsts[buffer.group]}"
                return [(buffer, reason)]
        return []


class _Step(torch.fx.Interpreter):
    """One step that takes over ``tensors``, whose positions ``call`` knows."""

    def __init__(self, takeover: Takeover, call: Call, tensors: list[Tensor]) -> None:
        super().__init__(takeover.gm)
        self.queries = takeover.queries
        self.groups: list[CacheGroup] = []
        self.pending: dict[Node, tuple[Tensor, KVState, int | list[int]]] = {}
        self.appends: dict[Node, Node] = {}
        pairs = list(zip(takeover.buffers, tensors, strict=True))
        for number, plan in enumerate(takeover.plans):
            members = [(buffer, tensor) for buffer, tensor in pairs if buffer.group == number]
            group = CacheGroup(plan, members[0][1].shape[0], members[0][1].device)
            self.groups.append(group)
            states = allocate(group, bind_buffers(plan, *zip(*members, strict=True)))
            warn_of_more([state.spec for state in states], buffer_name(members[0][0].node))
            for (buffer, tensor), state in zip(members, states, strict=True):
                slide = buffer.write.slide
                first = None if slide is None else slide.first  # what moves a window reads it before
                per_row = buffer.write.per_row
                past = call.row_tokens_before(buffer.write) if per_row else call.tokens_before(buffer.write)
                self.pending[first or buffer.write.node] = tensor, state, past
                self.appends[first or buffer.write.node] = buffer.write.node

    def take_over(self, *args: Any) -> Any:
        """Run the step; attention sees what it would have seen in an eager step on a quantized cache."""
        for group in itertools.chain(self.groups, *(cache.rows for cache in self.groups)):
            group.holds_all = True
        try:
            return self.run(*args)
        finally:
            for group in self.groups:
                group.hold_one_layer()

    def run_node(self, n: Node) -> Any:
        """Take over the buffer that ``n`` appends to, or begins to move, if it is one, then run ``n``."""
        if n in self.pending:
            buffer, state, past = self.pending.pop(n)
            show_query(state, self.appends[n], self.queries, self.env)
            state.take_queries(take_note(buffer, buffer))
            if isinstance(state, RaggedState) and isinstance(past, list):
                state.fill(buffer, past)
            elif isinstance(past, int) and past:
                state.store(buffer[:, :, :past], torch.arange(past, device=buffer.device))
            state.group.forget(state)
            state.group.taken_over.append(weakref.ref(quantize_in_place(buffer, state)))
        return super().run_node(n)


def warn_of_more(specs: Sequence[KVSpec], name: str) -> None:
    """Warn of a cache of few tokens, whose residual windows take more memory than it did."""
    stored, full = (sum(each) for each in zip(*((s.stored_bytes, s.full_bytes) for s in specs), strict=True))
    if stored > full and any(spec.quantized for spec in specs):
        warn_once(
            f"KV cache {name}: room for {specs[0].shape[2]} tokens takes {stored:,} bytes quantized, {full:,} in full "
            "precision, as the last residual_length tokens are not quantized",
            key="more memory",
        )
