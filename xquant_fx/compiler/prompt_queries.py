"""Show a prompt's queries to the keys that it appends: their channels are ranked by what queries make of them.

A prompt's graph runs op by op (``takeover.py``, or a cold prefill that allocates an XQuantCache), and queries are
computed before keys are appended (``passes/early_queries.py``): just before an append, the query of the attention that
reads it is known.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from xquant_fx.cache.kv_tensor import QuantizedKV
from xquant_fx.cache.state import KVState
from xquant_fx.compiler.compiled_prompts import Stretches
from xquant_fx.kernels.cpu.at_hand import wanted
from xquant_fx.passes.early_queries import compute_queries_early
from xquant_fx.passes.records import Detection


def queries_of(found: Detection) -> dict[Node, Node]:
    """The query [B, heads, q, D] by the node that appends the keys it attends to."""
    sites = (site for site in found.sites if site.attention.is_recognised)
    return {site.key_write.node: site.attention.query for site in sites if site.key_write is not None}


def early_queries_of(found: Detection) -> dict[Node, Node]:
    """The same, of a graph whose queries are moved before the appends."""
    queries = queries_of(found)
    if compute_queries_early(found.gm.graph, queries):
        found.gm.recompile()
    return queries


def show_query(state: KVState, append: Node, queries: dict[Node, Node], env: dict[Node, Any]) -> None:
    """Note the query that goes with ``append`` in the keys' ``state``, if it is computed already."""
    query = env.get(queries[append]) if append in queries else None
    if isinstance(query, torch.Tensor):
        state.note_queries(query)


class PromptRun:
    """Runs a cold prefill as it stands, and shows its queries to the caches that it allocates."""

    def __init__(self, found: Detection, stretches: Stretches | None = None) -> None:
        self.gm = found.gm
        self.queries = early_queries_of(found)
        if stretches is not None:
            stretches.compile(found.gm, found, self.queries.values())
        self.buffers = {write.node: write.buffer for write in found.writes}

    def __call__(self, *args: Any) -> Any:
        """Run the prefill on these arguments; several threads may, each with a cache of its own."""
        with wanted():
            return _Run(self).run(*args)


class _Run(torch.fx.Interpreter):
    """One run of a cold prefill."""

    def __init__(self, prompt: PromptRun) -> None:
        super().__init__(prompt.gm)
        self.extra_traceback = False  # errors say what is wrong; which node of a graph found it is of no use
        self.queries, self.buffers = prompt.queries, prompt.buffers

    def run_node(self, n: Node) -> Any:
        """Show the query before an append, then run ``n``."""
        buffer = self.env.get(self.buffers[n]) if n in self.queries else None
        if isinstance(buffer, QuantizedKV) and buffer.state is not None:
            show_query(buffer.state, n, self.queries, self.env)
        return super().run_node(n)
