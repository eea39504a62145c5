"""C++ kernels that uncompiled code runs: those that were built before, by this process or another, are found at once.

To find a library Inductor asks first what compiler and machine can do, a second in each process, and is imported for
it. So the library that a source became is noted beside Inductor's files. It is looked for by the source for the
instructions that torch says this processor has; Inductor's word is taken where it has been asked already.

Who runs a kernel must not depend on whether it is there: the same tokens are to give the same numbers.
"""

from __future__ import annotations

import contextlib
import hashlib
import sys
from collections.abc import Callable, Hashable, Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch

from xquant_fx.kernels.cpu.isa import ISAS, Isa
from xquant_fx.kernels.cpu.kept_call import KeptCall, folder, keep, machine, restored_kernel

Source = Callable[[Any, Isa], tuple[tuple[str, ...], str]]
Kernel = Callable[..., Any]

#: What ``get_cpu_capability`` says to the ISA that Inductor chooses there.
_CAPABILITIES = {"AVX512": "avx512", "AVX2": "avx2", "DEFAULT": "neon" if machine()[2] == "aarch64" else "portable"}

_found = dict[tuple[Source, Hashable, str], Kernel]()
_missing = set[tuple[Source, Hashable, str]]()
_wanted = ContextVar("kernels_wanted", default=False)


@contextlib.contextmanager
def wanted() -> Iterator[None]:
    """Inside, code of a compiled model runs uncompiled: kernels are worth waiting for, since its steps need most."""
    before = _wanted.set(True)
    try:
        yield
    finally:
        _wanted.reset(before)


def are_wanted() -> bool:
    """Whether that is so."""
    return _wanted.get()


def can_be_built(source: Source, problem: Hashable) -> bool:
    """Whether there is the kernel of ``source(problem, isa)``, or a compiler for it."""
    if at_hand(source, problem) is not None:
        return True
    from xquant_fx.kernels.cpu import build  # brings in Inductor's compiler

    return build.has_compiler()


def at_hand(source: Source, problem: Hashable) -> Kernel | None:
    """The kernel of ``source(problem, isa)``, if it was built before; asks no compiler."""
    isa = _isa()
    key = (source, problem, isa.name)
    if key not in _found and key not in _missing:
        kernel = restored_kernel(_file(*source(problem, isa)))
        if kernel is None:
            _missing.add(key)
            return None
        _found[key] = kernel
    return _found.get(key)


def built(source: Source, problem: Hashable) -> Kernel:
    """The kernel of ``source(problem, isa)``; raises CompileError if the compiler fails."""
    if (kernel := at_hand(source, problem)) is not None:
        return kernel
    from xquant_fx.kernels.cpu import build  # brings in Inductor's compiler

    types, code = source(problem, build.isa())
    kernel = build.load(types, code)
    note(types, code, kernel)
    return _found.setdefault((source, problem, build.isa().name), kernel)


def note(types: tuple[str, ...], code: str, kernel: Kernel) -> None:
    """Note the library of a kernel that was built from ``code``."""
    file = getattr(getattr(kernel, "__self__", None), "__file__", None)
    if file is not None and not (place := _file(types, code)).exists():
        keep(KeptCall([], str(file), []), place)
    _missing.clear()


def _isa() -> Isa:
    build = sys.modules.get("xquant_fx.kernels.cpu.build")
    if build is not None and build.isa_is_known():
        known: Isa = build.isa()
        return known
    return ISAS[_CAPABILITIES.get(torch.backends.cpu.get_cpu_capability(), "portable")]


def _file(types: tuple[str, ...], code: str) -> Path:
    text = repr((machine(), types, code))
    return folder() / "kernels" / f"{hashlib.sha256(text.encode()).hexdigest()}.json"
