"""Working on a copy of Dynamo's graph. Everything private to torch that this needs is here.

Dynamo goes on reading its own graph's placeholders after the backend returns, so the passes work on
a clone. Relied on: ``node._dynamo_source``, ``GetItemSource``, ``node.meta["example_value"]`` and ``["tensor_dict"]``,
``GraphModule._param_name_to_source`` and friends, ``_make_graph_module``, ``suppress_guards``, ``create_symintnode``.
Checked on torch 2.11 and 2.13, but for the last two on 2.14, too.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch._dispatch.python import enable_python_dispatcher
from torch._dynamo.source import GetItemSource
from torch._guards import TracingContext
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Graph, GraphModule, Node
from torch.fx._lazy_graph_module import _make_graph_module
from torch.fx.node import map_arg

#: Not ``_backend_id``: by it Dynamo's ``caching_precompile`` would put Inductor's function into the place of what the
#: backend returned, which calls it with the cache's tensors.
_CARRIED = ("_param_name_to_source", "compile_subgraph_reason", "_source_to_user_stacks")

#: In the ``meta`` of an input that Dynamo's graph did not have.
_ADDED = "xquant_added"
#: In the ``meta`` of a buffer that is to be of any length (``compiler/any_length.py``): that length, as a symbol.
LENGTH = "xquant_length"
#: In the ``meta`` of one for a stored tensor whose example has another room than it: kernels are told at each call.
OF_ANY_ROOM = "xquant_of_any_room"


def clone(gm: GraphModule) -> GraphModule:
    """A copy whose graph may be changed; the modules and tensors are the same objects."""
    graph = Graph()
    env: dict[Node, Node] = {}
    output = graph.graph_copy(gm.graph, env)
    graph.output(output)
    for old, new in env.items():
        if hasattr(old, "_dynamo_source"):
            new._dynamo_source = old._dynamo_source
    copy = _make_graph_module(gm, graph)  # whose Python code is written when somebody asks for it
    copy.meta.update(gm.meta)
    for name in _CARRIED:
        if hasattr(gm, name):
            setattr(copy, name, getattr(gm, name))
    return copy


def resized(value: FakeTensor, change: Callable[[Any], Any]) -> FakeTensor:
    """``value`` with sizes and strides as ``change`` gives them; itself, where it gives each back."""
    old = [*value.shape], [*value.stride()]
    sizes, strides = ([change(each) for each in part] for part in old)
    if all(a is b for a, b in zip([*sizes, *strides], [*old[0], *old[1]], strict=True)):
        return value
    with value.fake_mode:
        made: Any = torch.empty_strided(sizes, strides, dtype=value.dtype, device=value.device)
    return made  # type: ignore[no-any-return]


def simplified(size: Any) -> Any:
    """A size in the symbols that Dynamo has for numbers by now; a number as it is."""
    return size.node.shape_env.replace(size.node.expr) if isinstance(size, torch.SymInt) else size


def put_number(node: Node, user: Node, number: int) -> None:
    """``number`` in the place of ``node`` among the arguments of ``user``."""
    user.args, user.kwargs = map_arg((user.args, user.kwargs), lambda each: number if each is node else each)


def fake_mode(graph: Graph) -> Any:
    """The mode of the fake values in ``graph`` (not TracingContext's, which Dynamo renews for backends)."""
    for node in graph.nodes:
        value = node.meta.get("example_value")
        value = getattr(value, "anchor", value)
        if isinstance(value, FakeTensor):
            return value.fake_mode
    return None


def without_guards(graph: Graph) -> AbstractContextManager[None]:
    """Inside, what is asked of sizes that Dynamo left open in ``graph`` is true of this call, and binds no other."""
    shapes = getattr(fake_mode(graph), "shape_env", None)
    return contextlib.nullcontext() if shapes is None else shapes.suppress_guards()


def part_source(whole: Node, index: int) -> Any:
    """Where the program has part ``index`` of the input ``whole``."""
    source = getattr(whole, "_dynamo_source", None)
    return None if source is None else GetItemSource(source, index)


def input_beside(graph: Graph, other: Node, value: Any) -> Node:
    """A new input beside ``other``, of which ``value`` is known."""
    with graph.inserting_before(other):
        node = graph.placeholder(str(other.target))
    node._dynamo_source = getattr(other, "_dynamo_source", None)
    node.meta.update({**other.meta, "example_value": value})
    return node


def note_added(node: Node) -> None:
    """The program's graph has no such input as ``node``: Dynamo knows no source for its sizes."""
    node.meta[_ADDED] = True


def add_input(graph: Graph, after: Node, name: str, tensor: Tensor, value: Tensor | None = None) -> Node:
    """Add a placeholder for ``tensor``, whose address CUDA graphs may take for granted; ``value``: its fake tensor."""
    with graph.inserting_after(after):
        node = graph.placeholder(name)
    note_added(node)
    node._dynamo_source = None
    node.meta["example_value"] = fake_of(fake_mode(graph), tensor) if value is None else value
    node.meta["tensor_dict"] = {"_dynamo_static_input_type": "unguarded"}
    return node


def fake_of(mode: Any, tensor: Tensor) -> Tensor:
    """``tensor`` as a fake one of ``mode``, with its sizes as numbers; itself without a mode."""
    fake: Tensor = tensor if mode is None else mode.from_tensor(tensor, static_shapes=True)
    if mode is None or all(isinstance(size, int) for size in (*fake.shape, *fake.stride())):
        return fake
    with mode:  # Dynamo has met it, and left its batch open
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)


def make_fake_inputs(graph: Graph, inputs: Sequence[Any]) -> None:
    """Before AOTAutograd gets ``graph``: fakes of the inputs that were added, in its mode, and static.

    It makes its own fakes of inputs, or takes one that is alive. Dynamo would know no source for a symbolic size.
    """
    context = TracingContext.try_get()
    if context is None or context.fake_mode is None:
        return
    for node, tensor in zip(graph.find_nodes(op="placeholder"), inputs, strict=True):
        if node.meta.get(_ADDED):
            node.meta["xquant_fake_input"] = context.fake_mode.from_tensor(tensor, static_shapes=True)


def input_of_size(graph: Graph, size: Any) -> tuple[Node, bool]:
    """The placeholder that is the symbolic ``size``, and whether it had to be added, as the last one."""
    inputs = graph.find_nodes(op="placeholder")
    for node in inputs:
        if _same_size(node.meta.get("example_value"), size):
            return node, False
    with graph.inserting_after(inputs[-1]):
        node = graph.placeholder("xquant_tokens")
    node.target = node.name  # caches of several lengths need one each, and only names are told apart by torch
    node._dynamo_source = None
    node.meta["example_value"] = size
    return node, True


def size_among_inputs(inputs: Iterable[Node], size: Any) -> tuple[int, int] | None:
    """(number of the input, dimension) of a tensor that has the symbolic ``size``; None if no input has.

    ``inputs`` are all placeholders of the graph as Dynamo made it: passes drop some.
    """
    for index, value in enumerate(node.meta.get("example_value") for node in inputs):
        for dim, length in enumerate(value.shape if isinstance(value, Tensor) else ()):
            if _same_size(length, size):
                return index, dim
    return None


def named_once(value: Any) -> Any:
    """``value``, if it is a number that Dynamo left open, under the symbol that is left of all for the same number.

    Inductor defines symbols as the inputs name them and writes what is left. Of two that turned out to be equal one may
    come with an input that passes dropped, such as a size of a quantized buffer: the one that is left.
    """
    if not isinstance(value, torch.SymInt) or not value.node.expr.is_symbol:
        return value
    return value.node.shape_env.create_symintnode(value.node.expr, hint=value.node.hint)


def _same_size(a: Any, b: Any) -> bool:
    """Whether two symbolic sizes are one number for all that is known already; asks for no new guard."""
    if not (isinstance(a, torch.SymInt) and isinstance(b, torch.SymInt)):
        return False
    return bool(simplified(a) == simplified(b))


def call(
    graph: Graph,
    target: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any] | None = None,
    result: Callable[[], Any] | None = None,
) -> Node:
    """Add a call and its fake result together, at the graph's insertion point.

    ``result`` makes what the call gives, where the call itself would take long: fake tensors are slow.
    """
    node = add_call(graph, target, args, kwargs or {}, None)
    values = map_arg((node.args, node.kwargs), lambda n: n.meta["example_value"])
    mode = fake_mode(graph)
    with mode or contextlib.nullcontext(), enable_python_dispatcher(), torch.no_grad():  # which symbolic sizes need
        node.meta["example_value"] = result() if result else target(*values[0], **values[1])
    return node


def add_call(graph: Graph, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], value: Any) -> Node:
    """Add a call whose fake result, ``value``, is known, at the graph's insertion point."""
    node = graph.call_function(target, args, kwargs)
    node.meta["example_value"] = value
    return node
