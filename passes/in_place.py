"""Why in-place ops keep an attention from being one op.

The op runs where the attention's output is. It reads everything there, and the nodes that it replaces run no more. So
what it reads must still be what it was where the program reads it, and no other tensor may get its numbers from
those nodes.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch.fx import Node

from xquant_fx.cache.storage import share_storage
from xquant_fx.passes.facts import Facts
from xquant_fx.passes.records import Decode, Site
from xquant_fx.passes.scores import shape_of
from xquant_fx.passes.trace import fake, operand
from xquant_fx.passes.vocabulary import COPIES, kind, op_name


def why_not_in_place(site: Site, form: Decode, facts: Facts) -> str:
    """Which in-place op changes what the fused op would read, or is replaced by it; "" if none does."""
    end = facts.order[form.output]
    reads = [(start, read, _memory(read, facts)) for start, read in _reads(site, form, facts)]
    replaced = {*form.carriers, site.attention.node, form.output}
    copies = [mutation.node for mutation in facts.mutations if mutation.root in site.buffers]
    if copies:
        return f"{op_name(copies[0])} changes keys or values that were read"
    assembling = () if form.absorbed is None else form.absorbed.assembling
    for node, target, root in facts.mutations:
        if node in assembling:
            continue
        if node in replaced and target not in form.carriers:
            return f"{op_name(node)} writes to a tensor that is not the scores"
        seen = [(read, of_read) for start, read, of_read in reads if start <= facts.order[node] <= end]
        if any(root is of_read or _share_storage(target, read) for read, of_read in seen):
            return f"{op_name(node)} changes in place what the attention has read"
    return ""


def _memory(read: Node, facts: Facts) -> Node:
    """Whose memory ``read`` is in, as far as views show; a copy is in its own."""
    return read if kind(read) in COPIES else facts.source(read).root


def _reads(site: Site, form: Decode, facts: Facts) -> Iterator[tuple[int, Node]]:
    """(where the program reads it, tensor) for all that the fused op reads at the attention's output."""
    yield facts.order[site.attention.key_reader], form.query
    for node in (*(term.node for term in form.terms), form.sinks):
        if node is not None:
            read_at = [facts.order[user] for user in node.users if user in form.carriers or user is site.attention.node]
            yield min(read_at, default=0), node
    for node in (each for carrier in form.carriers for each in carrier.all_input_nodes):
        if kind(node) == "factory" and len(shape_of(node)) == 0:
            yield 0, node  # it is read as the number that it was made of
    if form.absorbed is not None:
        for read in (form.absorbed.key, form.absorbed.value):
            yield 0, read.weight
            yield 0, read.linear
        yield 0, form.absorbed.rotary_read[0]
    for write in (site.key_write, site.value_write):
        if write is not None:
            yield facts.order[write.node], write.x
            if isinstance(write.positions, Node):
                yield facts.order[write.node], write.positions
    for taken, source in ((site.attention.key, site.key), (site.attention.value, site.value)):
        view: Node | None = taken
        while view is not None and view is not source.root:
            yield 0, view
            view = operand(view)


def _share_storage(a: Node, b: Node) -> bool:
    """Whether ``a`` and ``b`` are views of one tensor by an op that is not known as a view."""
    left, right = fake(a), fake(b)
    return left is not None and right is not None and share_storage(left, right)
