"""One typed description per op: its schema, its kernels' parameters and the reading of graph nodes derive from it.

    @dataclasses.dataclass(frozen=True, eq=False)
    class ScaleArguments(Arguments):
        x: Annotated[Tensor, Elements("T")]
        out: Annotated[Tensor, Elements("T", written=True)]
        bias: Annotated[Tensor | None, Elements("T")]
        size: Symbolic
        factor: float = 1.0

    ScaleArguments.schema("scale")  # scale(Tensor x, Tensor(a!) out, Tensor? bias, SymInt size, float factor=1.0) -> ()
    ScaleArguments.of(node).out     # the graph node that is passed as ``out``, by position or by name

An instance holds tensors, graph nodes or Inductor's buffers alike.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import types
import typing
from collections.abc import Callable, Iterable
from typing import Annotated, Any, NamedTuple, TypeVar

from torch import Tensor
from torch.fx import Node

A = TypeVar("A", bound="Arguments")
SCHEMA_TYPES = {Tensor: "Tensor", int: "int", float: "float", str: "str"}
#: A size that may be symbolic while a graph is traced.
Symbolic = Annotated[int, "SymInt"]


class Elements(NamedTuple):
    """Of a tensor argument: the C++ type of its elements, and whether the op writes to it."""

    kind: str
    written: bool = False


@dataclasses.dataclass(frozen=True)
class Overload:
    """How one overload of an op differs from the description."""

    omit: frozenset[str] = frozenset()
    """Arguments that it does not have."""
    required: frozenset[str] = frozenset()
    """Arguments that are optional in the description and must be given here."""
    read_only: frozenset[str] = frozenset()
    """Tensors that it does not write to."""


class Parameter(NamedTuple):
    """One argument of an overload."""

    name: str
    type: Any
    """The Python type without annotations; ``X | None`` where ``optional``."""
    kind: str
    """The type in a schema, without "?"."""
    optional: bool
    default: Any
    """``dataclasses.MISSING`` where there is none."""
    elements: Elements | None
    """None but for tensors."""


def _parameter(field: dataclasses.Field[Any], hint: Any, overload: Overload) -> Parameter:
    plain: Any = hint
    notes: list[Any] = []
    if typing.get_origin(hint) is Annotated:
        plain, *notes = typing.get_args(hint)
    optional = typing.get_origin(plain) in (typing.Union, types.UnionType)
    base = next(t for t in typing.get_args(plain) if t is not type(None)) if optional else plain
    default = field.default
    if field.name in overload.required:
        plain, optional, default = base, False, dataclasses.MISSING
    elements = next((note for note in notes if isinstance(note, Elements)), None)
    if elements is not None and field.name in overload.read_only:
        elements = elements._replace(written=False)
    kind = "SymInt" if "SymInt" in notes else SCHEMA_TYPES[base]
    return Parameter(field.name, plain, kind, optional, default, elements)


class Arguments:
    """Base of the descriptions; subclasses are frozen dataclasses."""

    @classmethod
    @functools.cache  # an eager step asks, too, and reading annotations takes longer than its kernel
    def parameters(cls, overload: Overload = Overload()) -> tuple[Parameter, ...]:
        """The arguments of ``overload``, in order."""
        hints = typing.get_type_hints(cls, include_extras=True)
        fields = dataclasses.fields(cls)  # type: ignore[arg-type]
        return tuple(_parameter(f, hints[f.name], overload) for f in fields if f.name not in overload.omit)

    @classmethod
    def schema(cls, name: str, overload: Overload = Overload(), returns: str = "()") -> str:
        """The schema that torch registers: ``name(...) -> returns``."""
        letters, texts = iter("abcdefghijklmnopqrstuvwxyz"), []
        for p in cls.parameters(overload):
            alias = f"({next(letters)}!)" if p.elements is not None and p.elements.written else ""
            default = "" if p.default is dataclasses.MISSING else f"={p.default}"
            texts.append(f"{p.kind}{alias}{'?' * p.optional} {p.name}{default}")
        return f"{name}({', '.join(texts)}) -> {returns}"

    @classmethod
    def signature(cls, overload: Overload = Overload(), returns: Any = None) -> inspect.Signature:
        """The same as a Python signature, for what infers a schema from one."""
        empty, kind = inspect.Parameter.empty, inspect.Parameter.POSITIONAL_OR_KEYWORD
        return inspect.Signature(
            [
                inspect.Parameter(
                    p.name, kind, annotation=p.type, default=empty if p.default is dataclasses.MISSING else p.default
                )
                for p in cls.parameters(overload)
            ],
            return_annotation=returns,
        )

    @classmethod
    def written(cls, overload: Overload = Overload()) -> list[str]:
        """Names of the tensors that the op writes to."""
        return [p.name for p in cls.parameters(overload) if p.elements is not None and p.elements.written]

    @classmethod
    @functools.cache
    def tensor_names(cls) -> tuple[str, ...]:
        """Names of all tensors, in order."""
        return tuple(p.name for p in cls.parameters() if p.elements is not None)

    @classmethod
    def of(cls: type[A], node: Node) -> A:
        """The arguments of a call in a graph, with nodes in the place of tensors."""
        return cls(*node.args, **node.kwargs)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The tensors that are there, by name, in order."""
        values = {name: getattr(self, name) for name in self.tensor_names()}
        return {name: value for name, value in values.items() if value is not None}

    def _asdict(self) -> dict[str, Any]:
        """All arguments by name, in order; nothing is copied."""
        return dict(vars(self))

    def replace(self: A, **changes: Any) -> A:
        """These arguments with ``changes``."""
        return type(self)(**{**vars(self), **changes})

    def positional(self, *, without: Iterable[str] = ()) -> list[Tensor | None]:
        """All tensors but those called ``without``, in order, None for those that are not there."""
        return [getattr(self, name) for name in self.tensor_names() if name not in set(without)]

    def mapped(self: A, function: Callable[[Any], Any], names: Iterable[str] | None = None) -> A:
        """These arguments with ``function`` applied to the tensors that are there (of ``names``, if given)."""
        chosen = self.tensor_names() if names is None else set(names)
        return self.replace(**{name: function(t) for name, t in self.tensors.items() if name in chosen})
