"""What the CPU kernels' sources have in common: C++ types, constants of one problem, the entry point."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath

import torch
from torch import Tensor

from xquant_fx.kernels.cpu.isa import Isa

CTYPES = {
    torch.float32: "float", torch.bfloat16: "xq::bfloat16", torch.float16: "xq::float16",
    torch.bool: "uint8_t", torch.int32: "int32_t", torch.int64: "int64_t",
}  # fmt: skip

SIMD = "cpu/simd.h"
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
    return "namespace xq {\n" + "\n".join(lines) + "\n}  // namespace xq\n"


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


def assemble(isa: Isa, fixed: str, file: str, params: Iterable[tuple[str, str]], body: Iterable[str]) -> str:
    """The whole source of ``kernel(params)`` for the vectors of ``isa``: ``params`` are (type, name)."""
    signature = ", ".join(f"{kind} {name}" for kind, name in params)
    entry = "\n".join(["", f'extern "C" void kernel({signature}) {{', *(f"    {line}" for line in body), "}", ""])
    return f"#define {isa.macro}\n" + with_headers(SIMD, isa, set()) + fixed + with_headers(file, isa, set()) + entry


def example(fixed: str) -> str:
    """A header that stands in front of a kernel's ``cpu.cpp`` where an editor opens it alone."""
    return (
        "// One problem's constants, so that editors can read cpu.cpp. Written by tests/test_cpu_source.py.\n"
        f'#pragma once\n#include "../{SIMD}"\n\n{fixed}'
    )
