"""A graph that turns inference mode on and off itself, as one that is called under it.

    _enter_inference_mode(True)                     with torch.inference_mode():
    ...                                     =>          ...
    _exit_inference_mode(mode)

Dynamo makes such graphs of functions that are decorated with ``torch.inference_mode()``, a model's ``forward`` say;
AOTAutograd raises on them. Checked on torch 2.13.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from xquant_fx.compiler.other_graph import OtherGraph
from xquant_fx.passes.graph import clone

_ENTER = getattr(torch.autograd.grad_mode, "_enter_inference_mode", None)
_EXIT = getattr(torch.autograd.grad_mode, "_exit_inference_mode", None)


@dataclasses.dataclass(frozen=True)
class InferenceGraph(OtherGraph):
    """The graph without these ops."""

    def calling(self, compiled: Callable[..., Any]) -> Callable[..., Any]:
        """What calls ``compiled`` in inference mode."""

        def call(*args: Any) -> Any:
            with torch.inference_mode():
                return compiled(*args)

        return call


def inference_graph(gm: GraphModule) -> InferenceGraph | None:
    """The graph of what is in inference mode, if that is all of ``gm``."""
    if not _modes(gm.graph):
        return None
    made = clone(gm)
    for node in reversed(_modes(made.graph)):
        made.graph.erase_node(node)
    made.recompile()
    return InferenceGraph(made)


def _modes(graph: Graph) -> list[Node]:
    """The op that turns the mode on, if it is the first of all, and that which turns it off again, the last one."""
    nodes = [node for node in graph.nodes if node.op not in ("placeholder", "output")]
    if len(nodes) < 2 or nodes[0].target is not _ENTER or nodes[-1].target is not _EXIT or nodes[0].args != (True,):
        return []
    is_one = nodes[-1].args == (nodes[0],) and all(node.target not in (_ENTER, _EXIT) for node in nodes[1:-1])
    return [nodes[0], nodes[-1]] if is_one else []
