"""A cache's first step: take over ordinary KV buffers that the user's program allocated.

The graph of that step is run as it stands, op by op, without compiling: just before a buffer is
appended to, what it holds is quantized and the buffer becomes a :class:`QuantizedKV`, which
quantizes and dequantizes in eager code. Dynamo then sees quantized buffers and compiles the next
step for them; that graph serves every later step and every later cache.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from xquant_fx.cache.allocate import allocate
from xquant_fx.cache.convert import quantize_in_place
from xquant_fx.cache.kv_tensor import QuantizedKV
from xquant_fx.cache.state import CacheGroup, KVState
from xquant_fx.compiler.dynamo_frames import forget_compiled_frame
from xquant_fx.compiler.planning import bind_buffers
from xquant_fx.compiler.prompt_queries import queries_of, show_query
from xquant_fx.errors import CacheStateError
from xquant_fx.passes.records import Detection


class Takeover(torch.fx.Interpreter):
    """Stands in for a compiled graph whose KV buffers are still ordinary tensors."""

    def __init__(self, detection: Detection) -> None:
        super().__init__(detection.gm)
        assert detection.plan is not None
        self.plan = detection.plan
        self.buffers = detection.ordinary
        self.queries = queries_of(detection)
        self.pending: dict[Node, tuple[Tensor, KVState]] = {}

    def __call__(self, *args: Any) -> Any:
        """Run the step on these arguments, which hold a cache that was not seen before."""
        tensors = [args[b.index] for b in self.buffers if b.index is not None]
        if not any(isinstance(t, QuantizedKV) for t in tensors):
            self.pending = self._allocate(tensors)
        else:  # Dynamo took the buffers of a module for the same ones
            forget_compiled_frame()
        return self.run(*args)

    def run_node(self, n: Node) -> Any:
        """Take over the buffer that ``n`` appends to, if it is one, then run ``n``."""
        if n in self.pending:
            buffer, state = self.pending.pop(n)
            show_query(state, n, self.queries, self.env)
            past = self._past(n)
            if past < 0:
                raise CacheStateError(
                    f"layer {state.spec.layer} {state.spec.role}s: positions must not be negative, got {past}"
                )
            if past:
                state.store(buffer[:, :, :past], torch.arange(past, device=buffer.device))
                state.group.drop()
            quantize_in_place(buffer, state)
        return super().run_node(n)

    def _allocate(self, tensors: list[Tensor]) -> dict[Node, tuple[Tensor, KVState]]:
        group = CacheGroup(self.plan, tensors[0].shape[0], tensors[0].device)
        states = allocate(group, bind_buffers(self.plan, self.buffers, tensors))
        appends = (buffer.write.node for buffer in self.buffers)
        return dict(zip(appends, zip(tensors, states, strict=True), strict=True))

    def _past(self, append: Node) -> int:
        """Tokens stored before the append: its first position."""
        positions = next(b.write.positions for b in self.buffers if b.write.node is append)
        if isinstance(positions, slice):
            start = positions.start
            return int(self.env[start] if isinstance(start, Node) else start)
        return int(self.env[positions].reshape(-1)[0])
