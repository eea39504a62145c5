"""What the host needs to launch Triton kernels; Triton is not imported."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from xquant_fx.kernels.widths import rank_widths
from xquant_fx.tracing import is_traced


@functools.cache
def has_triton() -> bool:
    """Whether Triton is installed."""
    return importlib.util.find_spec("triton") is not None


def power_of_two(n: int) -> int:
    """The least power of two that is at least ``n``."""
    return 1 << max(n - 1, 0).bit_length()


def rank_counts(bits: float, dim: int) -> dict[str, int]:
    """Constants of kernels for ranked channels (``triton_widths.py``): how many ranks have 1, 2, ... 7 bits or more."""
    widths = rank_widths(bits, dim)
    return {f"RANKS_{least}": sum(width >= least for width in widths) for least in range(1, 8)}


def on_its_device(x: Tensor) -> AbstractContextManager[Any]:
    """Inside, the current GPU is that of ``x``: there Triton launches. Inductor's code sees to that itself."""
    return contextlib.nullcontext() if is_traced(x) else torch.cuda.device_of(x)
