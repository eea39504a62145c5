"""Compile C++ kernels with Inductor's builder, outside a compiled graph.

Private torch APIs: ``CppPythonBindingsCodeCache.load_pybinding``, its ``_load_library_inner`` and
``_get_uncompiled_header``, ``AsyncCompile.submit``, ``pick_vec_isa`` and ``get_cpp_compiler``. Checked on torch 2.11
and 2.13, but for the header on 2.14, too.
"""

from __future__ import annotations

import concurrent.futures
import contextvars
import functools
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from torch._inductor.async_compile import AsyncCompile, get_compile_threads
from torch._inductor.codecache import CppPythonBindingsCodeCache
from torch._inductor.cpp_builder import get_cpp_compiler
from torch._inductor.cpu_vec_isa import pick_vec_isa
from torch._inductor.exc import CppCompileError, InvalidCxxCompiler

from xquant_fx.kernels.cpu.isa import Isa, named_by_inductor

log = logging.getLogger(__name__)
CompileError = CppCompileError
T = TypeVar("T")


#: The header that is precompiled for kernels of ours. Torch's, which is twice as large, adds a second to each.
_HEADER = Path(__file__).with_name("standard.h")
_INCLUDES_TORCH = "#include <torch/"
#: A kernel that does nothing: what is asked for it is asked for all.
_NOTHING = 'extern "C" void kernel() {}'


class OwnKernels(CppPythonBindingsCodeCache):
    """Inductor's builder of C++ kernels, for those that include nothing of torch's."""

    @classmethod
    def _get_uncompiled_header(cls, device: str) -> str | None:
        return str(_HEADER)


_begun: list[concurrent.futures.Future[Any]] = []
if hasattr(os, "register_at_fork"):  # a child has none of the threads that would end them
    os.register_at_fork(after_in_child=_begun.clear)


def begin_probes() -> None:
    """Find out in the background, once, what Inductor asks before its first kernel; nothing if there is one thread.

    Which instruction sets the compiler and this machine have (six processes), and a hash of torch's header (the
    preprocessor): 1.3 s with all of it in the cache, 5 with nothing, in which Python traces and lowers.
    """
    if not _begun and get_compile_threads() > 1:
        ask = functools.partial(CppPythonBindingsCodeCache.load_pybinding_async, [], _NOTHING)
        _begun.append(AsyncCompile.submit(functools.partial(contextvars.copy_context().run, ask)))


@functools.cache
def isa() -> Isa:
    """The instruction set of the widest vectors that Inductor uses on this machine."""
    concurrent.futures.wait(_begun)  # or both would ask
    return named_by_inductor(str(pick_vec_isa()))


def isa_is_known() -> bool:
    """Whether ``isa()`` has been asked already, or replaced."""
    info = getattr(isa, "cache_info", None)
    return info is None or bool(info().currsize)


@functools.cache
def has_compiler() -> bool:
    """Whether there is a C++ compiler here."""
    try:
        return bool(get_cpp_compiler())
    except InvalidCxxCompiler:
        return False


def _builder(code: str) -> type[CppPythonBindingsCodeCache]:
    return CppPythonBindingsCodeCache if _INCLUDES_TORCH in code else OwnKernels


def mended(load: Callable[[], T]) -> T:
    """What ``load`` gives, which builds a library if its file is not there; one that is damaged is built again.

    A compiler that is killed leaves half a file, and Inductor goes by whether there is one.
    """
    try:
        return load()
    except ImportError as error:
        if not error.path or not os.path.exists(error.path):
            raise
        log.warning("a compiled kernel is damaged and is built again: %s", error)
        Path(error.path).unlink(missing_ok=True)  # another process may have found it, too
        return load()


@functools.cache
def load(types: tuple[str, ...], code: str) -> Callable[..., Any]:
    """The function ``kernel`` of ``code``, which takes tensors for its pointers."""
    return mended(functools.partial(_builder(code).load_pybinding, list(types), code))


@functools.cache
def begin_kernel(types: tuple[str, ...], code: str) -> None:
    """Compile ``code`` in the background, once, for one who loads it later; does nothing if there is one thread."""
    if get_compile_threads() > 1:
        load_async = functools.partial(
            _builder(code).load_pybinding_async, list(types), code, submit_fn=AsyncCompile.submit
        )
        AsyncCompile.submit(functools.partial(contextvars.copy_context().run, load_async))


def function_in(library: str) -> Callable[..., Any]:
    """The function ``kernel`` in the file that ``load`` had built, by the name that ``load`` would give it."""
    module: Any = CppPythonBindingsCodeCache._load_library_inner(library, Path(library).stem)
    function: Callable[..., Any] = module.kernel
    return function
