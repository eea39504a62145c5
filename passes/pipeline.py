"""The passes that rewrite a graph, as one list. Detection comes before all of them, in ``detect``.

| pass | does | file |
|---|---|---|
| add_state_inputs | codes, scales, windows of quantized buffers become plain inputs | state_inputs.py |
| rewrite_growth | concatenations that grow a cache become ops on those inputs | rewrite_growth.py |
| rewrite_slides | full sliding windows no longer move | rewrite_slides.py |
| rewrite | appends and reads become ops on those inputs | rewrite.py |
| fuse_decode | two loads and the attention that reads them become one op | fuse_decode.py |
| fold_rotation | weights of linear layers rotate values and outputs | fold_rotation.py |
| pair_stores | keys and values of a layer are stored by one op, on GPUs | pair_stores.py |
| linear_rows | linear layers of few rows read weights at the memory's speed | linear_rows.py |
| verify | Inductor sees plain tensors only | verify.py |

A pass takes the graph and the context, changes the graph in place, and returns how many things it did. What must hold
afterwards is a row of ``conditions.py``, looked at after every pass.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection
from pathlib import Path

from torch._dynamo.utils import counters
from torch.fx import GraphModule

from xquant_fx.passes import dump
from xquant_fx.passes.conditions import check_after
from xquant_fx.passes.context import Context
from xquant_fx.passes.fold_rotation import fold_rotation
from xquant_fx.passes.fuse_decode import fuse_decode
from xquant_fx.passes.linear_rows import linear_rows
from xquant_fx.passes.pair_stores import pair_stores
from xquant_fx.passes.rewrite import rewrite
from xquant_fx.passes.rewrite_growth import rewrite_growth
from xquant_fx.passes.rewrite_slides import rewrite_slides
from xquant_fx.passes.state_inputs import add_state_inputs
from xquant_fx.passes.verify import verify


@dataclasses.dataclass(frozen=True)
class Pass:
    """One step of a family's pipeline."""

    name: str
    run: Callable[[GraphModule, Context], int]
    may_be_off: bool = False
    """Whether a user may switch it off; the others are needed for a graph that is right."""


#: Rewrite families share the detection; each is a list of passes in order.
FAMILIES: dict[str, tuple[Pass, ...]] = {
    "kv": (
        Pass("add_state_inputs", add_state_inputs),
        Pass("rewrite_growth", rewrite_growth),
        Pass("rewrite_slides", rewrite_slides),
        Pass("rewrite", rewrite),
        Pass("fuse_decode", fuse_decode, may_be_off=True),
        Pass("fold_rotation", fold_rotation, may_be_off=True),
        Pass("pair_stores", pair_stores, may_be_off=True),
        Pass("linear_rows", linear_rows, may_be_off=True),
        Pass("verify", verify),
    ),
}
PASSES = tuple(each for family in FAMILIES.values() for each in family)
#: What a user may leave out: passes, and what comes after them, in the generated module (``kernels/cpu/one_call.py``).
MAY_BE_OFF = (*(each.name for each in PASSES if each.may_be_off), "one_call")


def run_pass(each: Pass, gm: GraphModule, context: Context) -> int:
    """Run one pass; returns how many things it did.

    Raises:
        PassError: the graph breaks a condition of ``conditions.py`` afterwards.
    """
    done = each.run(gm, context)
    check_after(each.name, gm.graph, context)
    return done


def run_passes(gm: GraphModule, context: Context, off: Collection[str] = (), folder: Path | None = None) -> None:
    """Run every pass that is not in ``off`` on ``gm``, in order, in place.

    ``torch._dynamo.utils.counters["xquant"]`` counts what each did. The graph before the first and after each
    goes to torch's structured trace log and, as files, to ``folder``.
    """
    number = dump.begin(gm, folder)
    for step, each in enumerate(PASSES, start=1):
        if each.name in off:
            continue
        counters["xquant"][each.name] += run_pass(each, gm, context)
        dump.graph(gm, f"{number}-{step}-after-{each.name}", folder)
