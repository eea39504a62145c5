"""What caches hold, as ordinary tensors, and how far tensors are apart."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from xquant_fx import ops
from xquant_fx.cache.aliases import in_order, laid_out
from xquant_fx.cache.growing import GrowingKV
from xquant_fx.cache.kv_tensor import QuantizedKV
from xquant_fx.cache.laid_out import LaidOutKV
from xquant_fx.cache.laid_out_growing import LaidOutGrowingKV
from xquant_fx.kernels.shared_code_load.arguments import STORED

LAID_OUT = LaidOutKV, LaidOutGrowingKV


def clear_behind(dense: Tensor, lengths: Any, like: Tensor) -> None:
    """Zeros from ``lengths`` on, a number or one for each row, in dimensions as those of ``like``."""
    dense = in_order(dense, like.dims) if isinstance(like, LAID_OUT) else dense
    if isinstance(lengths, int):
        lengths = torch.tensor([lengths])
    dense.masked_fill_((torch.arange(dense.shape[2]) >= lengths[:, None])[:, None, :, None], 0)


def seen_by_step(buffer: Tensor, past: Any, new: int) -> Tensor:
    """What a step sees that begins with ``past`` tokens and has stored ``new`` more: zeros behind them.

    ``past`` is a number, or one for each row [B].
    """
    if not isinstance(buffer, QuantizedKV | GrowingKV):
        return buffer.clone()
    state, usual = buffer.live, buffer.ordered if isinstance(buffer, LAID_OUT) else buffer
    tensors = {name: state.tensor(name) for name in STORED}
    where = dict(past=torch.tensor([past]) if isinstance(past, int) else past, new_tokens=new, n=usual.shape[2])
    dense: Tensor = ops.LOAD(**tensors, **where, **state.spec.load_constants(), x=None)
    return laid_out(dense, buffer.dims).clone() if isinstance(buffer, LAID_OUT) else dense.clone()


def relative_error(mine: Tensor, theirs: Tensor) -> float:
    """Root of the mean square of the difference, relative; inf where shapes, dtypes or NaN differ."""
    if mine.shape != theirs.shape or mine.dtype != theirs.dtype or not torch.equal(mine.isnan(), theirs.isnan()):
        return float("inf")
    a, b = (t.double().nan_to_num() for t in (mine, theirs))
    return ((a - b).norm() / b.norm().clamp_min(1e-6)).item()
