"""What the CPU kernels' sources have in common: C++ types, constants of one problem, the entry point."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

CTYPES = {
    torch.float32: "float", torch.bfloat16: "xq::bfloat16", torch.float16: "xq::float16",
    torch.bool: "uint8_t", torch.int32: "int32_t", torch.int64: "int64_t",
}  # fmt: skip


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


def assemble(lanes: int, fixed: str, file: str, params: Iterable[tuple[str, str]], body: Iterable[str]) -> str:
    """The whole source of ``kernel(params)``, for vectors of ``lanes`` 32-bit lanes: ``params`` are (type, name)."""
    signature = ", ".join(f"{kind} {name}" for kind, name in params)
    entry = "\n".join(["", f'extern "C" void kernel({signature}) {{', *(f"    {line}" for line in body), "}", ""])
    return f"#define XQ_LANES {lanes}\n" + text("cpu/simd.h") + fixed + text(file) + entry
