"""Store a layer's keys and values by one op, where that is one launch of a kernel: on GPUs.

    quantize_store(k, pos, ...)                    quantize_store_both(k, v, pos, ...)
    quantize_store(v, pos, ...)             =>     decode_attention(q, ...)
    decode_attention(q, ...)

The earlier of the two moves to the later one, so nothing between them may need what it stores: where keys are read
dequantized, they are read there. What is not paired is counted with its reason.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch._dynamo.utils import counters
from torch.fx import GraphModule, Node

from xquant_fx import ops
from xquant_fx.cache.growing import GrowingKV
from xquant_fx.cache.sliding import SlidingKV
from xquant_fx.kernels.layout import STEP_TOKENS
from xquant_fx.kernels.quantize_store.arguments import BORROWED, OWN, StoreArguments
from xquant_fx.kernels.quantize_store.both_arguments import COMMON, BothArguments
from xquant_fx.passes.context import Context
from xquant_fx.passes.graph import add_call
from xquant_fx.passes.records import Write
from xquant_fx.passes.trace import fake, same_value, value_of


def pair_stores(gm: GraphModule, context: Context) -> int:
    """Pair the stores of every site's keys and values; returns how many pairs."""
    paired: set[Node] = set()
    for site in context.detection.sites:
        keys, values = site.key_write, site.value_write
        if keys is None or values is None or not {keys.node, values.node} <= context.stores.keys():
            continue
        both = [context.stores[write.node] for write in (keys, values)]
        if _tokens(both[0]).device.type not in ops.BOTH_KERNELS or paired & set(both):
            continue
        if reason := _why_not(keys, values, both):
            counters["xquant"][f"keys and values are stored one by one: {reason}"] += 1
            continue
        paired.update(both)
        _pair(gm, both)
    return len(paired) // 2


def _why_not(keys: Write, values: Write, both: list[Node]) -> str:
    sides = [StoreArguments.of(node) for node in both]
    if any(side.bits == 16 for side in sides):
        return "16 bits"
    tokens = [_tokens(node).shape[2] for node in both]
    if tokens[0] != tokens[1] or not isinstance(tokens[0], int) or tokens[0] > STEP_TOKENS:
        return f"more than {STEP_TOKENS} tokens, or an unknown number"
    if not (same_value(sides[0].pos, sides[1].pos) or _of_one_window(keys, values)):
        return "positions are computed for each"
    if any(getattr(sides[0], name) is not getattr(sides[1], name) for name in COMMON if name != "pos"):
        return "they are of two caches"
    first, last = sorted(both)
    a = StoreArguments.of(first)
    written = [getattr(a, name) for name in a.written(OWN if a.fit is None else BORROWED) if name != "fault"]
    users = {user for tensor in written if tensor is not None for user in tensor.users}
    if any(first < user < last for user in users):
        return "what one of them stores is read before the other"
    return ""


def _of_one_window(keys: Write, values: Write) -> bool:
    """Whether each is put behind what one layer has stored of a sliding window.

    Both have stored as much; the kernel looks at the length of each, and leaves a fault if it is not so.
    """
    pasts: list[Any] = [fake(write.past or write.buffer) for write in (keys, values)]
    windows = all(isinstance(t, SlidingKV) or (isinstance(t, GrowingKV) and t.is_tail) for t in pasts)
    return windows and pasts[0].spec.layer == pasts[1].spec.layer


def _tokens(store: Node) -> Tensor:
    """What a store appends [B, H, q, D]."""
    x: Any = StoreArguments.of(store).x  # of a graph's nodes
    return value_of(x)


def _pair(gm: GraphModule, both: list[Node]) -> None:
    a = BothArguments.of_sides(*map(StoreArguments.of, both))
    with gm.graph.inserting_before(max(both)):
        add_call(gm.graph, ops.STORE_BOTH[a.overload], (), a._asdict(), None)
    for node in both:
        gm.graph.erase_node(node)
