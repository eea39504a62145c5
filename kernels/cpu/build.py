"""Compile C++ kernels with Inductor's builder, outside a compiled graph.

Private torch APIs: ``CppPythonBindingsCodeCache.load_pybinding`` and ``pick_vec_isa``. Checked on
torch 2.11, 2.13 and 2.14.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch._inductor.codecache import CppPythonBindingsCodeCache
from torch._inductor.cpu_vec_isa import invalid_vec_isa, pick_vec_isa


@functools.cache
def lanes() -> int:
    """32-bit lanes of the widest vectors that Inductor uses on this machine: 16, 8 or 4."""
    isa = pick_vec_isa()
    width = 0 if isa == invalid_vec_isa else isa.bit_width()
    name = str(isa)
    return {512: 16, 256: 8}.get(width, 4) if name.startswith(("avx", "amx")) else 4


@functools.cache
def load(types: tuple[str, ...], code: str) -> Callable[..., Any]:
    """The function ``kernel`` of ``code``, which takes tensors for its pointers."""
    return CppPythonBindingsCodeCache.load_pybinding(list(types), code)
