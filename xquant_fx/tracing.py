"""Who traces what: functions that Dynamo leaves alone, and ops that are traced for a compiler.

Relied on: FunctionalTensor, FakeTensor (torch 2.11, 2.13), ``_len_torch_dispatch_stack`` (2.13).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

F = TypeVar("F", bound=Callable[..., Any])


def not_traced(reason: str) -> Callable[[F], F]:
    """``torch.compiler.disable``, which would lose the function's types: Dynamo traces neither it nor what it calls."""
    return cast(Callable[[F], F], functools.partial(torch.compiler.disable, reason=reason))


def is_traced(x: Tensor) -> bool:
    """True under AOTAutograd, where an op that stays whole is lowered by Inductor; False in eager code."""
    return isinstance(x, FunctionalTensor | FakeTensor)


def is_watched(x: Tensor) -> bool:
    """Whether an op of ``x`` must go through torch's dispatcher, which takes longer than a small kernel.

    So it is where the op is traced, where a mode looks on, and where ``x`` wants a gradient, which ends in an error.
    """
    wants_gradient = torch.is_grad_enabled() and x.requires_grad
    return is_traced(x) or wants_gradient or torch._C._len_torch_dispatch_stack() > 0
