"""``xquant::linear_rows`` as plain torch: what devices without a kernel run, and what the kernel computes."""

from __future__ import annotations

import torch

from xquant_fx.kernels.linear_rows.arguments import LinearArguments


def linear(a: LinearArguments) -> torch.Tensor:
    """The layers' outputs behind each other: sums in float32, bias included, rounded once."""
    weights = [weight.float().t() if a.in_first else weight.float() for weight in a.weights]
    outs = [
        torch.nn.functional.linear(a.x.float(), weight, None if bias is None else bias.float())
        for weight, bias in zip(weights, a.biases, strict=True)
    ]
    return torch.cat([out.flatten() for out in outs]).to(a.x.dtype)
