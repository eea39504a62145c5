"""Rewrite growth by concatenation to ``quantize_store``; the graph no longer returns the longer tensor.

    keys = cat([past, k], dim=2)                 quantize_store(k, pos, codes, scale, zero, ring, ...)
    attention(q, views(keys), ...)         =>    attention(q, views(shared_code_load(...)[:, :, :T + q]), ...)
    return keys, ...                             return ...

The compiled step returns the longer tensor in its place (``Grown`` says where): the same state, one step later.

Of a sliding window (``return keys[:, :, -n:]``) the input is the last T tokens of the state, and a load gives back
those and the new ones.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import GraphModule, Node

from xquant_fx.errors import UnsupportedWriteError
from xquant_fx.passes.context import Context, Grown
from xquant_fx.passes.facts import is_growing
from xquant_fx.passes.find_writes import written_by
from xquant_fx.passes.graph import call, size_among_inputs
from xquant_fx.passes.records import Write
from xquant_fx.passes.rewrite import BufferRewrite
from xquant_fx.passes.trace import value_of


def rewrite_growth(gm: GraphModule, context: Context) -> int:
    """Rewrite every use of every quantized input that grows, and drop it from the graph; returns how many.

    Raises:
        UnsupportedWriteError: something other than one concatenation continues it.
    """
    growing = [node for node in context.state.nodes if is_growing(node)]
    for past in growing:
        GrowthRewrite(gm, past, context).run()
    returned = {position for each in context.grown for position in each.outputs}
    output = gm.graph.output_node()
    if returned:
        output.args = (tuple(r for i, r in enumerate(_results(output)) if i not in returned),)
    for write in context.detection.writes:
        if write.kept is not None and not write.kept.users:
            gm.graph.erase_node(write.kept)
    return len(growing)


class GrowthRewrite(BufferRewrite):
    """All uses of one quantized input that grows by concatenation, taken in program order."""

    def __init__(self, gm: GraphModule, past: Node, context: Context) -> None:
        super().__init__(gm, past, context)
        self.writes = {write.node: write for write in context.detection.writes if write.past is past}
        self.before: Node | None = None
        """What is stored when the graph begins, dequantized."""
        self.is_tail: bool = value_of(past).is_tail  # type: ignore[attr-defined]  # it is a GrowingKV

    def _check_view(self, view: Node, order: dict[Node, int]) -> None:
        """Nothing to check: a concatenation leaves views of what it continues as they are."""

    def _store(self, write: Write) -> None:
        if self.loaded is not None:
            raise UnsupportedWriteError(f"{self._where()}: two concatenations continue one tensor in this graph")
        load = self._stored(write)
        self.context.grown.append(self._returned(write))
        with self.graph.inserting_before(write.node):
            whole = load
            if not self.is_tail:
                whole = self._cut(load, call(self.graph, operator.add, (self._tokens(), _new(self.graph, write))))
        write.node.replace_all_uses_with(whole)
        self.graph.erase_node(write.node)

    def _returned(self, write: Write) -> Grown:
        at = tuple(i for i, result in enumerate(_results(self.graph.output_node())) if result is write.returned)
        tokens = write.tokens
        where = tokens if isinstance(tokens, int) else size_among_inputs(self.context.placeholders, tokens)
        if where is None:
            raise UnsupportedWriteError(f"{self._where()}: no input tells how many tokens are new")
        return Grown(self.context.index_of(self.buffer), at, where, write.keep)

    def _read(self, user: Node) -> None:
        if user.op == "output" or self.buffer in written_by(user):
            raise UnsupportedWriteError(f"{self._where()}: {user.name} is no way to append tokens or to read them")
        if self.before is None:
            with self.graph.inserting_before(user):
                whole = self.loaded or self._load_stored()
                self.before = whole if self.is_tail and self.loaded is None else self._cut(whole, self._tokens())
        user.replace_input_with(self.buffer, self.before)

    def _load_stored(self) -> Node:
        return self._load(self._length(), 0, {}, None)

    def _length(self) -> Node:
        """Tokens that are stored when the graph begins."""
        length = call(self.graph, operator.getitem, (self.tensors["length"], slice(None, 1)))
        return call(self.graph, torch.clone, (length,))

    def _span(self, past: Node, new_tokens: Node | int) -> dict[str, Any]:
        if not self.is_tail:
            return super()._span(past, new_tokens)
        tokens = self._tokens()
        n = tokens if new_tokens == 0 else call(self.graph, operator.add, (tokens, new_tokens))
        return dict(n=n, first=call(self.graph, operator.sub, (past, tokens)))

    def _cut(self, load: Node, tokens: Any) -> Node:
        whole, size = value_of(load), tokens.meta["example_value"] if isinstance(tokens, Node) else tokens
        shape = (*whole.shape[:2], size, whole.shape[3])
        kept = (slice(None), slice(None), slice(None, tokens))
        return call(
            self.graph, operator.getitem, (load, kept), result=lambda: whole.new_empty_strided(shape, whole.stride())
        )

    def _tokens(self) -> Any:
        """Tokens that the input has: a number, or a node that is an input itself."""
        return self.context.length_of(self.graph, self.buffer) or value_of(self.buffer).shape[2]

    def _positions(self, write: Write) -> Node:
        device = value_of(self.buffer).device
        if self.is_tail:  # the input says nothing of tokens that have left the window
            new = call(self.graph, torch.arange, (_new(self.graph, write),), {"device": device})
            return call(self.graph, operator.add, (self._length(), new))
        # From the length that the input has, not from the stored one: that may be longer, where a step was interrupted.
        begin = self._tokens()
        end = call(self.graph, operator.add, (begin, _new(self.graph, write)))
        return call(self.graph, torch.arange, (begin, end), {"device": device})


def _new(graph: Any, write: Write) -> Any:
    """New tokens: a number, or a node."""
    return write.tokens if isinstance(write.tokens, int) else call(graph, torch.ops.aten.sym_size.int, (write.x, 2))


def _results(output: Node) -> tuple[Any, ...]:
    results = output.args[0]
    assert isinstance(results, tuple | list)
    return tuple(results)
