"""Why a KV buffer cannot be quantized, in words that a person can act on; empty where it can."""

from __future__ import annotations

import torch
from torch.fx import Node

from xquant_fx.passes.continued import behind_views
from xquant_fx.passes.ends_in_attention import ends_in_attention
from xquant_fx.passes.facts import NEAR, Facts, is_quantized
from xquant_fx.passes.find_writes import is_factory
from xquant_fx.passes.records import Source, Write
from xquant_fx.passes.row_uses import why_one_row
from xquant_fx.passes.row_writes import why_no_row_write
from xquant_fx.passes.trace import (
    argument,
    at_hand,
    fake,
    full_index,
    is_shape_query,
    is_whole,
    readers,
    value_of,
)
from xquant_fx.passes.vocabulary import kind, op_name
from xquant_fx.plan.spec import STORABLE

#: Dimensions of a buffer, for people.
LAYOUT = "[batch, heads, tokens, channels]"
#: In the ``meta`` of an input that is a stack of buffers: why they are not taken over one by one.
WHY_WHOLE = "xquant_left_whole"
#: Of a buffer that is filled elsewhere, once or in another graph.
NOT_WRITTEN = "the buffer is read and not written in this graph (cross attention, or a graph break?)"


def why_not_operand(source: Source, what: str, facts: Facts) -> str:
    """Why the buffer behind one operand (``what``: "keys" or "values") stays as it is."""
    root = source.root
    if is_quantized(root):
        return ""
    growth = facts.growth(root)
    if growth is not None:
        return _why_not_buffer(fake(root), what) or _why_not_growth(growth, what, facts)
    if root.op != "placeholder":
        return _why_not_computed(root, what, facts)
    return (
        root.meta.get(WHY_WHOLE, "")
        or _why_not_buffer(fake(root), what)
        or _why_not_mutation(root, what, facts)
        or ("" if facts.writes_to(root) else _why_not_written(root, what, facts))
        or why_not_length(root, what, facts)
        or _why_not_uses(root, what, facts)
    )


def _why_not_written(root: Node, what: str, facts: Facts) -> str:
    new = facts.replaced.get(root) or facts.read_in.get(root)
    if new is None:
        return f"{what}: {NOT_WRITTEN}"
    new = behind_views(new)
    if kind(new) == "cat":
        return (
            f"{what}: attention reads the cache with more put among it (a prefix?), or what is returned is no plain "
            "append, or it grows along another dimension than 2 and is computed with before attention: append alone, "
            "torch.cat([past, new], dim=2), return that, and put before it what attention reads besides"
        )
    return (
        f"{what} are a new tensor that {op_name(new)} makes of the old one, and that is returned in its place: write "
        "to the old one in place (buffer[:, :, positions] = x), or put new tokens alone behind it (torch.cat)"
    )


def why_not_pair(key: Source, value: Source) -> str:
    """Keys and values each are a buffer that can be quantized (one latent, if it is one); why they are no pair."""
    k, v = fake(key.root), fake(value.root)
    if k is not None and v is not None and tuple(k.shape[:3]) != tuple(v.shape[:3]):
        return f"keys and values differ in shape: {tuple(k.shape)} and {tuple(v.shape)}"
    return ""


def why_not_length(buffer: Node, what: str, facts: Facts) -> str:
    """The layers of a cache are quantized in one step: what is not by then has its reasons."""
    return f"{what}: an ordinary buffer beside quantized ones (a sliding window?)" if facts.has_quantized else ""


def window_tokens(root: Node, facts: Facts) -> int:
    """Tokens of the buffer that ``root`` is, or that new tokens ``root`` overflow, if it is a sliding window's; else 0.

    What grows by concatenation is as long as it happens to be; what is kept of it says how long the window is. A window
    that is not yet full is written like any cache; other layers, which hold more, tell it apart.
    """
    growth = facts.growth(root)
    if growth is not None:
        return growth.window
    buffer = facts.overflows(root)
    if buffer is None and (root.op == "placeholder" or (is_factory(root) and facts.writes_to(root))):
        is_window = _is_copied_over(root, facts) or _is_shorter(root, facts) or why_not_length(root, "", facts)
        buffer = root if is_window else None
    value = None if buffer is None else fake(buffer)
    return int(value.shape[2]) if value is not None and value.dim() == 4 and at_hand(value.shape[2]) is not None else 0


def _is_shorter(buffer: Node, facts: Facts) -> bool:
    """Whether ``buffer`` is a window that moves in this graph, or holds fewer tokens than others.

    Where Dynamo leaves lengths open it guards on the answer.
    """
    value = fake(buffer)
    length = None if value is None or value.dim() != 4 else value.shape[2]
    slides = any(write.slide is not None for write in facts.writes_to(buffer))
    return slides or (at_hand(length) is not None and bool(length < facts.longest))


def _is_copied_over(buffer: Node, facts: Facts) -> bool:
    mutation = facts.mutated(buffer)
    if mutation is None or kind(mutation.node) != "copy" or mutation.target is not buffer:
        return False
    return _moves_tokens(argument(mutation.node, 1, "src"))  # else rows are reordered, as beam search does


def _moves_tokens(source: object) -> bool:
    """Whether ``source`` is made as a window's next contents are: rolled, joined or cut along the tokens."""
    if not isinstance(source, Node):
        return False
    if kind(source) == "getitem":
        index = argument(source, 1, "index")
        return isinstance(index, tuple) and any(isinstance(part, slice) and part != slice(None) for part in index)
    dim = {"roll": argument(source, 2, "dims"), "cat": argument(source, 1, "dim"), "narrow": argument(source, 1, "dim")}
    return dim.get(kind(source)) in (2, -2, (2,), (-2,), [2], [-2])


def _why_not_computed(root: Node, what: str, facts: Facts) -> str:
    """``root`` is no input of the graph."""
    if facts.overflows(root) is not None:
        return f"{what} of a sliding window: attention reads new tokens, the buffer gets the last of them"
    if facts.grows(root) is not None:
        return (
            f"{what} grow by concatenation and what is returned is not the concatenation itself (a sliding window? a "
            "stack of keys and values?); return keys and values as they are, or pass an XQuantCache or a StaticCache"
        )
    if (past := facts.grows_elsewhere(root)) is not None:
        if value_of(past).dim() > 4:
            return (
                f"{what} grow by concatenation as parts of one tensor of {value_of(past).dim()} dimensions: put new "
                "tokens behind keys and behind values, each in a tensor of its own, and return them so"
            )
        return (
            f"{what} grow by concatenation along dimension {argument(root, 1, 'dim', 0)} of {value_of(root).dim()}: "
            f"tokens must be dimension 2 of {LAYOUT}, so transpose before the concatenation, not behind it"
        )
    if is_factory(root) and facts.writes_to(root):
        later = f"{what}: the buffer is allocated inside this graph; it is taken over at the next step"
        return why_not_length(root, what, facts) or later
    return f"{what} are computed in this graph by {op_name(root)}: no KV cache is read here"


def _why_not_buffer(value: torch.Tensor | None, what: str) -> str:
    if value is None or value.dim() != 4 or value.dtype not in STORABLE:
        found = "unknown" if value is None else f"shape {tuple(value.shape)}, {value.dtype}"
        if value is not None and value.dim() > 4 and value.dtype in STORABLE:
            return (
                f"{what} are parts of a tensor of {value.dim()} dimensions that is not only taken apart ({found}): "
                f"write to and read {LAYOUT} of it, by constant numbers in the other dimensions"
            )
        return f"{what} come from an input that is no [B, H, N, D] buffer of 16 or 32 bit floats ({found})"
    if isinstance(value, torch.nn.Parameter) or (value.requires_grad and value.is_leaf):
        return f"{what} come from a parameter"
    if value.requires_grad:
        return f"{what} carry gradients: run every step that writes to the cache under torch.no_grad()"
    return ""


def _why_not_mutation(buffer: Node, what: str, facts: Facts) -> str:
    mutation = facts.mutated(buffer)
    if mutation is None:
        return ""
    if _is_copied_over(buffer, facts):
        return f"{what}: the buffer is also written by copy_, which is no append (a sliding window?)"
    reason = why_no_row_write(mutation.node) or why_one_row(mutation.node, buffer) or _why_some_rows(mutation.node)
    reason = reason or f"which is no append along dimension 2 of {LAYOUT}"
    return f"{what}: the buffer is also written by {op_name(mutation.node)}, {reason}"


def _why_some_rows(write: Node) -> str:
    """Why an append to ``buffer[:n, begin:end]`` or ``buffer[:n]`` is none, where there are more than n rows."""
    part = argument(write, 0, "input")
    is_view = kind(write) == "index_copy" and isinstance(part, Node) and kind(part) == "getitem"
    taken = part if is_view and isinstance(part, Node) else write
    buffer = fake(argument(taken, 0, "input"))
    if kind(taken) not in ("getitem", "setitem") or buffer is None:
        return ""
    index = full_index(argument(taken, 1, "index"), buffer.dim())
    if index is None or not isinstance(index[0], slice):
        return ""
    some = [not is_whole(item, size) for item, size in zip(index, buffer.shape, strict=True)]
    if not some[0] or not (is_view or any(some[1:])):
        return ""
    return (
        f"into some of its {buffer.shape[0]} rows: make it for as many as a step has, or let all steps take the first "
        "ones by one number, buffer[:2]"
    )


def _why_not_uses(buffer: Node, what: str, facts: Facts) -> str:
    writes = facts.writes_to(buffer)
    if len(writes) > 1:
        return f"{what}: the buffer is written {len(writes)} times in this graph, not once"
    write = writes[0]
    if _wraps(write.positions):
        return f"{what}: positions are taken modulo a number (a ring buffer?)"
    slide = write.slide
    spelling = () if slide is None else slide.nodes
    for user in buffer.users:
        if facts.order[user] < facts.order[write.node] and not is_shape_query(user) and user not in spelling:
            return f"{what}: the buffer is read by {op_name(user)} before it is written"
    whole = slide.whole if slide is not None and write.moves else None
    read = [*readers(buffer), *(() if whole is None else readers(whole))]
    for user, operand in read:
        if is_shape_query(user) or user in spelling or (user is write.node and operand is not write.x):
            continue
        reason = _why_not_reader(user, operand, what, facts)
        if reason:
            return reason
    return ""


def _why_not_growth(write: Write, what: str, facts: Facts) -> str:
    """Why what grows by concatenation stays as it is."""
    if facts.has_quantized:
        return f"{what}: an ordinary tensor that grows beside quantized ones"
    if any(other.past is None and other.buffer.op == "placeholder" for other in facts.writes):
        return f"{what} grow by concatenation beside caches that are written in place"
    if isinstance(fake(write.past), torch.nn.Parameter):
        return f"{what} grow from a parameter"
    assert write.past is not None
    if _is_in_front(write, facts):
        return f"{what}: new tokens are put before the old ones, and a cache has them in the order in which they came"
    reason = _why_not_mutation(write.node, what, facts) or _why_not_mutation(write.past, what, facts)
    for user, operand in readers(write.node):
        if reason or is_shape_query(user) or (user.op == "output" and operand is write.returned):
            continue
        reason = _why_not_continued(user, operand, what) or _why_not_reader(user, operand, what, facts)
    return reason


def _is_in_front(write: Write, facts: Facts) -> bool:
    """Whether what comes first is as long as the query that reads the concatenation, and what comes second is not."""
    past, new = (fake(node) for node in (write.past, write.x))
    if past is None or new is None or write.begins:
        return False
    ends = [(a, facts.source(a.key).root, facts.source(a.value).root) for a in facts.attention]
    direct = [attention for attention, *roots in ends if write.node in roots]
    for attention in direct or facts.attention:
        query = fake(attention.query)
        first, second, asked = (str(t.shape[-2]) for t in (past, new, query)) if query is not None else ("", "", "")
        if first != asked or second == asked:
            return False
    return bool(facts.attention)


def _why_not_continued(user: Node, operand: Node, what: str) -> str:
    """Eager code has one word for both: tokens behind what is stored are tokens that are appended."""
    if kind(user) != "cat" or argument(user, 1, "dim", 0) not in (2, -2) or user.all_input_nodes[:1] != [operand]:
        return ""
    return (
        f"{what}: attention reads the cache with more put behind it (compressed tokens?), which an uncompiled step "
        "would take for new tokens of the cache; pass an XQuantCache, or write to a buffer of fixed length: a model "
        "that can do neither keeps full precision here"
    )


def _why_not_reader(user: Node, operand: Node, what: str, facts: Facts) -> str:
    if user.op == "output":
        return f"{what}: the buffer is an output of this graph"
    if facts.reads(user, operand, "values" if what == "keys" else "keys"):
        return "keys and values are read from one buffer"
    if facts.reads(user, operand, what) or ends_in_attention(user, facts):
        return ""
    return f"{what}: the buffer is also read by {op_name(user)}, which is no attention"


def _wraps(positions: Node | slice) -> bool:
    """Whether positions are computed with a remainder."""
    bounds = (positions.start, positions.stop) if isinstance(positions, slice) else (positions,)
    queue = [node for node in bounds if isinstance(node, Node)]
    for _, node in zip(range(NEAR), queue, strict=False):  # the queue grows meanwhile
        if kind(node) == "remainder":
            return True
        queue += [n for n in node.all_input_nodes if n not in queue]
    return False
