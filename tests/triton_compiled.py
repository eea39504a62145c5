"""Compile Triton kernels for chips that are not here, and read what they need of them.

``launches`` runs host code on meta tensors and records which kernels it would launch with what;
``compiled`` compiles such a launch as the JIT would on the chip. Checked on Triton 3.6 and 3.9.
"""

from __future__ import annotations

import dataclasses
import re
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

POINTERS = {
    torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int32: "*i32", torch.int64: "*i64",
    torch.bool: "*i1", torch.uint8: "*u8",
}  # fmt: skip

#: name -> (backend, architecture, threads of a warp, most shared memory of a program in bytes)
CHIPS = {
    "sm_80": ("cuda", 80, 32, 163 * 1024),
    "sm_90": ("cuda", 90, 32, 227 * 1024),
    "gfx942": ("hip", "gfx942", 64, 64 * 1024),
}


@dataclasses.dataclass
class Launch:
    """A kernel with its arguments by name, the options of the compiler, and how many programs there are."""

    kernel: Any
    arguments: dict[str, Any]
    options: dict[str, int]
    grid: tuple[int, ...]


def launches(host: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Launch]:
    """What ``host(*args, wrap=..., **kwargs)`` launches."""
    found: list[Launch] = []

    class Recorder:
        def __init__(self, kernel: Any) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: Any) -> Callable[..., None]:
            def record(*args: Any, **kwargs: Any) -> None:
                options = {name: kwargs.pop(name) for name in ("num_warps", "num_stages") if name in kwargs}
                given = dict(zip(self.kernel.arg_names, args, strict=False))
                found.append(Launch(self.kernel, {**given, **kwargs}, options, grid))

            return record

    host(*args, wrap=Recorder, **kwargs)
    return found


@dataclasses.dataclass
class Needs:
    """What a compiled kernel takes of the chip, registers and spills a thread, shared memory a program."""

    registers: int
    spilled: int
    shared: int
    matrix_products: int
    asm: dict[str, Any] = dataclasses.field(repr=False)


def compiled(launch: Launch, chip: str) -> Needs:
    """Compile ``launch`` for ``chip``."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    backend, arch, threads, _ = CHIPS[chip]
    signature, constants, aligned = {}, {}, {}
    for i, name in enumerate(launch.kernel.arg_names):
        value = launch.arguments[name]
        if isinstance(value, Tensor):
            signature[name], aligned[(i,)] = POINTERS[value.dtype], [["tt.divisibility", 16]]
        else:
            signature[name], constants[name] = "constexpr", value
    source = ASTSource(fn=launch.kernel, signature=signature, constexprs=constants, attrs=aligned)
    kernel = triton.compile(source, target=GPUTarget(backend, arch, threads), options=dict(launch.options))
    if backend == "cuda":
        return _of_cubin(kernel)
    text = kernel.asm["amdgcn"]
    number = {name: int(n) for name, n in re.findall(r"\.(\w+):\s+(\d+)", text)}
    products = len(re.findall(r"\bv_mfma_", text))
    return Needs(number["vgpr_count"], number["vgpr_spill_count"], kernel.metadata.shared, products, kernel.asm)


def _of_cubin(kernel: Any) -> Needs:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(kernel.asm["cubin"])
        command = [tool, "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    number = {name: int(n) for name, n in re.findall(r"(REG|STACK):(\d+)", text)}
    products = len(re.findall(r"\b(?:mma\.sync|wgmma\.mma_async)", kernel.asm["ptx"]))
    return Needs(number["REG"], number["STACK"], kernel.metadata.shared, products, kernel.asm)
