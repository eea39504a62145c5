"""Run a C++ kernel for 64-bit ARM on another processor: a cross compiler, and qemu for the program."""

from __future__ import annotations

import functools
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor

COMPILER, QEMU = "aarch64-linux-gnu-g++", "qemu-aarch64"
FLAGS = ("-O2", "-std=c++17", "-static", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas")
PROGRAMS = tempfile.TemporaryDirectory(prefix="xquant-arm-")  # removed when Python ends

MAIN = """
#include <fstream>
#include <iterator>
#include <string>
#include <vector>
int main(int, char** argv) {{
    std::vector<std::vector<char>> tensors;
    for (int i = 0; i < {count}; i++) {{
        std::ifstream file(argv[1] + ("/" + std::to_string(i)), std::ios::binary);
        tensors.emplace_back(std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>());
    }}
    kernel({arguments});
    for (int i = 0; i < {count}; i++) {{
        std::ofstream file(argv[1] + ("/" + std::to_string(i)), std::ios::binary);
        file.write(tensors[i].data(), tensors[i].size());
    }}
}}
"""


def missing() -> str:
    """What is not installed, or nothing."""
    return ", ".join(program for program in (COMPILER, QEMU) if shutil.which(program) is None)


@functools.cache
def program(types: tuple[str, ...], code: str, flags: tuple[str, ...]) -> Path:
    """A program that reads the kernel's arguments from files of a folder, and writes them back."""
    folder = Path(tempfile.mkdtemp(dir=PROGRAMS.name))
    pointers = [f"({kind})" if kind.endswith("*") else f"*({kind}*)" for kind in types]
    arguments = ", ".join(f"{pointer}tensors[{i}].data()" for i, pointer in enumerate(pointers))
    (folder / "kernel.cpp").write_text(code + MAIN.format(count=len(types), arguments=arguments))
    command = [COMPILER, *FLAGS, *flags, str(folder / "kernel.cpp"), "-o", str(folder / "program")]
    made = subprocess.run(command, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    return folder / "program"


def run(types: tuple[str, ...], code: str, tensors: list[Tensor], flags: tuple[str, ...]) -> None:
    """Call ``kernel``, which changes the contiguous ``tensors`` that are not const for it; a number is one, too."""
    binary = program(types, code, flags)
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, str(i)) for i in range(len(tensors))]
        for file, tensor in zip(files, tensors, strict=True):
            assert tensor.is_contiguous()
            file.write_bytes(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
        subprocess.run([QEMU, str(binary), folder], check=True)
        for file, tensor, kind in zip(files, tensors, types, strict=True):
            if not kind.startswith("const"):
                tensor.copy_(torch.frombuffer(bytearray(file.read_bytes()), dtype=tensor.dtype).view(tensor.shape))
