"""Caches of any length: of two that differ in nothing but ``max_cache_len`` one runs the graphs of the other.

The first length is a number to Dynamo, from the second on it is a symbol. On CPUs such a graph is made one of caches
with more room (``passes/any_length.py``), and its kernels are told at each call how much there is, as those of caches
that grow are (``any_room.py``). Where that cannot be, the graph is one of the length at hand, as it always was on GPUs.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.fx import Graph, GraphModule

from xquant_fx import ops
from xquant_fx.cache.growing import GrowingKV
from xquant_fx.compiler.any_room import NEEDED, OfAnyRoom
from xquant_fx.compiler.chunks import has_chunk
from xquant_fx.compiler.dynamo_frames import forget_compiled_frame
from xquant_fx.compiler.known_steps import KnownStep, settled
from xquant_fx.compiler.options import Request
from xquant_fx.kernels.decode_attention.arguments import DecodeArguments
from xquant_fx.passes.any_length import FixedLengthError, Wide, open_lengths, wide
from xquant_fx.passes.trace import fake

log = logging.getLogger(__name__)

#: Specs of caches whose wrapper was found to need the length that there is, as text.
_fixed = set[str]()


def any_length(
    gm: GraphModule, inputs: Sequence[Any], request: Request, settings: str, by_inductor: bool
) -> Wide | None:
    """``gm`` as a graph of caches of any length; None if it is one of a known length.

    Raises:
        FixedLengthError: it has to be made one of the length at hand.
    """
    if not open_lengths(gm):
        return None
    if request.self_check or request.disable & NEEDED or not by_inductor:
        raise FixedLengthError("it is compared with the program, made without all passes, or by another compiler")
    if any(isinstance(each, GrowingKV) for each in inputs):
        raise FixedLengthError("another cache of it grows")
    if settings in _fixed:
        raise FixedLengthError("its wrapper takes what may have another size")
    return wide(gm)


def of_length(gm: GraphModule) -> KnownStep:
    """``gm`` as a graph of the lengths at hand, which Dynamo guards on."""
    for node in gm.graph.find_nodes(op="placeholder"):
        value = fake(node)
        if value is not None and getattr(getattr(value, "spec", None), "any_room", False):
            int(value.shape[2])
    return settled(gm)


def check_any_length(graph: Graph, reason: str) -> None:
    """Raise FixedLengthError if there is a ``reason``, or something in a rewritten ``graph`` sees all that there is
    room for: attention without a mask, or by a mask that is not known to hide what lies behind the length."""
    if has_chunk(graph):  # which runs uncompiled
        return
    if reason:
        raise FixedLengthError(reason)
    if graph.find_nodes(op="call_function", target=ops.LOAD):
        raise FixedLengthError("dequantized values are read")
    for node in graph.find_nodes(op="call_function", target=ops.DECODE):
        attention: Any = DecodeArguments.of(node)
        if attention.mask is None and attention.max_len:
            raise FixedLengthError(f"{node.name} has no mask")


class Padded:
    """Calls a compiled graph with masks as long as it has them: ``masks`` says which arguments, along which dimension,
    and of how many tokens."""

    def __init__(self, compiled: Callable[..., Any], masks: Mapping[int, tuple[int, int]]) -> None:
        self.compiled, self.masks = compiled, masks

    def __call__(self, *args: Any) -> Any:
        """Call it."""
        return self.compiled(*padded(args, self.masks))


def padded(args: Sequence[Any], masks: Mapping[int, tuple[int, int]]) -> list[Any]:
    """``args`` with ``masks`` that are long enough; what is behind a cache's own length is hidden by the graph."""
    return [_padded(arg, *masks[i]) if i in masks else arg for i, arg in enumerate(args)]


def _padded(mask: Tensor, dim: int, room: int) -> Tensor:
    made = mask.new_zeros((*mask.shape[:dim], room, *mask.shape[dim + 1 :]))
    made.narrow(dim, 0, mask.shape[dim]).copy_(mask)
    return made


class AnyLengthStep:
    """Calls a compiled step of caches of any length.

    What turns out to need the length that there is runs uncompiled once, and is compiled for each from then on.
    """

    def __init__(self, step: Callable[..., Any], compiled: Any, uncompiled: Callable[..., Any], settings: str) -> None:
        self.step, self.uncompiled, self.settings = step, uncompiled, settings
        of_any_room = isinstance(compiled, OfAnyRoom)  # else all tensors are as large in a cache of another length
        self.is_open: Callable[[], bool] = compiled.is_open if of_any_room else lambda: True

    def __call__(self, *args: Any) -> Any:
        """One step."""
        if self.is_open():
            return self.step(*args)
        log.info("steps of this cache are compiled for each length: their wrapper takes what may have another size")
        _fixed.add(self.settings)
        forget_compiled_frame()
        return self.uncompiled(*args)
