"""A graph that returns a buffer which it was given, as one that does not: it is put back among the results.

    keys = buffer.to(x)                             buffer[:, :, pos] = k
    keys[:, :, pos] = k                     =>      attention(q, buffer, ...)
    attention(q, keys, ...)                         return ...
    return keys, ...

for ``buffer`` that has the dtype and the device of ``x`` already: then ``to`` gives the buffer itself. Meta's Llama
assigns it to its attribute anew at each step.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from torch.fx import Graph, GraphModule, Node
from torch.nn import Parameter

from xquant_fx.compiler.other_graph import OtherGraph
from xquant_fx.passes.find_writes import written_memory
from xquant_fx.passes.graph import clone
from xquant_fx.passes.trace import fake, operand
from xquant_fx.passes.vocabulary import kind


@dataclasses.dataclass(frozen=True)
class ReturnedInputs(OtherGraph):
    """The graph that returns what it computes."""

    places: Mapping[int, int]
    """Which of the program's results are which arguments."""
    results: int
    """How many results the program's graph has."""

    def calling(self, compiled: Callable[..., Any]) -> Callable[..., Any]:
        """What calls ``compiled`` and returns the arguments, too."""
        if not self.places:
            return compiled

        def call(*args: Any) -> tuple[Any, ...]:
            computed = iter(compiled(*args))
            return tuple(args[self.places[i]] if i in self.places else next(computed) for i in range(self.results))

        return call


def returned_inputs(gm: GraphModule) -> ReturnedInputs | None:
    """The graph without what only names an input that it writes to; None if ``gm`` is so."""
    if not _names(gm.graph):
        return None
    made = clone(gm)
    for name in _names(made.graph):
        name.replace_all_uses_with(name.args[0])  # type: ignore[arg-type]  # a node, as it was found
        made.graph.erase_node(name)
    inputs = made.graph.find_nodes(op="placeholder")
    output = made.graph.output_node()
    returned: Any = output.args[0]
    places = {i: inputs.index(each) for i, each in enumerate(returned) if each in inputs}
    output.args = (tuple(each for i, each in enumerate(returned) if i not in places),)
    made.recompile()
    return ReturnedInputs(made, places, len(returned))


def _names(graph: Graph) -> list[Node]:
    """Ops that give an input of tokens, heads, channels itself, in program order, of those that are written to."""
    found: dict[Node, Node] = {}
    for node in graph.nodes:
        source = operand(node)
        root = None if source is None else found.get(source, source)
        if kind(node) in ("cast", "contiguous") and _is_buffer(root) and fake(node) is fake(source):
            found[node] = root  # type: ignore[assignment]  # a buffer
    changed = written_memory(graph) if found else set()
    return [name for name, root in found.items() if root in changed]


def _is_buffer(node: Node | None) -> bool:
    value = fake(node)
    is_input = node is not None and node.op == "placeholder" and not isinstance(value, Parameter)
    return is_input and value is not None and value.dim() > 2 and value.is_floating_point()
