"""What ops are called: one kind for all spellings of an op, functions, operators and methods alike.

Everything else in the passes asks ``kind(node)`` and never looks at a target. To teach the passes a new
spelling, add it to its row; a string is a method's name.
"""

from __future__ import annotations

import functools
import inspect
import operator
from typing import Any

import torch
from torch.fx import Node

_F = torch.nn.functional
#: What Dynamo makes of ``x.data``. Checked on torch 2.13 (``getattr`` elsewhere).
_DATA = tuple(filter(None, (getattr(torch._C._autograd, "_get_data_attr", None),)))

#: In the ``meta`` of an attention: why flex attention stays as it is, or "" of what was flex attention
#: (``flex_step.py``).
FLEX = "xquant_flex"

#: Kind to its spellings. In-place spellings (``add_``, ``operator.iadd``) are of the kind of what they compute.
SPELLINGS: dict[str, tuple[Any, ...]] = {
    # attention
    "sdpa": (_F.scaled_dot_product_attention,),
    "flex": (torch.ops.higher_order.flex_attention,),
    "softmax": (torch.softmax, _F.softmax, torch.special.softmax, "softmax"),
    "matmul": (torch.matmul, operator.matmul, "matmul", "__matmul__"),
    "bmm": (torch.bmm, "bmm"),
    "baddbmm": (torch.baddbmm, "baddbmm"),
    "linear": (_F.linear,),
    "mm": (torch.mm, "mm"),
    "addmm": (torch.addmm, "addmm"),
    "einsum": (torch.einsum, torch.functional.einsum),
    # arithmetic, element by element
    "add": (torch.add, operator.add, operator.iadd, "add", "add_", "__add__", "__radd__"),
    "sub": (torch.sub, torch.subtract, operator.sub, operator.isub, "sub", "sub_", "subtract"),
    "mul": (torch.mul, torch.multiply, operator.mul, operator.imul, "mul", "mul_", "multiply", "__mul__", "__rmul__"),
    "div": (
        torch.div, torch.divide, torch.true_divide, operator.truediv, operator.itruediv,
        "div", "div_", "divide", "true_divide", "__truediv__",
    ),
    "neg": (torch.neg, torch.negative, operator.neg, "neg", "neg_"),
    "tanh": (torch.tanh, _F.tanh, "tanh", "tanh_"),
    "clamp": (torch.clamp, torch.clip, "clamp", "clamp_", "clip"),
    "nan_to_num": (torch.nan_to_num, "nan_to_num"),
    "minmax": (torch.maximum, torch.minimum, "maximum", "minimum"),
    "logsumexp": (torch.logsumexp, torch.special.logsumexp, "logsumexp"),
    "sigmoid": (torch.sigmoid, torch.special.expit, _F.sigmoid, "sigmoid"),
    "dropout": (_F.dropout, torch.dropout),
    # masks and sink logits
    "masked_fill": (torch.masked_fill, "masked_fill", "masked_fill_"),
    "where": (torch.where, "where"),
    "cat": (torch.cat, torch.concat, torch.concatenate),
    "max": (torch.max, torch.amax, "max", "amax"),
    # positions
    "remainder": (operator.mod, operator.imod, torch.remainder, torch.fmod, "remainder", "remainder_", "fmod"),
    # views, and what copies without computing
    "expand": ("expand", "expand_as", "broadcast_to", torch.broadcast_to),
    "reshape": ("reshape", torch.reshape),
    "view": ("view", "view_as", "flatten", "unflatten", torch.flatten, torch.unflatten),
    "transpose": ("transpose", "swapaxes", torch.transpose, torch.swapaxes),
    "mT": ("mT", torch.ops.aten.mT),  # what torch 2.14 makes of ``x.mT``; a ``getattr`` before
    "T": ("t", torch.ops.aten.numpy_T),
    "permute": ("permute", torch.permute),
    "movedim": ("movedim", torch.movedim),
    "unsqueeze": ("unsqueeze", torch.unsqueeze),
    "squeeze": ("squeeze", torch.squeeze),
    "narrow": ("narrow", torch.narrow),
    "select": ("select", torch.select),
    "split": ("chunk", "split", torch.chunk, torch.split, torch.functional.split),
    "unbind": ("unbind", torch.unbind),
    "stack": (torch.stack,),
    "getitem": (operator.getitem,),
    "cast": ("to", "type", "type_as", "float", "half", "bfloat16"),
    "contiguous": ("contiguous",),
    "detach": ("detach", torch.detach, *_DATA),
    "clone": ("clone", torch.clone),
    "repeat": ("repeat",),
    "repeat_interleave": ("repeat_interleave", torch.repeat_interleave),
    # buffers
    "index_copy": ("index_copy_",),
    "index_put": ("index_put_", torch.ops.aten.index_put_, torch.ops.aten.index_put_.default),
    "setitem": (operator.setitem,),
    "scatter": ("scatter_",),
    "copy": ("copy_",),
    "roll": ("roll", torch.roll),
    "factory": (
        torch.zeros, torch.empty, torch.full, torch.ones, torch.zeros_like, torch.empty_like, torch.tensor,
        "new_zeros", "new_empty", "new_full", "new_ones",
    ),
    "shape": ("size", "dim", "stride", "numel"),
}  # fmt: skip

PRODUCTS = frozenset({"matmul", "bmm", "baddbmm", "einsum"})
#: What may stand between the scores and the softmax, or between the softmax and the product with the values.
ELEMENTWISE = frozenset(
    {"add", "sub", "mul", "div", "neg", "tanh", "clamp", "nan_to_num", "minmax", "dropout", "masked_fill", "where",
     "cat", "max"}
)  # fmt: skip
#: Kinds that copy: writing to the result does not change the operand.
COPIES = frozenset({"clone", "repeat", "repeat_interleave"})
#: Kinds whose result only rearranges, repeats or casts the first operand.
VIEWS = COPIES | {
    "expand", "reshape", "view", "transpose", "mT", "T", "permute", "movedim", "unsqueeze", "squeeze", "narrow",
    "split", "getitem", "cast", "contiguous", "detach",
}  # fmt: skip
#: Operators that write to their first operand; methods and functions say so by a trailing underscore.
IN_PLACE_OPERATORS = frozenset(
    {
        operator.setitem, operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ifloordiv,
        operator.imod, operator.ipow, operator.iand, operator.ior, operator.ixor, operator.ilshift, operator.irshift,
    }
)  # fmt: skip
#: The same as methods: ``x.__iadd__(y)``.
_IN_PLACE_METHODS = frozenset(f"__{each.__name__}__" for each in IN_PLACE_OPERATORS)
#: These end with an underscore because the name without is a keyword of Python.
_KEYWORDS = frozenset({operator.and_, operator.or_, operator.is_, operator.not_})

_KINDS = {spelling: kind for kind, spellings in SPELLINGS.items() for spelling in spellings}
_ATTRIBUTES = {"mT": "mT", "T": "T", "data": "detach", "shape": "shape", "device": "shape", "dtype": "shape"}


def kind(node: object) -> str:
    """The kind of op that ``node`` is, "input" for a placeholder, and "" for what has no row here."""
    if not isinstance(node, Node):
        return ""
    if node.op == "placeholder":
        return "input"
    if node.target is getattr:
        return _ATTRIBUTES.get(str(node.args[1]), "")
    if node.op not in ("call_function", "call_method"):
        return ""
    try:
        return _KINDS.get(node.target, "")
    except TypeError:  # a target without a hash
        return ""


def op_name(node: Node) -> str:
    """Name of a node's op, as people write it."""
    if node.op == "placeholder":
        return "input"
    if node.target is getattr:
        return str(node.args[1])
    return _name(node.target)


def _name(target: Any) -> str:
    return target if isinstance(target, str) else getattr(target, "__name__", str(target))


def is_in_place(node: Node) -> bool:
    """Whether ``node`` writes to its first operand: by its name, as an operator, or told to by ``inplace=True``."""
    if node.op not in ("call_method", "call_function"):
        return False
    return _is_op_in_place(node.target) or _is_told_to(node)


@functools.lru_cache(maxsize=4096)
def _is_op_in_place(target: Any) -> bool:
    if target in _KEYWORDS:
        return False
    name = _name(target)
    by_name = name in _IN_PLACE_METHODS or (name.endswith("_") and not name.endswith("__"))
    return by_name or target in IN_PLACE_OPERATORS


def _is_told_to(node: Node) -> bool:
    """Whether an activation or a dropout is called with ``inplace``, by position or by name."""
    place = None if isinstance(node.target, str) else _place_of_inplace(node.target)
    given = node.args[place] if place is not None and place < len(node.args) else node.kwargs.get("inplace", False)
    return given is not False and given is not None


@functools.cache
def _place_of_inplace(function: Any) -> int | None:
    """Where ``function`` takes ``inplace`` as a positional argument; None if it does not, or none is known."""
    try:
        names = list(inspect.signature(function).parameters)
    except (TypeError, ValueError):  # written in C
        return None
    return names.index("inplace") if "inplace" in names else None
