"""What must hold after each pass, and what must be gone: a table, looked at after every pass.

A condition holds from the end of its pass on, so a later pass that breaks it is caught and named, too. Each looks at
nodes once and computes nothing. That a graph *computes* the same is asked by ``options={"self_check": True}``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch.fx import Graph, Node

from xquant_fx import ops
from xquant_fx.cache.growing import GrowingKV
from xquant_fx.cache.kv_tensor import QuantizedKV
from xquant_fx.errors import PassError
from xquant_fx.kernels.decode_attention.plain_torch import attend_dense
from xquant_fx.kernels.quantize_store.arguments import BORROWED, OWN, StoreArguments
from xquant_fx.passes.context import Context
from xquant_fx.passes.trace import fake

#: Takes the graph and the context, gives what is wrong.
Condition = Callable[[Graph, Context], Iterable[str]]


def check_after(name: str, graph: Graph, context: Context) -> None:
    """Check all that must hold after the pass ``name``.

    Raises:
        PassError: something does not; it names the pass and the first thing that is wrong.
    """
    context.done.append(name)
    for since, conditions in CONDITIONS.items():
        if since and since not in context.done:
            continue
        for condition in conditions:
            for wrong in condition(graph, context):
                raise PassError(
                    f"after the pass {name}: {wrong}. This is a fault of xquant_fx, not of the program: please report "
                    "it. A pass that may be left out is left out by options={'disable': [NAME]}"
                )


def _results(graph: Graph, context: Context) -> Iterator[str]:
    """The results are those of the program, but for what grows."""
    dropped = {place for each in context.grown for place in each.outputs}
    expected = [each for i, each in enumerate(context.results) if i not in dropped]
    found = context.described(graph)
    if len(found) != len(expected):
        yield f"the graph gives {len(found)} results, {len(expected)} are expected"
    for i, (mine, theirs) in enumerate(zip(found, expected, strict=False)):
        if not _alike(mine, theirs):
            yield f"result {i} is {mine}, in the program's graph {theirs}"


def _alike(mine: Any, theirs: Any) -> bool:
    """Whether two descriptions agree; a size that is a symbol may have become a number."""
    if mine is None or theirs is None:
        return mine is theirs
    pairs = list(zip(mine[0], theirs[0], strict=False))
    same = all(a == b or a is None or b is None for a, b in pairs)
    return same and len(mine[0]) == len(theirs[0]) and mine[1] == theirs[1]


def _inputs(graph: Graph, context: Context) -> Iterator[str]:
    """The program's inputs in their order, then those that passes added, each with its example."""
    found = graph.find_nodes(op="placeholder")
    kept = [node for node in context.placeholders if not node._erased]
    if found[: len(kept)] != kept:
        yield "the program's inputs are no longer the first ones, or in another order"
    added = len(found) - len(kept)
    if added != len(context.state.example_inputs):
        yield f"{added} inputs were added, and {len(context.state.example_inputs)} are going to be given"


def _known(graph: Graph, context: Context) -> Iterator[str]:
    """Each quantized input has its stored tensors."""
    for node in graph.find_nodes(op="placeholder"):
        if isinstance(fake(node), QuantizedKV | GrowingKV) and node not in context.state.nodes:
            yield f"the quantized input {node.name} has no stored tensors"


def _no_inputs_of(kind: type) -> Condition:
    def condition(graph: Graph, context: Context) -> Iterator[str]:
        for node in graph.find_nodes(op="placeholder"):
            if isinstance(fake(node), kind):
                yield f"{node.name} is still an input, a {kind.__name__}"

    return condition


def _appends(graph: Graph, context: Context) -> Iterator[str]:
    """Each append to a quantized input is gone, and one store has taken its place."""
    for write in context.detection.writes:
        if (write.past or write.buffer) in context.state.nodes:
            if not write.node._erased:
                yield f"the append {write.node.name} is still there"
            if write.node not in context.stores:
                yield f"nothing stores what {write.node.name} appended"
    stores = sum(len(graph.find_nodes(op="call_function", target=t)) for t in (ops.STORE, ops.STORE_BORROWED))
    both = sum(len(graph.find_nodes(op="call_function", target=t)) for t in ops.STORE_BOTH.values())
    if stores + 2 * both != len(context.stores):
        yield f"{len(context.stores)} appends were rewritten, {stores + 2 * both} are stored"


def _stores(graph: Graph, context: Context) -> Iterator[str]:
    """A store writes to inputs: what it wrote to anything else would be lost."""
    for node in context.stores.values():
        if node._erased:  # keys and values were paired
            continue
        arguments = StoreArguments.of(node)
        for name in arguments.written(OWN if arguments.fit is None else BORROWED):
            tensor = getattr(arguments, name)
            if isinstance(tensor, Node) and tensor.op != "placeholder":
                yield f"{node.name} writes its {name} to {tensor.name}, which is no input"


def _order(graph: Graph, context: Context) -> Iterator[str]:
    """What is read was stored before."""
    for append, load in context.loads.items():
        store = context.stores.get(append)
        if store is not None and not store._erased and not load._erased and load < store:
            yield f"{load.name} reads before {store.name} stores"


def _attentions(graph: Graph, context: Context) -> Iterator[str]:
    """Each attention with a form is gone, and a fused op has taken its place."""
    for site in context.detection.sites:
        if site.form is not None and site.is_quantized:
            if not site.form.output._erased:
                yield f"the attention {site.form.output.name} is still there"
            if site.form.output not in context.fused:
                yield f"no fused op has taken the place of {site.form.output.name}"
    fused = sum(len(graph.find_nodes(op="call_function", target=t)) for t in (ops.DECODE, attend_dense))
    if fused < len(context.fused):
        yield f"{len(context.fused)} attentions were fused, {fused} fused ops are there"


def _rotations(graph: Graph, context: Context) -> Iterator[str]:
    """Rotations that a linear layer takes are gone."""
    for site in context.detection.sites:
        if site.folding is None or site.form is None or site.value_write is None:
            continue
        for linear, place in ((site.folding.value, site.value_write.node), (site.folding.output, site.form.output)):
            if linear is not None and place in context.rotations:
                yield f"the rotation {context.rotations[place].name} was to be folded into {linear.node.name}"


def _plain(graph: Graph, context: Context) -> Iterator[str]:
    """Inductor sees plain tensors only."""
    for node in graph.nodes:
        if isinstance(fake(node), QuantizedKV | GrowingKV):
            yield f"{node.name} is a {type(fake(node)).__name__}"


#: Pass to what holds from its end on; "" is any.
CONDITIONS: dict[str, tuple[Condition, ...]] = {
    "": (_results,),
    "add_state_inputs": (_inputs, _known),
    "rewrite_growth": (_no_inputs_of(GrowingKV),),
    "rewrite": (_no_inputs_of(QuantizedKV), _appends, _stores, _order),
    "fuse_decode": (_attentions,),
    "fold_rotation": (_rotations,),
    "verify": (_plain,),
}
