"""Decide, for every attention in a graph, whether its KV cache can be quantized, and say why not."""

from __future__ import annotations

import torch
from torch.fx import Graph, Node

from xquant_fx.cache.allocate import quantized_empty
from xquant_fx.cache.kv_tensor import QuantizedKV
from xquant_fx.passes.find_attention import find_attention, is_matmul
from xquant_fx.passes.find_writes import find_writes, is_factory, other_mutations
from xquant_fx.passes.records import Attention, SiteRecord, Source, Write
from xquant_fx.passes.trace import argument, fake, is_shape_query, op_name, readers, source_of

CAT = frozenset({torch.cat, torch.concat, torch.concatenate})
REMAINDERS = frozenset({"mod", "remainder", "fmod", "imod"})
NEAR = 64  # nodes to look at, going back from an operand, for a cache that it is computed from


class Facts:
    """What a graph's nodes say about its buffers, found once."""

    def __init__(self, graph: Graph) -> None:
        self.order = {node: i for i, node in enumerate(graph.nodes)}
        self.writes = find_writes(graph)
        self.aliases = {w.node: w.buffer for w in self.writes if w.how == "index_copy_"}
        # A prompt that allocates its cache attends to itself: what it appends stands for the buffer.
        self.aliases |= {w.x: w.buffer for w in self.writes if w.buffer.target is quantized_empty}
        self.mutations = other_mutations(graph, self.writes)
        self.targets = [(node, source_of(operand, self.aliases).root) for node, operand in self.mutations]
        self.attention = find_attention(graph)
        self.operands = {
            "keys": {attention.key for attention in self.attention},
            "values": {attention.value for attention in self.attention},
        }
        self.attends = {attention.node for attention in self.attention}
        self.has_quantized = any(is_quantized(node) for node in graph.nodes)
        lengths = [fake(write.buffer).shape[2] for write in self.writes]
        self.longest = max((n for n in lengths if isinstance(n, int)), default=0)

    def writes_to(self, buffer: Node) -> list[Write]:
        """Recognised appends to ``buffer``."""
        return [w for w in self.writes if w.buffer is buffer]

    def mutated(self, buffer: Node) -> Node | None:
        """An in-place op on ``buffer`` or on a view of it that is no recognised append."""
        return next((node for node, root in self.targets if root is buffer), None)

    def reads(self, user: Node, operand: Node, role: str) -> bool:
        """Whether ``user`` is an attention (or one of its products) that takes ``operand`` as its keys or values."""
        return operand in self.operands[role] and (user in self.attends or is_matmul(user))

    def is_output_of_attention(self, node: Node) -> bool:
        """Whether ``node`` is an attention op or the product of probabilities and values."""
        values = self.operands["values"]
        return node in self.attends or (is_matmul(node) and any(n in values for n in node.all_input_nodes))

    def is_buffer(self, node: Node) -> bool:
        """Whether ``node`` is a tensor with tokens, heads, channels that outlives the graph, which writes to it."""
        value = fake(node)
        if is_quantized(node) or self.writes_to(node):
            return True
        return node.op == "placeholder" and self.mutated(node) is not None and value is not None and value.dim() > 2

    def stored_in(self, node: Node) -> list[Node]:
        """What unrecognised in-place ops put into ``node``."""
        return [n for op, root in self.targets if root is node for n in op.all_input_nodes]


def find_sites(graph: Graph) -> list[SiteRecord]:
    """One record an attention op, in program order. Nothing is changed."""
    facts = Facts(graph)
    return [_site(attention, facts) for attention in facts.attention]


def written_inputs(graph: Graph) -> set[Node]:
    """The placeholders that ``graph`` writes to, in any way that is known here."""
    facts = Facts(graph)
    written = (*(root for _, root in facts.targets), *(w.buffer for w in facts.writes))
    return {n for n in written if n.op == "placeholder"}


def is_quantized(node: Node) -> bool:
    """Whether ``node`` is a quantized buffer: an input, or one that the graph allocates."""
    is_input = node.op == "placeholder" and isinstance(fake(node), QuantizedKV)
    return is_input or node.target is quantized_empty


def _site(attention: Attention, facts: Facts) -> SiteRecord:
    key, value = (source_of(operand, facts.aliases) for operand in (attention.key, attention.value))
    behind_key, behind_value = (_caches_behind(source.root, facts) for source in (key, value))
    caches = behind_key + behind_value
    site = SiteRecord(attention, key, value, label=label_of((caches or [key.root])[0]), has_cache=bool(caches))
    site.computed = not (key.root in behind_key and value.root in behind_value)
    if not caches or not all(is_quantized(node) for node in caches):
        site.reason = _why_not(key, "keys", facts) or _why_not(value, "values", facts) or _why_not_pair(key, value)
    site.deferred = all(
        is_factory(s.root) and facts.writes_to(s.root) and not _why_not_length(s.root, "", facts) for s in (key, value)
    )
    site.value = _from_cache(value, behind_value, facts)
    site.key = _from_cache(key, [n for n in behind_key if n is not site.value.root] or behind_key, facts)
    site.key_write, site.value_write = (next(iter(facts.writes_to(s.root)), None) for s in (site.key, site.value))
    return site


def _from_cache(source: Source, caches: list[Node], facts: Facts) -> Source:
    """``source``, or the first of the ``caches`` that it is computed from (latent attention, say)."""
    if not caches or source.root in caches or _grows(source.root, facts) is not None:
        return source
    return Source(caches[0], (op_name(source.root), *source.path))


def label_of(node: Node) -> str:
    """What a buffer is called in the user's program."""
    if node.target is quantized_empty:
        return f"layer {node.args[4]} {node.args[6]}s"
    source = getattr(node, "_dynamo_source", None)
    try:
        return source.name if isinstance(source.name, str) else source.name()
    except AttributeError:
        return node.name


def _why_not(source: Source, what: str, facts: Facts) -> str:
    """Why the buffer behind one operand cannot be quantized; empty if it can or already is."""
    root = source.root
    if is_quantized(root):
        return ""
    if root.op != "placeholder":
        return _why_not_computed(root, what, facts)
    return (
        _why_not_buffer(fake(root), what)
        or _why_not_mutation(root, what, facts)
        or _why_not_length(root, what, facts)
        or _why_not_uses(root, what, facts)
    )


def _why_not_computed(root: Node, what: str, facts: Facts) -> str:
    """``root`` is no input of the graph."""
    name, cache = op_name(root), next(iter(_caches_behind(root, facts)), None)
    if _overflows(root, facts) is not None:
        return f"{what} of a sliding window: attention reads new tokens, the buffer gets the last of them"
    if _grows(root, facts) is not None:
        return f"{what} grow by concatenation (DynamicCache); pass an XQuantCache or a StaticCache"
    if is_factory(root) and facts.writes_to(root):
        later = f"{what}: the buffer is allocated inside this graph; it is taken over at the next step"
        return _why_not_length(root, what, facts) or later
    if cache is not None and facts.mutated(cache) is not None:
        return _why_not_mutation(cache, what, facts)
    if cache is not None:
        how = "put together" if is_factory(root) else f"computed by {name}"
        return f"{what} are {how} from the cache, not read from it (latent attention?)"
    return f"{what} are computed in this graph by {name}: no KV cache is read here"


def _why_not_buffer(value: torch.Tensor | None, what: str) -> str:
    if value is None or value.dim() != 4 or not value.dtype.is_floating_point or value.dtype.itemsize < 2:
        seen = "unknown" if value is None else f"shape {tuple(value.shape)}, {value.dtype}"
        return f"{what} come from an input that is no [B, H, N, D] buffer of 16 or 32 bit floats ({seen})"
    if isinstance(value, torch.nn.Parameter) or value.requires_grad:
        return f"{what} come from a parameter"
    return ""


def _why_not_mutation(buffer: Node, what: str, facts: Facts) -> str:
    node = facts.mutated(buffer)
    if node is None:
        return ""
    if op_name(node) == "copy_" and (node, buffer) in facts.mutations:
        return f"{what}: the buffer is also written by copy_, which is no append (a sliding window?)"
    return f"{what}: the buffer is also written by {op_name(node)}, which is no append along dimension 2"


def _why_not_length(buffer: Node, what: str, facts: Facts) -> str:
    """A window that is not yet full is written like any cache; other layers tell it apart."""
    if facts.has_quantized:
        return f"{what}: an ordinary buffer beside quantized ones (a sliding window?)"
    length = fake(buffer).shape[2]
    if isinstance(length, int) and length < facts.longest:
        return f"{what}: the buffer holds {length} tokens and others {facts.longest} (a sliding window?)"
    return ""


def _why_not_uses(buffer: Node, what: str, facts: Facts) -> str:
    writes = facts.writes_to(buffer)
    if not writes:
        return f"{what}: the buffer is read and not written in this graph (cross attention, or a graph break?)"
    if len(writes) > 1:
        return f"{what}: the buffer is written {len(writes)} times in this graph, not once"
    write = writes[0]
    if _wraps(write.positions):
        return f"{what}: positions are taken modulo a number (a ring buffer?)"
    for user in buffer.users:
        if facts.order[user] < facts.order[write.node] and not is_shape_query(user):
            return f"{what}: the buffer is read by {op_name(user)} before it is written"
    for user, operand in readers(buffer, facts.aliases):
        if is_shape_query(user) or (user is write.node and operand is not write.x):
            continue
        if user.op == "output":
            return f"{what}: the buffer is an output of this graph"
        if facts.reads(user, operand, "values" if what == "keys" else "keys"):
            return "keys and values are read from one buffer"
        if not facts.reads(user, operand, what):
            return f"{what}: the buffer is also read by {op_name(user)}, which is no attention"
    return ""


def _wraps(positions: Node | slice) -> bool:
    """Whether positions are computed with a remainder."""
    bounds = (positions.start, positions.stop) if isinstance(positions, slice) else (positions,)
    queue = [node for node in bounds if isinstance(node, Node)]
    for _, node in zip(range(NEAR), queue, strict=False):  # the queue grows meanwhile
        if op_name(node).rstrip("_") in REMAINDERS:
            return True
        queue += [n for n in node.all_input_nodes if n not in queue]
    return False


def _why_not_pair(key: Source, value: Source) -> str:
    if key.root is value.root:
        return "keys and values are read from one buffer"
    k, v = fake(key.root), fake(value.root)
    if k is not None and v is not None and tuple(k.shape[:3]) != tuple(v.shape[:3]):
        return f"keys and values differ in shape: {tuple(k.shape)} and {tuple(v.shape)}"
    return ""


def _grows(root: Node, facts: Facts) -> Node | None:
    """The old buffer, if ``root`` appends to it by concatenation and is returned, as in DynamicCache."""
    value = fake(root)
    if root.target not in CAT or value is None or value.dim() != 4 or argument(root, 1, "dim", 0) not in (2, -2):
        return None
    if not any(user.op == "output" for user, _ in readers(root, facts.aliases)):
        return None
    parts = [source_of(part, facts.aliases).root for part in root.all_input_nodes]
    empty = any(fake(part) is not None and fake(part).numel() == 0 for part in parts)
    return next((part for part in parts if part.op == "placeholder"), root if empty else None)


def _overflows(root: Node, facts: Facts) -> Node | None:
    """The buffer that a part of ``root`` is copied over: a sliding window that this step overflows."""
    for user, _ in readers(root, facts.aliases):
        buffer = next((b for node, b in facts.mutations if node is user), None)
        if buffer is None or op_name(user) != "copy_" or buffer is root or source_of(buffer, facts.aliases).path:
            continue
        if fake(buffer) is not None and fake(buffer).dim() == 4:
            return buffer
    return None


def _caches_behind(root: Node, facts: Facts) -> list[Node]:
    """The KV buffers that ``root`` is or is computed from, not looking through other attentions."""
    buffer = _overflows(root, facts)
    if buffer is not None:
        return [buffer]
    found, queue = [], [root]
    for _, node in zip(range(NEAR), queue, strict=False):  # the queue grows meanwhile
        node = facts.aliases.get(node, node)
        old = node if facts.is_buffer(node) else _grows(node, facts)
        if old is not None:
            found.append(old)
        elif not facts.is_output_of_attention(node):
            queue += [n for n in dict.fromkeys([*node.all_input_nodes, *facts.stored_in(node)]) if n not in queue]
    return found
