"""Who traces what: functions that Dynamo leaves alone, and ops that are traced for a compiler.

Relied on: FunctionalTensor, FakeTensor (torch 2.11, 2.13).
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
