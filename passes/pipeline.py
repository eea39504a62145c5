"""The passes, in order."""

from __future__ import annotations

from torch.fx import GraphModule

from xquant_fx.passes.find_attention import find_attention
from xquant_fx.passes.find_sites import find_sites
from xquant_fx.passes.fuse_decode import fuse_decode
from xquant_fx.passes.rewrite import check_nothing_left, rewrite
from xquant_fx.passes.state_inputs import StateInputs, add_state_inputs


def run_passes(gm: GraphModule, inputs: list[object]) -> StateInputs:
    """Rewrite the quantized buffers of ``gm`` (a clone of Dynamo's graph) in place.

    ``inputs`` are the graph's example inputs. Returns the inputs that were added behind the old
    ones; the placeholders of the quantized buffers are gone.
    """
    sites = find_sites(gm.graph)  # who reads what; needed to know the length of a step
    state = add_state_inputs(gm.graph, inputs)  # codes, scales, windows become plain graph inputs
    rewrite(gm, state, sites)  # appends and reads become ops on those inputs
    fuse_decode(gm, find_attention(gm.graph))  # two loads and the attention that reads them become one op
    check_nothing_left(gm)  # invariant: Inductor sees plain tensors only
    gm.graph.lint()
    gm.recompile()
    return state

