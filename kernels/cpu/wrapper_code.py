"""What Inductor's Python wrapper does with its C++ kernels, read from the code that it generated.

The wrapper allocates buffers, gives parts of them other names, and calls kernels with them. Read are those statements
(as torch 2.11 to 2.14 write them) and no others: a wrapper that does anything else is refused, with the statement.
"""

from __future__ import annotations

import ast
import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

ALIGNMENT = 64  # of torch's CPU allocator
#: What checks tensors and does nothing else; torch 2.14 checks several in one call.
ASSERTS = ("assert_size_stride", "assert_size_stride_grouped", "assert_alignment")


class NotReadError(Exception):
    """A statement that is none of those that are read here."""


class Place(NamedTuple):
    """A tensor: where it begins in the memory of a buffer or argument, and as Python."""

    memory: str
    """Name of the buffer when it was allocated, or of the argument or constant."""
    offset: int
    """Bytes."""
    itemsize: int | None
    """Bytes of an element; unknown of arguments."""
    python: str


class Number(NamedTuple):
    """A number among the results: sizes of the step, and what is computed from them."""

    python: str
    """In terms of the wrapper's arguments."""


class Size(NamedTuple):
    """A size that is known in a step only: one of the wrapper's arguments, or a dimension ``dim`` of one."""

    argument: str
    dim: int | None = None

    @property
    def python(self) -> str:
        """In terms of the wrapper's arguments."""
        return self.argument if self.dim is None else f"{self.argument}.size({self.dim})"


@dataclasses.dataclass
class KernelCall:
    """One kernel and what it is given."""

    name: str
    args: list[Place | Size | int]


@dataclasses.dataclass
class WrapperCode:
    """The wrapper's calls in order, and where its buffers lie."""

    arguments: list[str] = dataclasses.field(default_factory=list)
    calls: list[KernelCall] = dataclasses.field(default_factory=list)
    results: list[Place | Number | None] = dataclasses.field(default_factory=list)
    allocated: dict[str, str] = dataclasses.field(default_factory=dict)
    """Python that allocates each buffer that is returned, by the buffer's name."""
    offsets: dict[str, int] = dataclasses.field(default_factory=dict)
    """Bytes from the start of the scratch memory, of each buffer that is not."""
    scratch: int = 0
    """Bytes of scratch memory."""


def read_wrapper(function: ast.FunctionDef, itemsizes: Mapping[str, int] | None = None) -> WrapperCode:
    """What the wrapper ``function`` does; ``itemsizes`` are bytes of an element of arguments, by name.

    Raises:
        NotReadError: it does something that is not read here, such as a call of an ATen operation, or allocates a
            buffer of a size that is known in a step only.
    """
    reader = Reader(itemsizes)
    reader.read_all(function)
    return reader.planned()


class Reader:
    """The names that are bound so far, and what happened to memory."""

    def __init__(self, itemsizes: Mapping[str, int] | None = None) -> None:
        """``itemsizes`` are bytes of an element of arguments, by name, where that is known."""
        self.code = WrapperCode()
        self.itemsizes = itemsizes or {}
        self.names: dict[str, Place] = {}
        self.sizes: dict[str, int] = {}
        self.sizes_given: dict[str, Size] = {}
        self.allocations: dict[str, str] = {}
        self.events: list[tuple[str, bool]] = []
        """Buffers in the order in which they came (True) and went (False)."""

    def read_all(self, function: ast.FunctionDef) -> None:
        """All statements of a wrapper; raises NotReadError."""
        for statement in function.body:
            self.read(statement)

    def read(self, statement: ast.stmt) -> None:
        """One statement; raises NotReadError."""
        match statement:
            case ast.Assign(targets=[ast.Tuple(elts=names)], value=ast.Name(id="args")):
                for name in names:
                    self._argument(name)
            case ast.Assign(targets=[ast.Name(id=name)], value=ast.Name(id=given)) if _is_size(name, given, self.code):
                self.sizes_given[name] = Size(given)
            case ast.Assign(targets=[ast.Name(id=name)], value=ast.Name(id=given)) if given in self.sizes_given:
                self.sizes_given[name] = self.sizes_given[given]
            case ast.Assign(targets=[ast.Name(id=name)], value=value):
                self.names[name] = self._allocation(name, value) or self._place(value)
            case ast.Delete(targets=targets):
                for target in targets:
                    self._delete(target)
            case ast.Expr(value=ast.Call(func=ast.Name(id=name))) if name in ASSERTS:
                pass  # sizes of arguments are guarded on before, those of buffers are known
            case ast.Expr(value=ast.Call(func=ast.Attribute(value=ast.Name(id="args"), attr="clear"))):
                pass
            case ast.Expr(value=ast.Call(func=ast.Name(id=name), args=args, keywords=[])) if name.startswith("cpp_"):
                self.code.calls.append(KernelCall(name, [self._given(arg) for arg in args]))
            case ast.Return(value=ast.Tuple(elts=results)):
                self.code.results = [self._result(each) for each in results]
            case _:
                raise NotReadError(ast.unparse(statement)[:200])

    def _argument(self, node: ast.expr) -> None:
        if not isinstance(node, ast.Name):
            raise NotReadError(ast.unparse(node))
        self.code.arguments.append(node.id)
        self.names[node.id] = Place(node.id, 0, self.itemsizes.get(node.id), node.id)

    def _allocation(self, name: str, value: ast.expr) -> Place | None:
        match value:
            case ast.Call(func=ast.Name(id="empty_strided_cpu"), args=[size, stride, ast.Attribute(attr=dtype)]):
                pass
            case _:
                return None
        itemsize = getattr(torch, dtype).itemsize
        memory = f"{name}_{len(self.sizes)}"  # a name may be given twice
        self.sizes[memory] = _elements(_literal(size), _literal(stride)) * itemsize
        self.allocations[memory] = ast.unparse(value)
        self.events.append((memory, True))
        return Place(memory, 0, itemsize, memory)

    def _place(self, value: ast.expr) -> Place:
        match value:
            case ast.Name(id=name):
                return self.names.get(name) or Place(name, 0, None, name)  # else a constant of the module
            case ast.Call(func=ast.Name(id="reinterpret_tensor"), args=[base, size, stride, offset]):
                of = self._place(base)
                elements = _literal(offset)
                if elements and of.itemsize is None:
                    raise NotReadError(ast.unparse(value))
                python = f"reinterpret_tensor({of.python}, {_literal(size)}, {_literal(stride)}, {elements})"
                return Place(of.memory, of.offset + elements * (of.itemsize or 0), of.itemsize, python)
        raise NotReadError(ast.unparse(value)[:200])

    def _result(self, value: ast.expr) -> Place | Number | None:
        if _is_none(value):
            return None
        parts = list(ast.walk(value))
        names = [part for part in parts if isinstance(part, ast.Name)]
        numbers = (ast.Name, ast.Constant, ast.BinOp, ast.UnaryOp, ast.operator, ast.unaryop, ast.expr_context)
        if not all(isinstance(part, numbers) for part in parts) or any(n.id not in self.sizes_given for n in names):
            return self._place(value)
        for name in names:
            name.id = self.sizes_given[name.id].argument
        return Number(ast.unparse(value))

    def _given(self, value: ast.expr) -> Place | Size | int:
        if isinstance(value, ast.Constant) and type(value.value) is int:
            return value.value
        if isinstance(value, ast.Name) and value.id in self.sizes_given:
            return self.sizes_given[value.id]
        match value:
            case ast.Call(func=ast.Attribute(value=of, attr="size"), args=[ast.Constant(value=int(dim))]):
                return size_of(self._place(of), dim, self.code)
        return self._place(value)

    def _delete(self, target: ast.expr) -> None:
        if not isinstance(target, ast.Name) or target.id not in self.names:
            raise NotReadError(f"del {ast.unparse(target)}")
        memory = self.names.pop(target.id).memory
        if memory in self.sizes and all(place.memory != memory for place in self.names.values()):
            self.events.append((memory, False))

    def planned(self) -> WrapperCode:
        """What was read, with a place in the scratch memory for each buffer that is not returned."""
        code, free = self.code, dict[int, list[int]]()
        code.allocated = {
            place.memory: self.allocations[place.memory]
            for place in code.results
            if isinstance(place, Place) and place.memory in self.allocations
        }
        for memory, comes in self.events:
            size = -(-self.sizes[memory] // ALIGNMENT) * ALIGNMENT
            if memory in code.allocated:
                continue
            if not comes:
                free.setdefault(size, []).append(code.offsets[memory])
            elif free.get(size):
                code.offsets[memory] = free[size].pop()
            else:
                code.offsets[memory], code.scratch = code.scratch, code.scratch + size
        return code


def size_of(place: Place, dim: int, code: WrapperCode) -> Size:
    """A size of an argument; raises NotReadError if ``place`` is none, or a part of one."""
    if place.memory not in code.arguments or place.python != place.memory:
        raise NotReadError(f"a size of {place.python}, which is no argument")
    return Size(place.memory, dim)


def _is_size(name: str, given: str, code: WrapperCode) -> bool:
    """Whether ``name = given`` names a size: what else gets a new name is a buffer."""
    return given in code.arguments and not name.startswith("buf")


def _is_none(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is None


def _literal(node: ast.expr) -> Any:
    try:
        return ast.literal_eval(node)
    except ValueError:
        raise NotReadError(f"a size that is known in a step only: {ast.unparse(node)}") from None


def _elements(size: tuple[int, ...], stride: tuple[int, ...]) -> int:
    return 1 + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) if math.prod(size) else 0
