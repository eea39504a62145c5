"""C++ kernels that uncompiled code runs: those that were built before, by this process or another, are found at once.

To find a library Inductor asks first what compiler and machine can do, a second in each process, and is imported for
it. So the library that a source became is noted beside Inductor's files. It is looked for by the source for the
instructions that torch says this processor has; Inductor's word is taken where it has been asked already.

Where there is a compiler, who runs a kernel must not depend on whether it is there: the same tokens are to give the
same numbers.
"""

from __future__ import annotations

import contextlib
import hashlib
import sys
from collections.abc import Callable, Hashable, Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any, TypeVar, cast

import torch

from xquant_fx.kernels.cpu.isa import ISAS, Isa
from xquant_fx.kernels.cpu.kept_call import KeptCall, folder, keep, machine, restored_kernel
from xquant_fx.warn_once import warn_once

Source = Callable[[Any, Isa], tuple[tuple[str, ...], str]]
Kernel = Callable[..., Any]
Run = TypeVar("Run", bound=Callable[..., Any])

#: What ``get_cpu_capability`` says to the ISA that Inductor chooses there; of ARM's it is one for all.
_CAPABILITIES = {"AVX512": "avx512", "AVX2": "avx2"}
_OTHERWISE = "neon" if machine()[2] in ("aarch64", "arm64") else "portable"

_found = dict[tuple[Source, Hashable, str], Kernel]()
_missing = set[tuple[Source, Hashable, str]]()
_wanted = ContextVar("kernels_wanted", default=False)
_failed: list[bool] = []
_FAILS = "the C++ compiler fails"


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


def as_wanted(run: Run) -> Run:
    """``run`` inside ``wanted()``."""

    def inside(*args: Any) -> Any:
        with wanted():
            return run(*args)

    return cast(Run, inside)


def why_none(source: Source, problem: Hashable) -> str:
    """Why there cannot be the kernel of ``source(problem, isa)``, in words; "" if there is: it is built, if need be.

    That the compiler fails is told once, and not tried again.
    """
    if has_failed():
        return _FAILS
    if at_hand(source, problem) is not None:
        return ""
    from xquant_fx.kernels.cpu import build  # brings in Inductor's compiler

    if not build.has_compiler():
        return "no C++ compiler"
    try:
        built(source, problem)
    except (build.CompileError, OSError, ImportError) as error:  # the folder cannot be written to, or loaded from
        note_failure(error)
        return _FAILS
    return ""


def note_failure(error: Exception) -> None:
    """Tell, once, that a kernel cannot be built; none is tried again."""
    _failed.append(True)
    warn_once(f"uncompiled code stays slow with quantized caches, as {_FAILS}: {error}", key="uncompiled kernels")


def has_failed() -> bool:
    """Whether that was so."""
    return bool(_failed)


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
    build = sys.modules.get("xquant_fx.kernels.cpu.build")  # which another thread may be importing
    is_known = getattr(build, "isa_is_known", None)
    if build is not None and is_known is not None and is_known():
        known: Isa = build.isa()
        return known
    return ISAS[_CAPABILITIES.get(torch.backends.cpu.get_cpu_capability(), _OTHERWISE)]


def _file(types: tuple[str, ...], code: str) -> Path:
    from torch._inductor import config

    flags = sorted((k, repr(v)) for k, v in config.save_config_portable().items() if k.startswith("cpp."))
    text = repr((machine(), flags, types, code))
    # Beside the steps that are kept: where there is a folder of those, some are expected.
    return folder().with_name("xquant_kernels") / f"{hashlib.sha256(text.encode()).hexdigest()}.json"
