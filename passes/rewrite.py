"""Rewrite appends to quantized buffers to ``quantize_store`` and their reads to ``shared_code_load``.

    buffer.index_copy_(2, pos, k)          quantize_store(k, pos, codes, scale, zero, ring, ...)
    attention(q, views(buffer), ...)   =>  k_all = shared_code_load(codes, scale, zero, ring, ..., past, q_len)
                                           attention(q, views(k_all), ...)

A step of up to STEP_TOKENS tokens loads after it stores (kernels/layout.py says why that is right).
A longer chunk loads its own tokens from ``k`` itself and older ones from the ring as it was before.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import GraphModule, Node

from xquant_fx import ops
from xquant_fx.errors import UnsupportedWriteError
from xquant_fx.kernels.layout import STEP_TOKENS
from xquant_fx.kernels.shared_code_load.arguments import STORED
from xquant_fx.passes.context import Context
from xquant_fx.passes.facts import is_growing, is_sliding
from xquant_fx.passes.find_writes import appended, is_opaque, written_by
from xquant_fx.passes.graph import add_call, call
from xquant_fx.passes.products import query_tokens
from xquant_fx.passes.records import Detection, Write
from xquant_fx.passes.trace import is_shape_query, readers, shares_memory, value_of
from xquant_fx.passes.vocabulary import op_name


def rewrite(gm: GraphModule, context: Context) -> int:
    """Rewrite every use of every quantized placeholder and remove the placeholders; returns how many.

    Raises:
        UnsupportedWriteError: something other than an append writes to one of them.
    """
    stored = context.state.nodes
    buffers = [node for node in stored if not is_growing(node) and not is_sliding(node)]
    for buffer in buffers:
        BufferRewrite(gm, buffer, context).run()
    places = context.placeholders
    for part in context.state.parts:
        writes = [w for w in context.detection.writes if places.get(w.past or w.buffer) in part.buffers]
        part.step_tokens = _step_tokens(writes)
    return len(buffers)


def _step_tokens(writes: list[Write]) -> int | None:
    """Tokens the graph appends: None if it does not, 0 if too many for the windows to give back."""
    if not writes:
        return None
    new = [write.tokens for write in writes]
    return new[0] if isinstance(new[0], int) and len(set(new)) == 1 and new[0] <= STEP_TOKENS else 0


def _query_length(buffer: Node, detection: Detection) -> int:
    """New tokens of the attention that reads ``buffer``, where a step's window still holds them."""
    for site in detection.sites:
        tokens = query_tokens(site.attention) if buffer in site.buffers else None
        if isinstance(tokens, int) and tokens <= STEP_TOKENS:
            return tokens
    return 0


class BufferRewrite:
    """All uses of one quantized buffer, taken in program order."""

    def __init__(self, gm: GraphModule, buffer: Node, context: Context) -> None:
        self.graph, self.buffer, self.loads, self.rotations = gm.graph, buffer, context.loads, context.rotations
        self.context, self.stores = context, context.stores
        self.spec, self.tensors = context.detection.specs[buffer], context.state.nodes[buffer]
        self.writes = {write.node: write for write in context.detection.writes if write.buffer is buffer}
        self.query = _query_length(buffer, context.detection)
        self.loaded: Node | None = None

    def run(self) -> None:
        """Rewrite, then drop the placeholder."""
        order = {node: i for i, node in enumerate(self.graph.nodes)}
        for user in sorted(self.buffer.users, key=order.__getitem__):
            if is_shape_query(user) and not user.users:  # of sizes that nobody uses, or that are numbers by now
                self.graph.erase_node(user)
                continue
            if user in self.writes:
                self._store(self.writes[user])
                continue
            self._check_view(user, order)
            self._read(user)
        self.graph.erase_node(self.buffer)

    def _store(self, write: Write) -> None:
        if write.per_row and not self.spec.ragged:
            raise UnsupportedWriteError(f"{self._where()}: rows are written at positions of their own from here on")
        if write.moves:
            raise UnsupportedWriteError(f"{self._where()}: the window slides, and is stored as one that does not")
        self._stored(write)
        self.graph.erase_node(write.node)

    def _stored(self, write: Write) -> Node:
        """Store what ``write`` appends, just before it; returns the load of all tokens."""
        node, spec = write.node, self.spec
        with self.graph.inserting_before(node):
            x, pos = self._new_tokens(write), self._positions(write)
            past = call(self.graph, operator.getitem, (pos, self._first_of_rows()))
            new = value_of(x).shape[2]
            before: dict[str, Node | None] = {}
            chunk = bool(spec.overwritten) and new > STEP_TOKENS
            if chunk:
                before = {name: call(self.graph, torch.clone, (self.tensors[name],)) for name in spec.overwritten}
            if spec.folded:
                x = self.rotations[node] = call(self.graph, ops.ROTATE, (x, False))
            arguments = dict(x=x, pos=pos, **self.tensors, **spec.store_constants())
            if spec.any_room and not is_growing(self.buffer):  # of one that grows the host knows that there is room
                arguments["max_len"] = self.context.length_of(self.graph, self.buffer)
            op, fit = (ops.STORE_BORROWED, {"fit": spec.fit}) if spec.borrowed else (ops.STORE, {})
            self.stores[node] = add_call(self.graph, op, (), arguments | fit, None)
            tokens = new if isinstance(new, int) else call(self.graph, torch.ops.aten.sym_size.int, (x, 2))
            self.loaded = self.loads[node] = self._load(past, tokens, before, x if chunk else None)
        return self.loaded

    def _check_view(self, view: Node, order: dict[Node, int]) -> None:
        """A load is a copy: nothing may write through it, or read through it what is appended later."""
        if not shares_memory(view) or view.args[0] is not self.buffer:
            return
        later = [order[write] for write in self.writes if order[write] > order[view]]
        for user, operand in readers(view, shares_memory):
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
                length = call(self.graph, operator.getitem, (self.tensors["length"], self._first_of_rows()))
                past = call(self.graph, torch.sub, (length, self.query)) if self.query else length
                self.loaded = self._load(past, self.query, {}, None)
        user.replace_input_with(self.buffer, self.loaded)

    def _load(self, past: Node, new_tokens: Node | int, before: dict[str, Node | None], x: Node | None) -> Node:
        stored = {name: self.tensors[name] for name in STORED} | before
        span = self._span(past, new_tokens)
        arguments = dict(**stored, past=past, new_tokens=new_tokens, x=x, **span, **self.spec.load_constants())
        # The op's dozens of steps took longer than all else here, and most loads are gone once attention is fused.
        like: dict[str, Any] = dict(dtype=self.spec.dtype, device=value_of(self.buffer).device)
        (batch, heads, _, dim), n = self.spec.shape, span["n"]
        size = n.meta["example_value"] if isinstance(n, Node) else n
        return call(self.graph, ops.LOAD, (), arguments, lambda: torch.empty((batch, heads, size, dim), **like))

    def _span(self, past: Node, new_tokens: Node | int) -> dict[str, Any]:
        """Which tokens a load gives back: all that there is room for."""
        return dict(n=self.spec.shape[2])

    def _new_tokens(self, write: Write) -> Node:
        """What is appended, as the graph has it now: what it was detected as may have been replaced since."""
        x = appended(write.node)
        assert isinstance(x, Node)
        batch, heads, dim = self.spec.shape[0], self.spec.shape[1], self.spec.shape[3]
        value = value_of(x)
        if write.slide is not None:
            return x
        whole = value.dim() == 4 and (value.shape[2] != 1 or write.tokens == 1 or not isinstance(write.tokens, int))
        if whole and tuple(value.shape[d] for d in (0, 1, 3)) == (batch, heads, dim):
            return x
        return call(self.graph, torch.Tensor.expand, (x, batch, heads, write.tokens, dim))

    def _first_of_rows(self) -> object:
        """The index of the first number, of each row where rows have their own."""
        return (slice(None), 0) if self.spec.ragged else slice(None, 1)

    def _positions(self, write: Write) -> Node:
        """Positions [q], or [B, q] of a buffer whose rows have lengths of their own."""
        pos = self._given_positions(write)
        if not self.spec.ragged or write.per_row:
            return pos
        return call(self.graph, torch.Tensor.expand, (pos, self.spec.shape[0], *value_of(pos).shape))

    def _given_positions(self, write: Write) -> Node:
        pos = write.positions
        if write.slide is not None:  # a prompt fills the window; what it held is gone
            return call(self.graph, torch.arange, (self.spec.shape[2],), {"device": value_of(self.buffer).device})
        if isinstance(pos, Node):
            value = value_of(pos)
            pos = call(self.graph, torch.reshape, (pos, (1,))) if value.dim() == 0 else pos
            return pos if value.dtype == torch.int64 else call(self.graph, torch.Tensor.to, (pos, torch.int64))
        return call(self.graph, torch.arange, (pos.start, pos.stop), {"device": value_of(self.buffer).device})

    def _where(self) -> str:
        return f"layer {self.spec.layer} {self.spec.role}s"
