"""Who traces what: functions that Dynamo leaves alone, and ops that are traced for a compiler.

Relied on: FunctionalTensor, FakeTensor (torch 2.11, 2.13), ``_len_torch_dispatch_stack``, ``_dispatch_keys``,
``_get_tracing_state`` and ``_profiler_enabled`` (2.13).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.autograd.profiler import record_function

F = TypeVar("F", bound=Callable[..., Any])

_PLAIN = (Tensor, torch.nn.Parameter)
_KEYS = torch._C.DispatchKey
#: What torch's dispatcher knows of a tensor with numbers in a CPU's memory, and of no other.
_ORDINARY = functools.reduce(
    torch._C.DispatchKeySet.add,
    (_KEYS.AutogradCPU, _KEYS.ADInplaceOrView, _KEYS.AutocastCPU),
    torch._C.DispatchKeySet(_KEYS.CPU),
).raw_repr()


def not_traced(reason: str) -> Callable[[F], F]:
    """``torch.compiler.disable``, which would lose the function's types: Dynamo traces neither it nor what it calls."""
    return cast(Callable[[F], F], functools.partial(torch.compiler.disable, reason=reason))


def is_traced(x: Tensor) -> bool:
    """True under AOTAutograd, where an op that stays whole is lowered by Inductor; False in eager code."""
    return isinstance(x, FunctionalTensor | FakeTensor)


def is_watched(*tensors: Tensor | None) -> bool:
    """Whether an op of these must go through torch's dispatcher, which takes longer than a small kernel on a CPU.

    So it is where a profiler looks on, or ``is_transformed`` says so.
    """
    return torch._C._autograd._profiler_enabled() or is_transformed(*tensors)


def is_transformed(*tensors: Tensor | None) -> bool:
    """Whether an op of these must be the dispatcher's, which other kernels than its own do without.

    So it is where the op is traced, where a mode looks on, and where a tensor is another type's or a transform's
    (``torch.vmap``), has no numbers in memory or other ones (a negated view), or wants a gradient.
    """
    if torch._C._len_torch_dispatch_stack() or torch._C._get_tracing_state():
        return True
    wants_gradients = torch.is_grad_enabled()
    return any(not _is_plain(x) or (wants_gradients and x.requires_grad) for x in tensors if x is not None)


def shown(name: str) -> AbstractContextManager[Any]:
    """Shows what runs in it to a profiler, if there is one: a kernel that is no op of the dispatcher's."""
    return record_function(name) if torch._C._autograd._profiler_enabled() else nullcontext()


def _is_plain(x: Tensor) -> bool:
    return type(x) in _PLAIN and not torch._C._dispatch_keys(x).raw_repr() & ~_ORDINARY
