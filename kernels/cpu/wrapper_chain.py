"""Wrappers that are called one after the other, some of them many times, read as one.

Where the layers of a model are equal, Inductor generates the wrapper of one. What is read of it
(``wrapper_code.py``) is repeated here for each layer, with that layer's tensors.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from xquant_fx.kernels.cpu.wrapper_code import (
    KernelCall,
    NotReadError,
    Number,
    Place,
    Reader,
    Size,
    WrapperCode,
    size_of,
)


class Link(NamedTuple):
    """One call of a wrapper."""

    wrapper: int
    """Which of the wrappers."""
    given: Sequence[str]
    """Names of its arguments: arguments of the chain, and what was returned before."""
    returned: Sequence[str]
    """Names that its results get."""


#: A tensor by its name, or a number in terms of the chain's arguments.
Result = str | Number | None


def kernel_name(wrapper: int, name: str) -> str:
    """What the chain calls the kernel ``name`` of a wrapper: other wrappers may have another of that name."""
    return f"{name}_of_{wrapper}"


def chained(
    wrappers: Sequence[Reader], links: Sequence[Link], arguments: Sequence[str], results: Sequence[Result]
) -> WrapperCode:
    """What a wrapper would do that takes ``arguments``, makes the calls ``links`` and returns ``results``.

    Raises:
        NotReadError: a wrapper uses a constant of its module, or returns a number or one of its arguments.
    """
    chain = _Chain(links, arguments, results)
    for number, link in enumerate(links):
        chain.add(number, link, wrappers[link.wrapper])
    return chain.finished(results)


class _Chain:
    def __init__(self, links: Sequence[Link], arguments: Sequence[str], results: Sequence[Result]) -> None:
        self.made = Reader()
        self.made.code.arguments = list(arguments)
        self.values = {name: Place(name, 0, None, name) for name in arguments}
        self.last = {name: number for number, link in enumerate(links) for name in link.given}
        self.last |= {name: len(links) for name in results if isinstance(name, str)}
        self.seen = dict[str, set[str]]()
        """Names of what shows the memory of each buffer that was returned."""

    def add(self, number: int, link: Link, read: Reader) -> None:
        """One call, and the end of what nothing behind it is given."""
        renamed = {memory: f"{memory}_in_{number}" for memory in read.sizes}
        bound = dict(zip(read.code.arguments, (self.values[name] for name in link.given), strict=True))
        bound |= {memory: Place(name, 0, None, name) for memory, name in renamed.items()}
        self.made.sizes |= {renamed[memory]: size for memory, size in read.sizes.items()}
        self.made.allocations |= {renamed[memory]: text for memory, text in read.allocations.items()}
        self.made.events += [(renamed[memory], comes) for memory, comes in read.events]
        for call in read.code.calls:
            args = [_given(arg, bound, self.made.code) for arg in call.args]
            self.made.code.calls.append(KernelCall(kernel_name(link.wrapper, call.name), args))
        for name, place in zip(link.returned, read.code.results, strict=True):
            if not isinstance(place, Place) or place.memory not in renamed:
                raise NotReadError(f"{name}, which is no buffer of the part that returns it")
            self.values[name] = _moved(place, bound)
            self.seen.setdefault(renamed[place.memory], set()).add(name)
        self._drop(number)

    def _drop(self, number: int) -> None:
        for memory, names in list(self.seen.items()):
            if all(self.last.get(name, number) <= number for name in names):
                self.made.events.append((memory, False))
                del self.seen[memory]

    def finished(self, results: Sequence[Result]) -> WrapperCode:
        self.made.code.results = [self.values[each] if isinstance(each, str) else each for each in results]
        return self.made.planned()


def _given(arg: Place | Size | int, bound: Mapping[str, Place], chain: WrapperCode) -> Place | Size | int:
    if isinstance(arg, Size):
        given = bound[arg.argument]
        return Size(given.memory) if arg.dim is None else size_of(given, arg.dim, chain)
    return _moved(arg, bound) if isinstance(arg, Place) else arg


def _moved(place: Place, bound: Mapping[str, Place]) -> Place:
    to = bound.get(place.memory)
    if to is None:
        raise NotReadError(f"{place.memory}, which is a constant of one part")
    python = re.sub(rf"\b{place.memory}\b", to.python, place.python)
    return Place(to.memory, to.offset + place.offset, place.itemsize, python)


def layout(place: Place | Number | None, read: Reader) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """(size, stride) of a result of a wrapper; None if it is no buffer of its own."""
    if not isinstance(place, Place) or place.memory not in read.allocations:
        return None
    node = ast.parse(place.python, mode="eval").body
    if isinstance(node, ast.Call):  # reinterpret_tensor(of, size, stride, offset)
        size, stride = node.args[1:3]
    else:
        allocation = ast.parse(read.allocations[place.memory], mode="eval").body
        assert isinstance(allocation, ast.Call)  # empty_strided_cpu(size, stride, dtype)
        size, stride = allocation.args[:2]
    return ast.literal_eval(size), ast.literal_eval(stride)
