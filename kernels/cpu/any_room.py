"""Graphs that are compiled for caches with more room than there is, and told at each call how much that is.

Of the stored tensors of a cache that grows nothing but our kernels takes any notice, and these are told how many
tokens there is room for. So a graph serves tensors with any room up to that of its examples: none is made anew when a
cache has moved to more. One C++ function (``one_call.py``) looks at no shapes. A wrapper in Python that stays is read:
whether it gives these tensors to our kernels and does nothing else with them.
"""

from __future__ import annotations

import ast
import contextlib
from collections.abc import Callable, Collection, Iterator
from contextvars import ContextVar

from xquant_fx.kernels.cpu.wrapper_code import NotReadError, Place, WrapperCode

#: What the kernels of ours are called in wrappers.
OURS = "cpp_xquant_"


class Rooms:
    """Which ``inputs`` of a graph may have another room than their examples, and what the graph became."""

    def __init__(self, inputs: Collection[int]) -> None:
        self.inputs = frozenset(inputs)
        self.calls = list[Callable[[], bool]]()
        """For each function of the graph: waits for the compiler, and says whether it takes any room."""

    def are_open(self) -> bool:
        """Whether the compiled graph takes inputs with any room; waits for the compiler."""
        return bool(self.calls) and all(is_open() for is_open in self.calls)

    def check(self, code: WrapperCode) -> None:
        """Raise NotReadError if ``code`` does anything with these inputs but give them to kernels of ours."""
        names = {code.arguments[i] for i in self.inputs}
        for call in code.calls:
            taken = names & {arg.memory for arg in call.args if isinstance(arg, Place)}
            if taken and not call.name.startswith(OURS):
                raise NotReadError(f"{call.name} reads {sorted(taken)}, of which there may be more or less")
        if any(isinstance(place, Place) and place.memory in names for place in code.results):
            raise NotReadError("a result is an input of any room")

    def are_ours(self, wrapper: ast.FunctionDef) -> bool:
        """Whether a ``wrapper`` in Python does nothing with these inputs but give them to kernels of ours."""
        names: set[str] = set()
        for statement in wrapper.body:
            match statement:
                case ast.Assign(targets=[ast.Tuple(elts=given)], value=ast.Name(id="args")):
                    names = {ast.unparse(given[i]) for i in self.inputs}
                case ast.Delete():
                    pass
                case ast.Expr(value=ast.Call(func=ast.Name(id=name))) if name.startswith(OURS):
                    pass
                case _:
                    used = {node.id for node in ast.walk(statement) if isinstance(node, ast.Name)}
                    if used & names:
                        return False
        return bool(names)


_rooms: ContextVar[Rooms | None] = ContextVar("rooms", default=None)


def rooms() -> Rooms | None:
    """Those of the graph that is compiled now; None: its inputs are of the shapes of their examples."""
    return _rooms.get()


@contextlib.contextmanager
def compiled_for(rooms: Rooms | None) -> Iterator[None]:
    """Graphs that are compiled inside have these."""
    before = _rooms.set(rooms)
    try:
        yield
    finally:
        _rooms.reset(before)
