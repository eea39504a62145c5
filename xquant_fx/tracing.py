"""Whether an op is being traced for a compiler. Relied on: FunctionalTensor, FakeTensor (torch 2.11 to 2.14)."""

from __future__ import annotations

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor


def is_traced(x: Tensor) -> bool:
    """True under AOTAutograd, where an op that stays whole is lowered by Inductor; False in eager code."""
    return isinstance(x, FunctionalTensor | FakeTensor)
