"""Rounding facts and input strategies that the numerical tests share.

Allowances come from the unit roundoff of the arithmetic, never from tuning. With u = 2**-24, what
fp32 does to a group of range w and largest magnitude m is: low exact; w, step = w / n, x - low and
the quotient off by one factor (1 + u) each; a subnormal step off by up to half of the smallest
subnormal besides, n times in the last code; codes * step + low off by u of each result.
"""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor

U = 2.0**-24
TINY = 2.0**-149
BITS = (1, 2, 3, 4, 8)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LARGEST = {torch.float32: 2.0**127, torch.bfloat16: 2.0**127, torch.float16: 65504.0}


@st.composite
def groups(draw, dtypes: tuple[torch.dtype, ...] = DTYPES) -> Tensor:
    """Rows of numbers of one dtype: any magnitude, offset and spread, ties and repeats included."""
    dtype = draw(st.sampled_from(dtypes))
    rows, size = draw(st.integers(1, 3)), draw(st.integers(1, 33))
    if draw(st.booleans()):
        spread, offset = (2.0 ** draw(st.integers(-20, 12)) for _ in range(2))
        x = torch.randn(rows, size, generator=seeded(draw(st.integers(0, 2**32 - 1)))) * spread + offset
    else:
        large = LARGEST[dtype] / 2
        numbers = st.floats(-large, large, width=32) | st.sampled_from([0.0, 1.0, -1.0, 0.5, TINY, 100 * TINY])
        x = torch.tensor([draw(st.lists(numbers, min_size=size, max_size=size)) for _ in range(rows)])
    return x.to(dtype)


def bounds(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(low, range, largest magnitude) of each row in float64."""
    x = x.double()
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    return low, high - low, torch.maximum(low.abs(), high.abs())


def storage_slack(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Most that rounding float64 ``values`` to ``dtype`` can change them."""
    info = torch.finfo(dtype)
    return values.abs() * info.eps / 2 + info.tiny * info.eps / 2


def seeded(seed: int) -> torch.Generator:
    """A generator of its own for one draw of random numbers."""
    return torch.Generator().manual_seed(seed)
