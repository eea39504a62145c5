"""Inductor's checks of indices in C++, which torch 2.11 and 2.12 may write in front of the index.

They put a check among the loads of a kernel, even if the index has its name already further down, among what is
computed. transformers' masks do so: they read ``attention_mask[kv_index]`` behind ``kv_index <= q_index``. Where the
mask's length is no constant (a cache that grows), that is no C++. From torch 2.13 on such a check follows its index.

Private torch APIs, all of them here: ``CppKernel.check_bounds``, its ``loads``, ``compute``, ``cse`` and
``rename_indexing``, ``cexpr``, ``free_symbol_is_type``. Checked on torch 2.11.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

#: Inductor does it right by itself.
RIGHT = torch.__version__ >= "2.13"


@contextlib.contextmanager
def checks_behind_indices() -> Iterator[None]:
    """Code that Inductor writes inside checks indices after they are computed."""
    if RIGHT:
        yield
        return
    from torch._inductor.codegen.cpp import CppKernel

    inductors: Any = CppKernel.check_bounds
    overwritten: Any = CppKernel  # mypy: assigning to a method

    def check_bounds(kernel: Any, expr: Any, *args: Any) -> None:
        loads = kernel.loads
        if _is_computed(kernel, expr):
            kernel.loads = kernel.compute
        try:
            inductors(kernel, expr, *args)
        finally:
            kernel.loads = loads

    overwritten.check_bounds = check_bounds
    try:
        yield
    finally:
        overwritten.check_bounds = inductors


def _is_computed(kernel: Any, expr: Any) -> bool:
    """Whether ``expr`` has a name already; what was loaded as an index is checked behind that, by Inductor itself."""
    from torch._inductor.codegen.cpp_utils import cexpr
    from torch.utils._sympy.symbol import SymT, free_symbol_is_type

    known = kernel.cse.try_get(cexpr(kernel.rename_indexing(expr)))
    return known is not None and not free_symbol_is_type(expr, SymT.TMP)
