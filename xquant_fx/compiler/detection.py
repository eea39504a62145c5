"""Detection of one graph, with the surroundings of this call: its inputs, what is asked for, who else sees a buffer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch._dynamo.utils import dynamo_timed
from torch.fx import GraphModule, Node

from xquant_fx.compiler.options import Request
from xquant_fx.compiler.planning import plan_graph, why_not_gradients, why_not_layers
from xquant_fx.compiler.proof import Call
from xquant_fx.compiler.short_windows import note_short_windows, why_not_sliding_window
from xquant_fx.passes.detect import detect
from xquant_fx.passes.facts import Facts
from xquant_fx.passes.graph import clone
from xquant_fx.passes.records import Detection, Refused


def detect_graph(
    gm: GraphModule, inputs: list[Any], request: Request, originals: Mapping[int, Tensor] | None = None
) -> Detection:
    """All that is decided about ``gm``, on a clone of it.

    ``originals`` are tensors whose copies are among the inputs, by the ids of the copies: who sees a buffer is asked
    of the original.
    """
    return detect_in(clone(gm), inputs, request, originals)


def detect_in(
    copy: GraphModule, inputs: list[Any], request: Request, originals: Mapping[int, Tensor] | None = None
) -> Detection:
    """As ``detect_graph``, on a clone that the caller has made."""
    given = dict(zip(copy.graph.find_nodes(op="placeholder"), inputs, strict=True))
    surroundings = why_not_gradients() or why_not_layers(copy, request)
    unfused = "the pass fuse_decode is switched off" if "fuse_decode" in request.disable else ""
    call = Call(copy, given, originals=originals)

    def refusal(node: Node, what: str, facts: Facts) -> Refused:
        lasting = surroundings or call.why_kept(node) or why_not_sliding_window(node, facts, request)
        return Refused(lasting) if lasting else Refused(call.refuse(node, what, facts), of_call=True)

    with dynamo_timed("xquant_detect"):  # for torch._dynamo.utils.compile_times()
        found = detect(copy, refusal, lambda graph, sites: plan_graph(graph, sites, request, call), unfused)
    return note_short_windows(found, request)
