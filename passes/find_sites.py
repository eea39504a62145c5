"""Decide, for every attention in a graph, whether its KV cache can be quantized, and say why not."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch.fx import Node

from xquant_fx.cache.allocate import Slot, quantized_empty
from xquant_fx.passes.facts import NEAR, Facts, Mutation, is_quantized, is_quantized_growth
from xquant_fx.passes.find_writes import concatenation, is_factory, is_opaque
from xquant_fx.passes.inner_graphs import written_inside
from xquant_fx.passes.records import Attention, Refused, Site, Source, Write
from xquant_fx.passes.trace import fake, is_shape_query, operand, same_value
from xquant_fx.passes.vocabulary import kind, op_name
from xquant_fx.passes.why_left_alone import why_not_length, why_not_operand, why_not_pair, window_tokens

NOT_RECOGNISED = "and no attention that is recognised reads it here (one that is spelt out, or a graph break?)"
#: Writes to places that an index names, as a KV cache's; ops that append are known by themselves.
BY_INDEX = ("scatter_", "index_add_", "index_put_", "index_copy_", "index_fill_", "masked_scatter_")
#: Likewise, if what is written to is a part of the buffer.
BY_PART = ("setitem", "copy_")

#: Why the surroundings of a graph, or the tensors of a call, keep the buffer ``node`` ("keys" or "values") as it is.
Refusal = Callable[[Node, str, Facts], Refused]


def find_sites(facts: Facts, refusal: Refusal = lambda node, what, facts: Refused("")) -> list[Site]:
    """One record per attention op, in program order; and one for buffers that none of them reads. Changes nothing."""
    sites = [_site(attention, facts, refusal) for attention in facts.attention]
    operands = [operand for a in facts.attention for operand in (a.key, a.value)]
    read = {cache for operand in operands for cache in facts.caches_behind(facts.source(operand).root)}
    sites += [_site(attention, facts, refusal) for attention in _unrecognised(facts, read)]
    return sorted(sites, key=lambda site: facts.order[site.attention.node])


def _unrecognised(facts: Facts, read: set[Node]) -> Iterator[Attention]:
    """For inputs that are appended to and are not in ``read``: keys with their values, as far as one can tell.

    Likewise for those that are written to by index in another way, for those that grow in a graph without any
    attention, and for pairs that are returned longer.
    """
    writes = [w for w in facts.writes if w.buffer.op == "placeholder" and w.buffer not in read]
    while writes:
        write, *writes = writes
        other = next((w for w in writes[:1] if same_value(w.positions, write.positions)), write)
        writes = [w for w in writes if w.buffer not in (write.buffer, other.buffer)]
        readers = [user for user in write.buffer.users if user is not write.node and not is_shape_query(user)]
        node = (readers or [write.node])[0]
        if is_quantized(write.buffer) and not readers:
            continue  # they are read in another graph
        yield Attention(node, "nothing recognised", write.x, write.buffer, other.buffer, is_recognised=False)
    growths = {w.past: w for w in facts.writes if w.past is not None and not is_quantized_growth(w.node)}
    alone = [] if facts.attention else [past for past in growths if past.op == "placeholder"]
    pairs = (past for past in facts.longer(read) if not _chooses_tokens(past))
    for past in dict.fromkeys([*alone, *pairs]):
        grown = growths.get(past)
        if past in read or (grown is not None and grown.node in read):
            continue
        node, cache = (next(iter(past.users)), past) if grown is None else (grown.node, grown.buffer)
        x = node if grown is None else grown.x
        yield Attention(node, "nothing recognised", x, cache, cache, is_recognised=False)
    for mutation in _by_index(facts, read):
        node, root = mutation.node, mutation.root
        yield Attention(node, "nothing recognised", node, root, root, is_recognised=False)
    for node in filter(is_opaque, facts.order):
        inside = [root for root in written_inside(node) if root.op == "placeholder" and root not in read]
        for root in inside[:1] if len(inside) > 1 else ():  # one alone may be any state
            yield Attention(node, "nothing recognised", node, root, root, is_recognised=False)


def _by_index(facts: Facts, read: set[Node]) -> Iterator[Mutation]:
    """Writes to places of an input as a KV cache has them: of four dimensions, or two parts of one shape (K and V).

    A single write to a part may be that of any state, that of a convolution for one; and a recurrent state is made of
    what it was.
    """
    inputs = [m for m in facts.mutations if m.root.op == "placeholder" and m.root not in read]
    indexers = {root for root in {m.root for m in inputs} if _chooses_tokens(root)}
    found = [m for m in inputs if m.root not in indexers]
    shapes = [_shape_in_part(m) for m in found]
    for mutation, shape in zip(found, shapes, strict=True):
        by_name = op_name(mutation.node) in BY_INDEX and len(shape) == 4
        if by_name or (shape and shapes.count(shape) > 1 and not _is_recurrence(mutation)):
            yield mutation


def _is_recurrence(mutation: Mutation) -> bool:
    """Whether what is written is computed from what was there: ``state[:, h].copy_(state[:, h] * decay + new)``."""
    value = operand(mutation.node, 2 if kind(mutation.node) == "setitem" else 1)
    queue = [value] if value is not None else []
    for _, node in zip(range(NEAR), queue, strict=False):  # the queue grows meanwhile
        if node is mutation.root:
            return True
        queue += [n for n in node.all_input_nodes if n not in queue]
    return False


def _chooses_tokens(buffer: Node) -> bool:
    """Whether the tokens of ``buffer`` [..., T, D] with the largest scores are looked for, before any layer.

    It holds an indexer's keys then. A router takes the largest, too, but of experts.
    """
    value = fake(buffer)
    if value is None or value.dim() < 2:
        return False
    seen, left, tokens = {buffer}, [buffer], [str(size) for size in value.shape[-2:-1]]
    while left:
        for user in left.pop().users:
            name, longer = op_name(user), fake(user)
            scores = fake(operand(user)) if name == "topk" else None
            if scores is not None and str(scores.shape[-1]) in tokens:
                return True
            if name == "cat" and longer is not None and longer.dim() == value.dim():
                tokens.append(str(longer.shape[-2]))  # of those that grow
            if user not in seen and name not in ("linear", "addmm", "mm"):
                seen.add(user)
                left.append(user)
    return False


def _shape_in_part(mutation: Mutation) -> tuple[object, ...]:
    """The shape of the input that is written to in part; () if it is written as a whole, or can be no cache."""
    value, name = fake(mutation.root), op_name(mutation.node)
    if value is None or value.dim() < 3 or not value.dtype.is_floating_point:
        return ()
    is_part = name in BY_INDEX or (name in BY_PART and (name == "setitem" or mutation.target is not mutation.root))
    return tuple(map(str, value.shape)) if is_part else ()


def _site(attention: Attention, facts: Facts, refusal: Refusal) -> Site:
    key, value = facts.source(attention.key), facts.source(attention.value)
    behind_key, behind_value = facts.caches_behind(key.root), facts.caches_behind(value.root)
    caches = behind_key + behind_value
    operands, name = (key, value), buffer_name((caches or [key.root])[0])
    # Of latents each operand is computed from both buffers: the values' comes first, the keys' is the other one.
    value = _from_cache(value, behind_value, facts)
    key = _from_cache(key, [n for n in behind_key if n is not value.root] or behind_key, facts)
    is_latent = (key, value) != operands
    key_is_rotary = key is not operands[0] and key.root is not value.root and value.root in behind_key
    reason = _reason(attention, key, value, caches, facts)
    allocated_here = all(
        is_factory(s.root) and facts.writes_to(s.root) and not why_not_length(s.root, "", facts) for s in (key, value)
    )
    quantized = is_quantized(key.root) or is_quantized(value.root)
    of_call = False
    if not reason and not quantized:
        refused = refusal(key.root, "keys", facts), refusal(value.root, "values", facts)
        reason, of_call = next((each for each in refused if each.reason), refused[0])
    writes = _write(key, attention.key_reader, facts), _write(value, attention.value_reader, facts)
    return Site(
        attention, key, value, *writes, name,
        has_cache=bool(caches) or is_opaque(attention.node), is_quantized=quantized,
        is_latent=is_latent, key_is_rotary=key_is_rotary,
        allocated_here=allocated_here, reason=reason, of_call=of_call,
        window_tokens=window_tokens(key.root, facts) if reason and caches else 0,
    )  # fmt: skip


def _reason(attention: Attention, key: Source, value: Source, caches: list[Node], facts: Facts) -> str:
    if caches and all(is_quantized(node) for node in caches):
        return ""
    if not attention.is_recognised and is_opaque(attention.node):
        return f"written to inside {op_name(attention.node)}, a graph of its own that is not looked into: do without it"
    if not attention.is_recognised:
        return f"appended to in this graph, {NOT_RECOGNISED}"
    if len(set(caches)) > 2:
        return f"keys and values are computed from {len(set(caches))} buffers"
    return why_not_operand(key, "keys", facts) or why_not_operand(value, "values", facts) or why_not_pair(key, value)


def _from_cache(source: Source, caches: list[Node], facts: Facts) -> Source:
    """``source``, or the first of the ``caches`` that it is computed from (latent attention, say).

    New tokens that overflow a sliding window, and what grows and is cut, are what they are.
    """
    itself = any(find(source.root) is not None for find in (facts.grows, facts.grows_elsewhere, facts.overflows))
    if not caches or source.root in caches or itself:
        return source
    return Source(caches[0], (op_name(source.root), *source.path))


def _write(source: Source, attends: Node, facts: Facts) -> Write | None:
    """The last append before the buffer is read; of a buffer that is read before all of them, the first."""
    writes = facts.writes_to(source.root)
    read_at = facts.order[source.reader or attends]
    before = [write for write in writes if facts.order[write.node] < read_at]
    return next(reversed(before), None) or next(iter(writes), None)


def buffer_name(node: Node) -> str:
    """What a buffer is called in the user's program."""
    if node.target is quantized_empty:
        return Slot.from_json(str(node.args[4])).name
    write = concatenation(node)
    source = getattr(node if write is None else write.past, "_dynamo_source", None)
    try:
        return source.name if isinstance(source.name, str) else source.name()  # type: ignore[union-attr]
    except AttributeError:
        return node.name
