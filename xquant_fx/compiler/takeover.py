"""A cache's first step: take over ordinary KV buffers that the user's program allocated.

The graph of that step is run as it stands, op by op, without compiling: just before a buffer is
appended to, what it holds is quantized and the buffer becomes a :class:`QuantizedKV`, which
quantizes and dequantizes in eager code. Dynamo then sees quantized buffers and compiles the next
step for them; that graph serves every later step and every later cache.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from xquant_fx.cache.convert import quantize_in_place
from xquant_fx.cache.kv_tensor import QuantizedKV
from xquant_fx.cache.state import CacheGroup, KVState
from xquant_fx.compiler.dynamo_frames import forget_compiled_frame
from xquant_fx.errors import CacheStateError
from xquant_fx.passes.records import SiteRecord, Write
from xquant_fx.plan.config import XQuantConfig
from xquant_fx.plan.pairing import SidePlan, borrow_or_own
from xquant_fx.plan.spec import KVSpec


@dataclasses.dataclass(frozen=True, eq=False)  # a key of dicts, by identity: a slice of positions has no hash
class Buffer:
    """One ordinary KV buffer of a graph: argument index, layer number, side and its append."""

    index: int
    layer: int
    side: str
    write: Write


def buffers_of(gm: GraphModule, sites: list[SiteRecord]) -> list[Buffer]:
    """Buffers of the rewritable ``sites``, numbered in layer order (sites may share a layer's)."""
    index = {n: i for i, n in enumerate(n for n in gm.graph.nodes if n.op == "placeholder")}
    found: dict[Node, Buffer] = {}
    layer = 0
    for site in sites:
        if site.key.root in found:
            continue
        for side, source, write in (("key", site.key, site.key_write), ("value", site.value, site.value_write)):
            assert write is not None
            found[source.root] = Buffer(index[source.root], layer, side, write)
        layer += 1
    return list(found.values())


def plan_buffers(
    buffers: list[Buffer], shapes: list[tuple[Any, torch.dtype]], config: XQuantConfig
) -> dict[Buffer, SidePlan]:
    """What becomes of each buffer; ``shapes`` are [B, H, N, D] and dtype, in the same order."""
    count = 1 + max(buffer.layer for buffer in buffers)
    plans: dict[Buffer, SidePlan] = {}
    specs: dict[tuple[int, str], KVSpec] = {}
    for buffer, (shape, dtype) in zip(buffers, shapes, strict=True):
        lower = specs.get((buffer.layer - 1, buffer.side)) if buffer.layer % 2 else None
        plan = borrow_or_own(tuple(shape), dtype, config, buffer.side, buffer.layer, count, lower)
        specs[buffer.layer, buffer.side], plans[buffer] = plan.spec, plan
    return plans


class FirstStep(torch.fx.Interpreter):
    """Stands in for a compiled graph whose KV buffers are still ordinary tensors."""

    def __init__(self, gm: GraphModule, sites: list[SiteRecord], config: XQuantConfig) -> None:
        super().__init__(gm)
        self.config = config
        self.buffers = buffers_of(gm, sites)
        self.pending: dict[Node, tuple[Tensor, KVState]] = {}

    def __call__(self, *args: Any) -> Any:
        """Run the step on these arguments, which hold a cache that was not seen before."""
        tensors = [args[b.index] for b in self.buffers]
        if not any(isinstance(t, QuantizedKV) for t in tensors):
            self.pending = self._allocate(tensors)
        else:  # Dynamo took the buffers of a module for the same ones
            forget_compiled_frame()
        return self.run(*args)

    def run_node(self, n: Node) -> Any:
        """Take over the buffer that ``n`` appends to, if it is one, then run ``n``."""
        if n in self.pending:
            buffer, state = self.pending.pop(n)
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
        plans = plan_buffers(self.buffers, [(t.shape, t.dtype) for t in tensors], self.config)
        group = CacheGroup(self.config, tensors[0].shape[0], tensors[0].device)
        states: dict[tuple[int, str], KVState] = {}
        pending = {}
        for buffer, tensor in zip(self.buffers, tensors, strict=True):
            spec = plans[buffer].spec
            lower = states[buffer.layer - 1, buffer.side] if spec.borrowed else None
            state = states[buffer.layer, buffer.side] = KVState(spec, group, lower)
            pending[buffer.write.node] = (tensor, state)
        return pending

    def _past(self, append: Node) -> int:
        """Tokens stored before the append: its first position."""
        positions = next(b.write.positions for b in self.buffers if b.write.node is append)
        if isinstance(positions, slice):
            start = positions.start
            return int(self.env[start] if isinstance(start, Node) else start)
        return int(self.env[positions].reshape(-1)[0])
