"""Chunks whose number of tokens a step alone knows, on CPUs: their graphs run as they stand, op by op.

Each turn of a chat brings another number of tokens, each round of assisted decoding another number of candidates. What
Inductor compiles is made for one number, so each would be compiled by itself, until Dynamo compiles none any more.
Uncompiled, attention is one kernel for all numbers (``xquant_fx/cache/step_attention.py``). Chunks of a known number
run so, too, where a cache grows: there the first number that comes is hardly ever the only one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.fx import Graph

from xquant_fx import ops
from xquant_fx.compiler.restarts import Restarts
from xquant_fx.kernels.layout import STEP_TOKENS
from xquant_fx.kernels.quantize_store.arguments import StoreArguments
from xquant_fx.passes.trace import value_of

_STORES = (ops.STORE, ops.STORE_BORROWED)


def has_chunk(graph: Graph, known_too: bool = False) -> bool:
    """Whether a rewritten ``graph`` appends a number of tokens that it does not know, more than STEP_TOKENS.

    With ``known_too`` one that it knows counts, too, if the cache grows. Where it does not know it, Dynamo guards on
    the answer.
    """
    counted = [
        tokens
        for tokens, is_room_known in _appended(graph)
        if (is_room_known and known_too) or not isinstance(tokens, int)
    ]
    return any(bool(tokens > STEP_TOKENS) for tokens in counted)


def is_known_chunk(graph: Graph) -> bool:
    """Whether a rewritten ``graph`` appends a number of tokens that it knows, more than STEP_TOKENS."""
    return any(isinstance(tokens, int) and tokens > STEP_TOKENS for tokens, _ in _appended(graph))


def _appended(graph: Graph) -> list[tuple[Any, bool]]:
    """Numbers of tokens that are appended, and whether to a cache whose room is a number."""
    nodes = [node for op in _STORES for node in graph.find_nodes(op="call_function", target=op)]
    stores: list[Any] = [StoreArguments.of(node) for node in nodes]  # of nodes
    # Of a cache of any length max_len is a node.
    return [(value_of(store.x).shape[2], type(store.max_len) is int) for store in stores]


class UncompiledChunk:
    """Runs the program's graph, and looks at positions as a compiled step does."""

    def __init__(self, restarts: Restarts, run: Callable[..., Any]) -> None:
        self.restarts, self.run = restarts, run

    def __call__(self, *args: Any) -> Any:
        """One step."""
        if self.restarts.give_back(args):
            return self.restarts.graph(*args)
        before = self.restarts.before(args) if self.restarts.computed else []
        out = self.run(*args)
        self.restarts.check(args, before)
        return out
