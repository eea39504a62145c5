"""Buffers of which first rows are quantized, in a graph that takes others: a batch of another size.

They become ordinary tensors again, as others that turn out to be used otherwise (``give_back.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import GraphModule

from xquant_fx.cache.convert import restack_in_place, with_rows
from xquant_fx.cache.leading_rows import LeadingRowsKV
from xquant_fx.compiler.dynamo_frames import forget_compiled_frame
from xquant_fx.compiler.give_back import give_back, groups_of
from xquant_fx.compiler.options import Request
from xquant_fx.passes.find_writes import written_memory


class GiveBackRows:
    """Stands in for a graph that takes other rows than those that are quantized."""

    def __init__(self, graph: Callable[..., Any], places: Sequence[int], request: Request) -> None:
        self.graph, self.places, self.request = graph, places, request

    def __call__(self, *args: Any) -> Any:
        """Give the buffers back and run the step as it stands; Dynamo traces the next one anew."""
        buffers = [args[i] for i in self.places]
        rows = buffers[0].rows
        reason = f"the first {rows} of {buffers[0].shape[0]} rows were quantized, and a batch of another size came"
        give_back(groups_of(leaf for buffer in buffers for leaf in buffer.leaves), reason, self.request)
        with torch.inference_mode(False), torch.no_grad():
            for buffer in buffers:
                restack_in_place(buffer, with_rows(*buffer.parts))
        forget_compiled_frame()
        return self.graph(*args)


def rows_given_back(gm: GraphModule, inputs: Sequence[Any], request: Request) -> GiveBackRows | None:
    """What gives back the buffers with first rows among ``inputs`` that ``gm`` writes to; None if there are none."""
    written, nodes = written_memory(gm.graph), gm.graph.find_nodes(op="placeholder")
    places = [i for i, each in enumerate(inputs) if isinstance(each, LeadingRowsKV) and nodes[i] in written]
    return GiveBackRows(gm.forward, places, request) if places else None
