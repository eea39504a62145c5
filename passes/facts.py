"""What a graph says about its buffers, found once: writes, mutations, attentions, what lies behind an operand."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch.fx import Graph, Node

from xquant_fx.cache.allocate import quantized_empty
from xquant_fx.cache.growing import STORED_KV, GrowingKV
from xquant_fx.cache.sliding import SlidingKV
from xquant_fx.passes.continued import (
    behind_views,
    differences,
    is_near,
    may_be_past,
    moved_from,
    of_convolution,
    results,
    size,
)  # fmt: skip
from xquant_fx.passes.find_attention import find_attention
from xquant_fx.passes.find_writes import concatenation, find_writes, is_factory, other_mutations
from xquant_fx.passes.products import is_product
from xquant_fx.passes.records import Source, Write
from xquant_fx.passes.trace import argument, at_hand, fake, memory_of, readers, source_of, value_of
from xquant_fx.passes.vocabulary import kind, op_name

NEAR = 64  # nodes to look at, going back from an operand, for a cache that it is computed from


class Mutation(NamedTuple):
    """An in-place op that is no recognised append, and one operand that it writes to."""

    node: Node
    target: Node
    root: Node
    """What ``target`` is a view of."""


class Facts:
    """What one graph says about its buffers; nothing is changed."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.order = {node: i for i, node in enumerate(graph.nodes)}
        self.writes = find_writes(graph)
        # A prompt that allocates its cache attends to itself: what it appends stands for the buffer.
        self.stand_ins = {w.x: w.buffer for w in self.writes if w.buffer.target is quantized_empty}
        self.slides = [w for w in self.writes if w.slide is not None]
        self.stand_ins |= {w.slide.whole: w.buffer for w in self.slides if w.slide and w.slide.whole is not None}
        others = other_mutations(graph, self.writes)
        self.mutations = [Mutation(node, target, memory_of(target)) for node, target in others]
        self.attention = find_attention(graph)
        self.operands = {
            "keys": {attention.key for attention in self.attention},
            "values": {attention.value for attention in self.attention},
        }
        self.attends = {attention.node for attention in self.attention}
        self.has_quantized = any(is_quantized(node) for node in graph.nodes)
        self.replaced: dict[Node, Node] = {}
        """Old tensors to the new ones that are returned in their place, as far as somebody asked."""
        self.read_in: dict[Node, Node] = {}
        """Inputs to the concatenations with new tokens that attention reads, as far as somebody asked."""
        buffers = [fake(write.buffer) for write in self.writes if write.past is None]
        lengths = [value.shape[2] for value in buffers if value is not None]
        self.longest: Any = max(lengths, key=lambda length: at_hand(length) or 0, default=0)
        """Tokens of the longest of the buffers that are appended to; a symbol, maybe."""

    def source(self, operand: Node) -> Source:
        """What ``operand`` is a view of, or a part of, if that is a stack that grows."""
        source = source_of(operand, self.stand_ins)
        if kind(source.root) not in ("unbind", "select"):
            return source
        whole = source_of(memory_of(source.root))
        is_stack = kind(whole.root) == "cat" and value_of(whole.root).dim() > 4
        return (
            Source(whole.root, (*whole.path, op_name(source.root), *source.path), source.reader) if is_stack else source
        )

    def writes_to(self, buffer: Node) -> list[Write]:
        """Recognised appends to ``buffer``."""
        return [w for w in self.writes if w.buffer is buffer]

    def growth(self, node: Node) -> Write | None:
        """The concatenation that ``node`` is, if it appends to a cache."""
        return next((w for w in self.writes if w.node is node and w.past is not None), None)

    def mutated(self, buffer: Node) -> Mutation | None:
        """An in-place op on ``buffer`` or on a view of it that is no recognised append."""
        return next((mutation for mutation in self.mutations if mutation.root is buffer), None)

    def reads(self, user: Node, operand: Node, role: str) -> bool:
        """Whether ``user`` is an attention (or one of its products) that takes ``operand`` as its keys or values."""
        return operand in self.operands[role] and (user in self.attends or is_product(user))

    def is_output_of_attention(self, node: Node) -> bool:
        """Whether ``node`` is an attention op or the product of probabilities and values."""
        values = self.operands["values"]
        return node in self.attends or (is_product(node) and any(n in values for n in node.all_input_nodes))

    def is_buffer(self, node: Node) -> bool:
        """Whether ``node`` is a tensor with tokens, heads, channels that outlives the graph, which writes to it."""
        value = fake(node)
        if is_quantized(node) or self.writes_to(node):
            return True
        if node.op != "placeholder" or value is None or value.dim() < 3:
            return False
        changes = [mutation for mutation in self.mutations if mutation.root is node]
        return bool(changes) and not all(of_convolution(*mutation) for mutation in changes)

    def stored_in(self, node: Node) -> list[Node]:
        """What unrecognised in-place ops put into ``node``."""
        return [n for mutation in self.mutations if mutation.root is node for n in mutation.node.all_input_nodes]

    def grows(self, root: Node) -> Node | None:
        """The old buffer, if ``root`` appends to it by concatenation and is returned, as in DynamicCache."""
        value = fake(root)
        if kind(root) != "cat" or value is None or value.dim() != 4 or argument(root, 1, "dim", 0) not in (2, -2):
            return None
        if not _is_returned(root):
            return None
        parts = [self.source(part).root for part in root.all_input_nodes]
        empty = any((part_value := fake(part)) is not None and part_value.numel() == 0 for part in parts)
        return next((part for part in parts if part.op == "placeholder"), root if empty else None)

    def grows_elsewhere(self, root: Node) -> Node | None:
        """The old tensor, if ``root`` appends to it and is returned, but not along the tokens of [B, H, N, D]."""
        value, dim = fake(root), argument(root, 1, "dim", 0)
        if kind(root) != "cat" or value is None:
            return None
        past = memory_of(root.all_input_nodes[0])
        if past.op != "placeholder" or isinstance(fake(past), torch.nn.Parameter):
            return None
        is_part = value_of(past).dim() > max(4, value.dim())  # all layers' tokens may be put behind the whole at once
        if not _is_returned(root) and not (is_part and any(map(_is_returned, _longer(past)))):
            return None
        is_usual = value.dim() == 4 and dim in (2, -2)
        return None if value.dim() < 3 or (is_usual and not is_part) else past

    def made_anew(self, root: Node) -> Node | None:
        """The old tensor, if ``root`` is put together of it and the graph returns a new one in its place."""
        if self.growth(root) is not None or self.grows(root) is not None or not self._carried_on:
            return None
        found = self._carried_on
        pasts = [node for node in moved_from(root, self._put_into, self._is_known, changed=True) if node in found]
        past = min(pasts, key=lambda node: differences(node, value_of(found[node])), default=None)
        if past is not None:
            self.replaced[past] = found[past]
        return past

    @functools.cached_property
    def _carried_on(self) -> dict[Node, Node]:
        """Inputs to the results that are put together of them, and that are as large but for one size."""
        appended = {write.node for write in self.writes if write.past is not None and not _is_unread(write)}
        found: dict[Node, Node] = {}
        for result in results(self.graph):
            pasts: list[Node] = []
            for changed in (False, True):
                inputs = moved_from(result, self._put_into, lambda n: is_quantized(n) or n in appended, changed)
                inputs = filter(may_be_past, inputs)  # or sizes, beside a result of one number
                new = [node for node in inputs if not self.writes_to(node) and behind_views(result) is not node]
                pasts += [node for node in new if differences(node, value_of(result)) in ((1,) if changed else (0, 1))]
            if pasts:  # the others are new tokens
                found.setdefault(max(pasts, key=size), result)
        return found

    def longer(self, read: set[Node]) -> list[Node]:
        """Inputs that are returned longer by a concatenation and are not in ``read``, keys and values of one shape."""
        pasts = {write.past: write.node for write in self.writes if write.past is not None} | self._carried_on
        found = {
            past: (tuple(map(str, value_of(past).shape)), tuple(map(str, value_of(new).shape)))
            for past, new in pasts.items()
            if kind(behind_views(new)) == "cat" and not is_quantized(behind_views(new)) and may_be_past(past)
            if past not in read and new not in read
        }
        shapes = list(found.values())
        return [past for past, (old, new) in found.items() if old != new and shapes.count((old, new)) > 1]

    def _is_known(self, node: Node) -> bool:
        return is_quantized(node) or self.growth(node) is not None

    def _put_into(self, node: Node) -> list[Node]:
        """What is written to ``node`` in any way; not what is alone in it (a prompt's tokens in a new buffer)."""
        appended = [write.x for write in self.writes_to(node) if write.past is None]
        return [*self.stored_in(node), *(appended if len(appended) > 1 else ())]

    def extended(self, node: Node, operand: Node) -> Node | None:
        """The input that ``node`` puts among new tokens, for ``operand`` of an attention and nothing else."""
        value = fake(node)
        if kind(node) != "cat" or value is None or value.dim() not in (3, 4):  # three: of one head, or of merged ones
            return None
        if argument(node, 1, "dim", 0) not in (value.dim() - 2, -2) or not is_near(node, operand):
            return None
        parts = [self.source(part).root for part in node.all_input_nodes]
        if any(self.is_buffer(part) or self._is_known(part) for part in parts):
            return None  # which are found by themselves
        past = next((part for part in parts if may_be_past(part) and value_of(part).dim() == value.dim()), None)
        if past is None or all(part.op == "placeholder" or is_factory(part) for part in parts):
            return None
        self.read_in[past] = node
        return past

    def overflows(self, root: Node) -> Node | None:
        """The buffer that a part of ``root`` is copied over: a sliding window that this step overflows."""
        for user, _ in readers(root):
            buffer = next((mutation.target for mutation in self.mutations if mutation.node is user), None)
            if buffer is None or kind(user) != "copy" or buffer is root or self.source(buffer).path:
                continue
            value = fake(buffer)
            if value is not None and value.dim() == 4:
                return buffer
        return None

    def caches_behind(self, root: Node) -> list[Node]:
        """The KV buffers that ``root`` is or is computed from, not looking through other attentions."""
        buffer = self.overflows(root) or self.grows_elsewhere(root) or self.made_anew(root)
        if buffer is not None:
            return [buffer]
        found, queue = [], [root]
        for _, node in zip(range(NEAR), queue, strict=False):  # the queue grows meanwhile
            node = self.stand_ins.get(node, node)
            cache = node if self.is_buffer(node) else self.grows(node)
            cache = cache or self.extended(node, root)
            if cache is not None:
                found.append(cache)
            elif not self.is_output_of_attention(node):
                inputs = dict.fromkeys([*node.all_input_nodes, *self.stored_in(node)])
                queue += [n for n in inputs if n not in queue]
        return found


def _is_unread(write: Write) -> bool:
    """Whether a concatenation is returned and read by nothing."""
    return all(user.op == "output" for user, _ in readers(write.node))


def _is_returned(node: Node) -> bool:
    """Whether the graph returns ``node``, a view of it, or a stack that it is put in."""
    queue = [node]
    for each in queue:  # the queue grows meanwhile
        for user, _ in readers(each):
            if user.op == "output":
                return True
            if kind(user) in ("stack", "cat") and user not in queue:
                queue.append(user)
    return False


def _longer(past: Node) -> list[Node]:
    """What concatenations put behind ``past`` give."""
    return [user for user in past.users if kind(user) == "cat" and user.all_input_nodes[:1] == [past]]


def is_quantized(node: Node) -> bool:
    """Whether ``node`` is a quantized buffer: an input, or one that the graph allocates."""
    is_input = node.op == "placeholder" and isinstance(fake(node), STORED_KV)
    return is_input or node.target is quantized_empty or is_quantized_growth(node)


def is_sliding(node: Node) -> bool:
    """Whether ``node`` is a quantized input that holds a sliding window which is full."""
    return node.op == "placeholder" and isinstance(fake(node), SlidingKV)


def is_growing(node: Node) -> bool:
    """Whether ``node`` is a quantized input that grows by concatenation."""
    return node.op == "placeholder" and isinstance(fake(node), GrowingKV)


def is_quantized_growth(node: Node) -> bool:
    """Whether ``node`` puts new tokens behind quantized ones that grow."""
    write = concatenation(node)
    return write is not None and isinstance(fake(write.past), GrowingKV)
