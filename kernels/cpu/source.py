"""What the CPU kernels' sources have in common: C++ types, constants of one problem, the entry point."""

from __future__ import annotations

import functools
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path, PurePosixPath

import torch
from torch import Tensor

from xquant_fx.kernels.arguments import Arguments, Overload
from xquant_fx.kernels.cpu.isa import Isa
from xquant_fx.kernels.cpu.kept_call import for_this_machine
from xquant_fx.kernels.rotation import rotated_size, signs

CTYPES = {
    torch.float32: "float", torch.bfloat16: "xq::bfloat16", torch.float16: "xq::float16",
    torch.bool: "uint8_t", torch.uint8: "uint8_t", torch.int32: "int32_t", torch.int64: "int64_t",
}  # fmt: skip

SIMD = "cpu/simd.h"
#: Inductor compiles what names this with the flags of its own kernels, so where it compiles one of ours itself, with
#: the header that it has precompiled for those (else ``build.py`` has another).
_FLAGS = "// Not used here: at::vec::\n"
EXAMPLE = "example_problem.h"  # beside each kernel's cpu.cpp
_INCLUDE = re.compile(r'^#include "(.+)"\n', re.MULTILINE)


def sizes_of(x: Tensor) -> tuple[int, ...]:
    """A tensor's shape."""
    return tuple(x.shape)


def dtype_of(x: Tensor) -> torch.dtype:
    """A tensor's dtype."""
    return x.dtype


@functools.cache
def text(name: str) -> str:
    """A C++ file, by its path in ``kernels/``."""
    return (Path(__file__).parents[1] / name).read_text()


def definitions(
    numbers: Mapping[str, int], floats: Mapping[str, float], flags: Mapping[str, bool], types: Mapping[str, torch.dtype]
) -> str:
    """Definitions, in the kernels' namespace, of what is fixed when a kernel is compiled."""
    lines = [f"constexpr int64_t {name} = {value};" for name, value in numbers.items()]
    lines += [f"constexpr float {name} = (float){float(value)!r};" for name, value in floats.items()]
    lines += [f"constexpr bool {name} = {int(value)};" for name, value in flags.items()]
    lines += [f"using {name} = {CTYPES[dtype]};" for name, dtype in types.items()]
    return namespace("\n".join(lines) + "\n")


def namespace(text: str) -> str:
    """C++ ``text`` in the kernels' namespace."""
    return f"namespace xq {{\n{text}}}  // namespace xq\n"


def sign_table(dim: int) -> str:
    """Signs and scale of the rotation of ``dim`` channels."""
    return (
        array("float", "ROTATION_SIGNS", [f"{sign}f" for sign in signs(dim)])
        + f"constexpr float ROTATION_SCALE = {rotated_size(dim) ** -0.5!r}f;\n"
    )


def array(kind: str, name: str, values: Sequence[str]) -> str:
    """The definition of a constant array."""
    return f"constexpr {kind} {name}[] = {{{', '.join(values)}}};\n"


def with_headers(file: str, isa: Isa, included: set[str]) -> str:
    """A C++ file with its own headers in their places, each once: of the ISAs' headers that of ``isa``, no example."""

    def header(match: re.Match[str]) -> str:
        path = str(PurePosixPath(file).parent / match[1])
        other_isa = match[1].startswith("simd_") and match[1] != isa.header
        if other_isa or match[1] == EXAMPLE or path in included:
            return ""
        included.add(path)
        return with_headers(path, isa, included)

    return _INCLUDE.sub(header, text(file).replace("#pragma once\n", ""))


def pointers(arguments: type[Arguments], overload: Overload) -> dict[str, str]:
    """C++ type of a pointer to each tensor argument, by name; const where the op does not write."""
    found = {}
    for p in arguments.parameters(overload):
        if p.elements is not None:
            built_in = p.elements.kind == "float" or p.elements.kind.endswith("_t")
            kind = p.elements.kind if built_in else f"xq::{p.elements.kind}"
            found[p.name] = f"{kind}*" if p.elements.written else f"const {kind}*"
    return found


def structs(tensors: Mapping[str, str], sizes: Sequence[str]) -> str:
    """``xq::Tensors``, whose members are the tensor arguments of an op, and ``xq::Sizes``, the numbers behind them."""
    members = "".join(f"    {kind} {name};\n" for name, kind in tensors.items())
    return namespace(f"struct Tensors {{\n{members}}};\nstruct Sizes {{\n    int64_t {', '.join(sizes)};\n}};\n")


def assemble(
    isa: Isa,
    fixed: str,
    file: str,
    function: str,
    tensors: Mapping[str, str],
    absent: Collection[str],
    outputs: Mapping[str, str],
    sizes: Sequence[str],
    *,
    by_row: bool,
) -> tuple[tuple[str, ...], str]:
    """(argument types, whole source of ``kernel``), for the vectors of ``isa``.

    ``kernel`` takes the tensors that are not ``absent``, the outputs and ``sizes``, and calls
    ``function(Tensors, Sizes, outputs...)`` of ``file``, where what is absent is null; ``by_row`` once per row of the
    batch: it takes the numbers of ``rows.row_loop`` last.
    """
    given = {**{name: kind for name, kind in tensors.items() if name not in absent}, **outputs}
    at = {name: f"{name} + row * {name}_pitch" if by_row else name for name in given}
    members = ", ".join(at.get(name, "nullptr") for name in tensors)
    arguments = [f"{{{members}}}", "{" + ", ".join(sizes) + "}", *(at[name] for name in outputs)]
    call = f"xq::{function}({', '.join(arguments)});"
    entry = f"for (int64_t row = 0; row < rows; row++) {call}" if by_row else call
    numbers = [*sizes, *(["rows", *(f"{name}_pitch" for name in given)] if by_row else [])]
    given |= dict.fromkeys(numbers, "int64_t")
    return whole_source(isa, fixed + structs(tensors, sizes), file, given, entry)


def whole_source(isa: Isa, fixed: str, file: str, given: Mapping[str, str], entry: str) -> tuple[tuple[str, ...], str]:
    """(argument types, whole source of ``kernel``): ``file`` behind ``fixed``; ``kernel`` takes ``given``."""
    signature = ", ".join(f"{kind} {name}" for name, kind in given.items())
    parts = (
        for_this_machine(),
        f"#define {isa.macro}\n",
        _FLAGS if isa.name.startswith("avx") else "",
        with_headers(SIMD, isa, set()),
        fixed,
        with_headers(file, isa, set()),
    )
    code = "".join(parts) + f'\nextern "C" void kernel({signature}) {{\n    {entry}\n}}\n'
    return tuple(given.values()), code


def example(fixed: str, tensors: Mapping[str, str], sizes: Sequence[str]) -> str:
    """A header that stands in front of a kernel's ``cpu.cpp`` where an editor opens it alone."""
    return (
        "// One problem's constants, so that editors can read cpu.cpp. Written by tests/test_cpu_source.py.\n"
        f'#pragma once\n#include "../{SIMD}"\n\n{fixed}' + (f"\n{structs(tensors, sizes)}" if tensors else "")
    )
