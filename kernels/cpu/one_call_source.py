"""The C++ function that calls all kernels of a graph (``one_call.py``), as text."""

from __future__ import annotations

from typing import NamedTuple

from xquant_fx.kernels.cpu.wrapper_code import KernelCall, Place, Size, WrapperCode


class Kernels(NamedTuple):
    """Where the kernels are that one function calls."""

    elsewhere: list[str]
    """Names of those in libraries of their own, whose addresses it gets."""
    here: dict[str, tuple[str, ...]]
    """Those in the same source (``one_unit.unit``), in order, with the C++ types of their arguments."""


#: For what follows in the file, the function and its Python binding, each of which runs once a step: a second less of
#: the compiler, which nothing overlaps.
_QUICKLY = '#pragma GCC optimize("O1")\n'


def source(code: WrapperCode, kernels: Kernels, tensors: list[str], sizes: list[str]) -> tuple[tuple[str, ...], str]:
    """(argument types, C++ source of ``kernel``): the kernels' addresses, scratch memory, ``tensors``, ``sizes``."""
    given = {memory: f"t{i}" for i, memory in enumerate(tensors)} | {size: f"n{i}" for i, size in enumerate(sizes)}
    types = ("const int64_t*", "uint8_t*", *("uint8_t*" for _ in tensors), *("int64_t" for _ in sizes))
    names = ("kernels", "scratch", *given.values())
    lines = [f"    {_cpp(call, kernels, code, given)}\n" for call in code.calls]
    signature = ", ".join(f"{kind} {name}" for kind, name in zip(types, names, strict=True))
    entry = f'extern "C" void kernel({signature}) {{\n{"".join(lines)}}}\n'
    return types, f"#include <cstdint>\n{_QUICKLY}{entry}"


def _cpp(call: KernelCall, kernels: Kernels, code: WrapperCode, names: dict[str, str]) -> str:
    given = [_cpp_argument(arg, code, names) for arg in call.args]
    if call.name in kernels.here:
        cast = ", ".join(f"({kind})({arg})" for kind, arg in zip(kernels.here[call.name], given, strict=True))
        return f"unit_{[*kernels.here].index(call.name)}::kernel({cast});"
    kinds = ", ".join("void*" if isinstance(arg, Place) else "int64_t" for arg in call.args)
    return f"((void (*)({kinds}))kernels[{kernels.elsewhere.index(call.name)}])({', '.join(given)});"


def _cpp_argument(arg: Place | Size | int, code: WrapperCode, names: dict[str, str]) -> str:
    if isinstance(arg, int):
        return f"{arg}L"
    if isinstance(arg, Size):
        return names[arg.python]
    if arg.memory in code.offsets:
        return f"scratch + {code.offsets[arg.memory] + arg.offset}"
    return f"{names[arg.memory]} + {arg.offset}"
