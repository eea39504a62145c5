"""Rewrite moves of full sliding windows to ``quantize_store``; nothing moves any more.

rolled = buffer.roll(-1, 2)                         quantize_store(x, length + arange(1), codes, ...)
rolled[:, :, [-1]] = x                      =>      last = shared_code_load(..., n=N, first=length - N + 1)
buffer.copy_(rolled)                                attention(q, views(last), ...)
attention(q, views(buffer), ...)

whole = cat([buffer[:, :, 1:], x], 2)               quantize_store(x, length + arange(q), codes, ...)
buffer.copy_(whole[:, :, -N:])              =>      whole = shared_code_load(..., n=N - 1 + q, first=length - N + 1)
attention(q, views(whole), ...)                     attention(q, views(whole), ...)
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import GraphModule, Node

from xquant_fx.errors import UnsupportedWriteError
from xquant_fx.passes.context import Context
from xquant_fx.passes.facts import is_sliding
from xquant_fx.passes.find_writes import appended
from xquant_fx.passes.graph import call
from xquant_fx.passes.records import Slide, Write
from xquant_fx.passes.rewrite import BufferRewrite
from xquant_fx.passes.trace import value_of
from xquant_fx.passes.vocabulary import op_name


def rewrite_slides(gm: GraphModule, context: Context) -> int:
    """Rewrite every use of every quantized input that is a full sliding window, and drop it; returns how many.

    Raises:
        UnsupportedWriteError: something other than a move of the window writes to it.
    """
    windows = [node for node in context.state.nodes if is_sliding(node)]
    for buffer in windows:
        SlideRewrite(gm, buffer, context).run()
    return len(windows)


class SlideRewrite(BufferRewrite):
    """All uses of one window, taken in program order."""

    def __init__(self, gm: GraphModule, buffer: Node, context: Context) -> None:
        super().__init__(gm, buffer, context)
        self.width: int = value_of(buffer).shape[2]
        self.slide: Slide | None = None
        """The move that is being rewritten, or was last."""

    def run(self) -> None:
        """Rewrite, then drop the placeholder."""
        for write in self.writes.values():
            if not write.moves:
                raise UnsupportedWriteError(
                    f"{self._where()}: {op_name(write.node)} is no way to append to a sliding window that is full"
                )
        spelling = {node for write in self.writes.values() if write.slide is not None for node in write.slide.nodes}
        order = {node: i for i, node in enumerate(self.graph.nodes)}
        for user in sorted(self.buffer.users, key=order.__getitem__):
            if user in spelling:
                continue
            if user in self.writes:
                self._store(self.writes[user])
            else:
                self._check_view(user, order)
                self._read(user)
        self.graph.erase_node(self.buffer)

    def _store(self, write: Write) -> None:
        self.slide = slide = write.slide
        assert slide is not None
        load = self._stored(write)
        self.graph.erase_node(write.node)
        for node in reversed(slide.nodes):
            if node is slide.whole:
                node.replace_all_uses_with(load)
            self.graph.erase_node(node)
        if slide.whole is not None:  # what the buffer holds now
            with self.graph.inserting_after(load):
                index = (slice(None), slice(None), slice(-self.width, None))
                self.loaded = call(self.graph, operator.getitem, (load, index))

    def _stored(self, write: Write) -> Node:
        load = super()._stored(write)
        if write.slide is None or write.slide.is_full or write.slide.whole is None:
            return load
        with self.graph.inserting_before(write.node):  # a window that is not full yet: its room is loaded
            end = call(self.graph, operator.add, (write.slide.old, self._count(write)))
            return call(self.graph, operator.getitem, (load, (slice(None), slice(None), slice(None, end))))

    def _span(self, past: Node, new_tokens: Node | int) -> dict[str, Any]:
        """Which tokens a load gives back: all that attention reads."""
        if self.slide is None:  # read before anything is written
            end = call(self.graph, operator.add, (past, new_tokens))
            return dict(n=self.width, first=call(self.graph, operator.sub, (end, self.width)))
        if not self.slide.is_full:
            return super()._span(past, new_tokens)
        old = self.width - 1
        n = old + new_tokens if isinstance(new_tokens, int) else call(self.graph, operator.add, (old, new_tokens))
        return dict(n=n, first=call(self.graph, operator.sub, (past, old)))

    def _new_tokens(self, write: Write) -> Node:
        assert write.slide is not None
        x = appended(write.slide.nodes[1])  # the assignment to what was rolled, or the concatenation
        assert isinstance(x, Node)
        return x

    def _positions(self, write: Write) -> Node:
        length = call(self.graph, operator.getitem, (self.tensors["length"], slice(None, 1)))
        new = call(self.graph, torch.arange, (self._count(write),), {"device": value_of(self.buffer).device})
        return call(self.graph, operator.add, (length, new))  # a tensor of its own: the store changes the length

    def _count(self, write: Write) -> Any:
        if isinstance(write.tokens, int):
            return write.tokens
        return call(self.graph, torch.ops.aten.sym_size.int, (self._new_tokens(write), 2))
