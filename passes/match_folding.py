"""Find the linear layers whose weights can rotate an attention's values and rotate its output back.

    v = linear(h, W, b)  ->  views  ->  append            W, b rotated: what is appended is rotated
    attention  ->  views  ->  linear(out, W)              W rotated: it takes rotated outputs

Only views may lie between, that keep the channels of a head together and heads in order, and nothing else may read what
changes. Where one of the two is not found, a step rotates there by itself. Nothing is changed here.
"""

from __future__ import annotations

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Node
from torch.nn import Parameter

from xquant_fx.passes.records import Decode, Folding, Linear, Write
from xquant_fx.passes.trace import argument, fake, is_view_like, operand
from xquant_fx.passes.track_axes import Axes, expected, followed, regrouped
from xquant_fx.passes.vocabulary import kind, op_name
from xquant_fx.plan.spec import KVSpec

_PLAIN = (FakeTensor, Tensor, Parameter)
NOT_ALIKE = "do not keep the channels of a head together"


def match_folding(write: Write, form: Decode, spec: KVSpec) -> Folding:
    """The linear layers around one attention, whose values are stored as ``spec`` says; or why there is none."""
    batch, heads, _, dim = spec.shape
    sizes = {"B": batch, "N": write.tokens, "D": dim}
    value = _maker(write.x, {**sizes, "H": heads})
    output = _taker(form, {**sizes, "H": form.heads})
    reasons = tuple(each for each in (value, output) if isinstance(each, str))
    maker, taker = (None if isinstance(each, str) else each for each in (value, output))
    return Folding(maker, taker, reasons)


def _shape(sizes: dict[str, int]) -> tuple[int, int, int, int]:
    return sizes["B"], sizes["H"], sizes["N"], sizes["D"]


def _maker(node: Node, sizes: dict[str, int]) -> Linear | str:
    """The linear layer that new values ``node`` [B, H, N, D] come from."""
    chain: list[Node] = []
    while kind(node) != "linear":
        before = operand(node)
        if len(node.users) != 1:
            return "new values are used for something else, too"
        if not is_view_like(node) or before is None:
            return f"new values come from {op_name(node)}, not from a linear layer"
        chain.append(node)
        node = before
    value = fake(node)
    if len(node.users) != 1:
        return "new values are used for something else, too"
    if value is None or not all(isinstance(size, int) for size in value.shape):
        return "the shape of new values is dynamic"
    rows = regrouped(_named(sizes, "B", "N", "H", "D"), sizes, tuple(value.shape))
    axes = None if rows is None else followed(list(reversed(chain)), rows, sizes)
    if axes != _named(sizes, "B", "H", "N", "D"):
        return f"views of new values {NOT_ALIKE}"
    return _checked(node, sizes["H"] * sizes["D"], 0)


def _taker(form: Decode, sizes: dict[str, int]) -> Linear | str:
    """The linear layer that the attention's output goes into."""
    axes: Axes | None = _named(sizes, "B", "H", "N", "D")
    if form.output_layout.shape is not None and axes is not None:
        axes = regrouped(axes, sizes, form.output_layout.shape)
    if form.output_layout.order is not None and axes is not None:
        axes = tuple(axes[i] for i in form.output_layout.order)
    node = form.output
    while axes is not None:
        if len(node.users) != 1:
            return "the attention's output is used for something else, too"
        (user,) = node.users
        if operand(user) is not node or not (kind(user) == "linear" or is_view_like(user)):
            return f"the attention's output goes into {op_name(user)}, not into a linear layer"
        if kind(user) == "linear":
            together = axes[-1] == _named(sizes, "H D")[0]
            return _checked(user, sizes["H"] * sizes["D"], 1) if together else f"views of the output {NOT_ALIKE}"
        axes = followed([user], axes, sizes)
        node = user
    return f"views of the output {NOT_ALIKE}"


def _named(sizes: dict[str, int], *dims: str) -> Axes:
    return expected(_shape(sizes), *dims)


def _checked(node: Node, channels: int, side: int) -> Linear | str:
    """The layer ``node``, if its weight [out, in] is an input that can be rotated along ``side``, and its bias."""
    weight, bias = argument(node, 1, "weight"), argument(node, 2, "bias")
    for each in (weight, *([] if bias is None or side else [bias])):
        value = fake(each)
        if not isinstance(each, Node) or each.op != "placeholder" or type(value) not in _PLAIN:
            return "a weight of the linear layer is no plain tensor that is an input of the graph"
    value = fake(weight)
    assert isinstance(weight, Node) and value is not None
    if value.dim() != 2 or value.shape[side] != channels or not value.is_floating_point():
        return f"the linear layer's weight {list(value.shape)} of {value.dtype} is not for {channels} channels"
    return Linear(node, weight, bias if isinstance(bias, Node) and not side else None)
