"""``xquant::linear_rows`` as plain torch: what devices without a kernel run, and what the kernel computes."""

from __future__ import annotations

import torch

from xquant_fx.kernels.linear_rows.arguments import LinearArguments


def linear(a: LinearArguments) -> torch.Tensor:
    """[..., out]: sums in float32, bias included, rounded once."""
    bias = None if a.bias is None else a.bias.float()
    return torch.nn.functional.linear(a.x.float(), a.weight.float(), bias).to(a.x.dtype)
