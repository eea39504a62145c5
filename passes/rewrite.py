"""Rewrite appends to quantized buffers to ``quantize_store`` and their reads to ``shared_code_load``.

    buffer.index_copy_(2, pos, k)          quantize_store(k, pos, codes, scale, zero, ring, ...)
    attention(q, views(buffer), ...)   =>  k_all = shared_code_load(codes, scale, zero, ring, ..., past, q_len)
                                           attention(q, views(k_all), ...)

A step of up to STEP_TOKENS tokens loads after it stores (kernels/layout.py says why that is right).
A longer chunk loads its own tokens from ``k`` itself and older ones from the ring as it was before.
"""

from __future__ import annotations

import operator

import torch
from torch.fx import Graph, GraphModule, Node

from xquant_fx import ops
from xquant_fx.cache.kv_tensor import QuantizedKV
from xquant_fx.errors import UnsupportedWriteError
from xquant_fx.kernels.layout import STEP_TOKENS
from xquant_fx.passes.find_writes import find_writes, is_opaque, written_by
from xquant_fx.passes.graph import call
from xquant_fx.passes.records import SiteRecord, Write
from xquant_fx.passes.state_inputs import StateInputs, device_of
from xquant_fx.passes.trace import fake, is_shape_query, op_name, readers, shares_memory
from xquant_fx.plan.spec import KVSpec


def rewrite(gm: GraphModule, inputs: StateInputs, sites: list[SiteRecord]) -> None:
    """Rewrite every use of every quantized placeholder in ``inputs`` and remove the placeholders.

    Raises:
        UnsupportedWriteError: something other than an append writes to one of them.
    """
    for node in gm.graph.nodes:  # what index_copy_ returns is the buffer; in program order chains of them resolve
        if node.target == "index_copy_" and node.args[0] in inputs.nodes:
            node.replace_all_uses_with(node.args[0])
    writes = find_writes(gm.graph)
    for buffer, tensors in inputs.nodes.items():
        spec = fake(buffer).spec
        mine = [w for w in writes if w.buffer is buffer]
        BufferRewrite(gm.graph, buffer, spec, tensors, mine, _query_length(buffer, sites)).run()
    inputs.step_tokens = _step_tokens([w for w in writes if w.buffer in inputs.nodes])


def _step_tokens(writes: list[Write]) -> int | None:
    """Tokens the graph appends: None if it does not, 0 if too many for the windows to give back."""
    if not writes:
        return None
    new = [fake(write.x).shape[2] for write in writes]
    return new[0] if isinstance(new[0], int) and len(set(new)) == 1 and new[0] <= STEP_TOKENS else 0


def _query_length(buffer: Node, sites: list[SiteRecord]) -> int:
    """New tokens of the attention that reads ``buffer``, where a step's window still holds them."""
    for site in sites:
        if buffer in (site.key.root, site.value.root):
            query = fake(site.attention.query)
            if query is not None and isinstance(query.shape[-2], int) and query.shape[-2] <= STEP_TOKENS:
                return query.shape[-2]
    return 0


class BufferRewrite:
    """All uses of one quantized buffer, taken in program order."""

    def __init__(
        self, graph: Graph, buffer: Node, spec: KVSpec, tensors: dict[str, Node | None], writes: list[Write], query: int
    ) -> None:
        self.graph, self.buffer, self.spec, self.tensors = graph, buffer, spec, tensors
        self.writes = {write.node: write for write in writes}
        self.query = query
        self.loaded: Node | None = None
        self.past: Node | None = None

    def run(self) -> None:
        """Rewrite, then drop the placeholder."""
        order = {node: i for i, node in enumerate(self.graph.nodes)}
        for user in sorted(self.buffer.users, key=order.__getitem__):
            if user in self.writes:
                self._store(self.writes[user])
                continue
            self._check_view(user, order)
            self._read(user)
        self.graph.erase_node(self.buffer)

    def _store(self, write: Write) -> None:
        node, spec = write.node, self.spec
        with self.graph.inserting_before(node):
            x, pos = self._new_tokens(write), self._positions(write)
            self.past = call(self.graph, operator.getitem, (pos, slice(None, 1)))
            new = fake(x).shape[2]
            ring = self.tensors["ring"]
            chunk = ring is not None and new > STEP_TOKENS
            if chunk:
                ring = call(self.graph, torch.clone, (ring,))
            target, fit = (ops.STORE_BORROWED, {"fit": spec.fit}) if spec.borrowed else (ops.STORE, {})
            call(self.graph, target, (), dict(x=x, pos=pos, **self.tensors, **spec.store_constants(), **fit))
            new_tokens = new if isinstance(new, int) else call(self.graph, torch.ops.aten.sym_size.int, (x, 2))
            self.loaded = self._load(self.past, new_tokens, ring, x if chunk else None)
        self.graph.erase_node(node)

    def _check_view(self, view: Node, order: dict[Node, int]) -> None:
        """A load is a copy: nothing may write through it, or read through it what is appended later."""
        if not shares_memory(view) or view.args[0] is not self.buffer:
            return
        later = [order[write] for write in self.writes if order[write] > order[view]]
        for user, operand in readers(view, {}, shares_memory):
            if operand in written_by(user) or is_opaque(user):
                raise UnsupportedWriteError(
                    f"{self._where()}: {op_name(user)} on a view of a quantized KV buffer would be lost; append tokens "
                    "with index_copy_(2, positions, x) or buffer[:, :, positions] = x"
                )
            if not is_shape_query(user) and any(append < order[user] for append in later):
                raise UnsupportedWriteError(
                    f"{self._where()}: a view of a quantized KV buffer is read by {op_name(user)} after an append "
                    "that it does not see; take the view after the append"
                )

    def _read(self, user: Node) -> None:
        if is_shape_query(user):
            raise UnsupportedWriteError(f"{self._where()}: dynamic sizes of a quantized buffer are not supported")
        if user.op == "output" or self.buffer in written_by(user) or is_opaque(user):
            raise UnsupportedWriteError(
                f"{self._where()}: {op_name(user)} is not a way to append tokens or to read them"
            )
        if self.loaded is None:
            with self.graph.inserting_before(user):
                length = call(self.graph, operator.getitem, (self.tensors["length"], slice(None, 1)))
                past = call(self.graph, torch.sub, (length, self.query)) if self.query else length
                self.loaded = self._load(past, self.query, self.tensors["ring"], None)
        user.replace_input_with(self.buffer, self.loaded)

    def _load(self, past: Node, new_tokens: Node | int, ring: Node | None, x: Node | None) -> Node:
        tensors = {name: self.tensors[name] for name in ("codes", "scale", "zero", "sink", "start")}
        lengths = dict(past=past, new_tokens=new_tokens, n=self.spec.shape[2])
        given = dict(**tensors, ring=ring, **lengths, **self.spec.load_constants(), x=x)
        return call(self.graph, ops.LOAD, (), given)

    def _new_tokens(self, write: Write) -> Node:
        x, batch, heads, dim = write.x, self.spec.shape[0], self.spec.shape[1], self.spec.shape[3]
        value = fake(x)
        if value.dim() == 4 and tuple(value.shape[d] for d in (0, 1, 3)) == (batch, heads, dim):
            return x
        pos = write.positions
        new = fake(pos).shape[0] if isinstance(pos, Node) else pos.stop - pos.start
        return call(self.graph, torch.Tensor.expand, (x, batch, heads, new, dim))

    def _positions(self, write: Write) -> Node:
        pos = write.positions
        if isinstance(pos, Node):
            value = fake(pos)
            pos = call(self.graph, torch.reshape, (pos, (1,))) if value.dim() == 0 else pos
            return pos if value.dtype == torch.int64 else call(self.graph, torch.Tensor.to, (pos, torch.int64))
        return call(self.graph, torch.arange, (pos.start, pos.stop), {"device": device_of(self.buffer)})

    def _where(self) -> str:
        return f"layer {self.spec.layer} {self.spec.role}s"


def check_nothing_left(gm: GraphModule) -> None:
    """After the rewrite no quantized buffer may be left."""
    for node in gm.graph.nodes:
        if node.op == "placeholder" and isinstance(fake(node), QuantizedKV):
            raise UnsupportedWriteError(f"{node.name} still takes part in the graph as a quantized buffer")
        if isinstance(fake(node), QuantizedKV):  # a view of a buffer, now of a load
            node.meta["example_value"] = fake(node).dense()
