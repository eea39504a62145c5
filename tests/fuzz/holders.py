"""What a program keeps its keys and values in: text that makes it, lists its tensors and names those of layer ``i``."""

from __future__ import annotations

from typing import NamedTuple


class Holder(NamedTuple):
    """Each field is source text."""

    make: str
    """Body of ``make(tensors)``: a cache of these [k0, v0, k1, v1, ...]."""
    leaves: str
    """Expression: the tensors of ``cache``, in the same order."""
    keys: str
    """Expression: the keys of layer ``i``,"""
    values: str
    """and its values."""
    before: str = ""
    """Definitions that it needs."""
    parts: str = ""
    """Expression: keys and values one by one, [k0, v0, k1, v1, ...], where tensors are stacks of them."""
    both: str = ""
    """Expression: keys and values of layer ``i`` in one tensor,"""
    both_at: int = 0
    """stacked along this dimension."""


PAIRS = "[(tensors[j], tensors[j + 1]) for j in range(0, len(tensors), 2)]"
HOLDERS = {
    "list of tuples": Holder(f"return {PAIRS}", "[t for pair in cache for t in pair]", "cache[i][0]", "cache[i][1]"),
    "tuple": Holder(f"return tuple({PAIRS})", "[t for pair in cache for t in pair]", "cache[i][0]", "cache[i][1]"),
    "two lists": Holder(
        "return [tensors[0::2], tensors[1::2]]", "[t for pair in zip(*cache) for t in pair]",
        "cache[0][i]", "cache[1][i]",
    ),
    "dict": Holder(
        'return {"kv"[j % 2] + str(j // 2): t for j, t in enumerate(tensors)}',
        "list(cache.values())", 'cache[f"k{i}"]', 'cache[f"v{i}"]',
    ),
    "dataclass": Holder(
        f"return [Layer(k, v) for k, v in {PAIRS}]", "[t for layer in cache for t in (layer.k, layer.v)]",
        "cache[i].k", "cache[i].v", "@dataclasses.dataclass\nclass Layer:\n    k: Tensor\n    v: Tensor\n\n\n",
    ),
    "module buffers": Holder(
        "cache = nn.Module()\nfor j, t in enumerate(tensors):\n"
        '    cache.register_buffer("kv"[j % 2] + str(j // 2), t)\nreturn cache',
        "list(cache.buffers())", 'getattr(cache, f"k{i}")', 'getattr(cache, f"v{i}")',
    ),
    "stacked": Holder(
        "return torch.stack(tensors)", "[cache]", "cache[2 * i]", "cache[2 * i + 1]", parts="list(cache)",
    ),
    "stack of pairs": Holder(
        "return torch.stack([torch.stack(pair) for pair in zip(tensors[::2], tensors[1::2])])", "[cache]",
        "cache[i][0]", "cache[i][1]", parts="[t for pair in cache for t in pair]", both="cache[i]",
    ),
    "stack of sides": Holder(
        "return torch.stack([torch.stack(tensors[::2]), torch.stack(tensors[1::2])])", "[cache]",
        "cache[0, i]", "cache[1, i]", parts="[t for pair in zip(*cache) for t in pair]",
    ),
    "stack per layer": Holder(
        "return [torch.stack(pair) for pair in zip(tensors[::2], tensors[1::2])]", "list(cache)",
        "cache[i][0]", "cache[i][1]", parts="[t for kv in cache for t in kv]", both="cache[i]",
    ),
    "stack behind the rows": Holder(
        "return [torch.stack(pair, 1) for pair in zip(tensors[::2], tensors[1::2])]", "list(cache)",
        "cache[i].select(1, 0)", "cache[i].select(1, 1)", parts="[t for kv in cache for t in kv.unbind(1)]",
        both="cache[i]", both_at=1,
    ),
    "stack per side": Holder(
        "return torch.stack(tensors[::2]), torch.stack(tensors[1::2])", "list(cache)",
        "cache[0][i]", "cache[1][i]", parts="[t for pair in zip(*cache) for t in pair]",
    ),
}  # fmt: skip
#: Those with several of the parts in one tensor.
STACKS = [name for name, holder in HOLDERS.items() if holder.parts]
#: Those whose tensors are the parts that ``make`` is given, and that can be replaced by longer ones.
GROWING = ("list of tuples", "tuple")
