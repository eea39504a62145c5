"""Caches that grow, whose compiled steps serve any room: none is made anew when a cache has moved to more of it.

On CPUs such a step is made for a cache with more room (``Growth.any_room``), and its kernels are told at each call how
much there is (``kernels/cpu/any_room.py``). Whether a model's attentions are such as kernels read is known when its
cache is taken over. What turns out otherwise later is noticed before anything is written: then the step runs
uncompiled, and all later ones are compiled for the room that there is.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

from torch.fx import Graph, Node

from xquant_fx import ops
from xquant_fx.cache.growing import GrowingKV
from xquant_fx.compiler.chunks import has_chunk
from xquant_fx.compiler.options import Request
from xquant_fx.kernels.cpu.any_room import Rooms
from xquant_fx.passes.context import Context
from xquant_fx.passes.graph import OF_ANY_ROOM
from xquant_fx.passes.records import Detection, Site
from xquant_fx.passes.trace import value_of
from xquant_fx.plan.spec import KVSpec, why_not_fused

log = logging.getLogger(__name__)

#: What makes one C++ function of a step, and of an attention a kernel.
NEEDED = frozenset({"fuse_decode", "one_call"})
_READ_BY_KERNELS = (ops.STORE, ops.STORE_BORROWED, ops.DECODE)


class OfAnyRoom:
    """A compiled graph; ``is_open`` says whether it takes tensors of another room than its examples."""

    def __init__(self, compiled: Callable[..., Any], is_open: Callable[[], bool]) -> None:
        self.compiled, self.is_open = compiled, is_open

    def __call__(self, *args: Any) -> Any:
        """Call it."""
        return self.compiled(*args)


def rooms_of(inputs: Sequence[Node]) -> Rooms | None:
    """Which of the ``inputs`` of a graph may have another room than their examples; None if none may."""
    found = [i for i, node in enumerate(inputs) if node.meta.get(OF_ANY_ROOM)]
    return Rooms(found) if found else None


def may_take_any_room(found: Detection, request: Request) -> bool:
    """Whether steps of the caches that this graph begins are going to be such, as far as a prompt's graph tells."""
    if request.self_check or request.disable & NEEDED:
        return False
    return all(_has_kernel(site, found.specs) for site in found.sites if site.rewritable)


def _has_kernel(site: Site, specs: dict[Node, KVSpec]) -> bool:
    key, value = (specs.get(node) for node in site.buffers)
    if key is None or value is None or not site.attention.is_recognised or site.is_latent:
        return False
    on_cpu = all(value_of(node).device.type == "cpu" for node in site.buffers)
    return on_cpu and (key.role, value.role) == ("key", "value") and not why_not_fused(key, value)


def why_fixed(graph: Graph, context: Context) -> str:
    """Why a rewritten ``graph`` cannot serve any room, in words; "" if it may."""
    if has_chunk(graph, known_too=True):  # which runs uncompiled
        return ""
    grown = {each.index for each in context.grown}
    if any(isinstance(each, GrowingKV) and i not in grown for i, each in enumerate(context.inputs)):
        return "a cache is read and not continued"
    for node in graph.find_nodes(op="placeholder"):
        if node.meta.get(OF_ANY_ROOM) and (others := _others(node)):
            return f"{others[0].name} reads {node.name}"
    return ""


def _others(node: Node) -> list[Node]:
    return [user for user in node.users if user.target not in _READ_BY_KERNELS]


def is_any_room(inputs: Sequence[Any]) -> bool:
    """Whether a graph with these ``inputs`` would be made for more room than there is."""
    return any(isinstance(each, GrowingKV) and each.spec.any_room for each in inputs)


class ExactRooms:
    """Runs a graph uncompiled; graphs are made for the room of its caches from then on."""

    def __init__(self, graph: Callable[..., Any], reason: str) -> None:
        self.graph, self.reason = graph, reason

    def __call__(self, *args: Any) -> Any:
        """Run it."""
        log.info("steps of this cache are compiled for the room that there is: %s", self.reason)
        for each in args:
            if isinstance(each, GrowingKV) and each.growth is not None:
                each.growth.any_room = False
        return self.graph(*args)
