"""``quantize``: the quantizer on a tensor of one's own."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from xquant_fx.errors import ConfigError
from xquant_fx.kernels.packing import BITS, pack_words, unpack_words
from xquant_fx.kernels.reference import own_codes
from xquant_fx.kernels.relaxation import unbiased_eta
from xquant_fx.plan.config import Eta


@dataclasses.dataclass(frozen=True)
class Quantized:
    """A quantized tensor; ``dim`` is the dimension that groups run along (-1 or -2)."""

    packed: Tensor
    """int32 words, packed along ``dim`` (``kernels/packing.py``)."""
    scale: Tensor
    """fp32, the input's shape with ``dim`` divided by ``group_size``."""
    zero: Tensor
    """fp32 zero points, shaped like ``scale``: X ~ codes * scale + zero."""
    bits: int
    group_size: int
    dim: int
    shape: torch.Size
    dtype: torch.dtype

    @property
    def codes(self) -> Tensor:
        """uint8 codes 0 .. 2**bits - 1, of the input's shape."""
        return unpack_words(self.packed, self.bits, self.dim, self.shape[self.dim]).to(torch.uint8)

    def dequantize(self) -> Tensor:
        """codes * scale + zero, computed in fp32, in the input's shape and dtype."""
        axis = self.dim % len(self.shape)
        split = (self.shape[axis] // self.group_size, self.group_size)
        codes = self.codes.to(torch.float32).unflatten(axis, split)
        x = codes * self.scale.unsqueeze(axis + 1) + self.zero.unsqueeze(axis + 1)
        return x.flatten(axis, axis + 1).to(self.dtype)


def quantize(x: Tensor, *, bits: int, group_size: int, dim: int, eta: Eta = 0.0) -> Quantized:
    """Quantize ``x`` in groups by their range (XQuant, Yang et al., EMNLP 2025, arXiv 2510.11236).

    Args:
        x: floating-point tensor with at least two dimensions, the last two being tokens, channels.
        bits: 1, 2, 3, 4 or 8.
        group_size: elements of a group; divides ``x.shape[dim]``.
        dim: -2 groups along tokens (keys, per channel), -1 along channels (values, per token).
        eta: relaxation of both ends of the range, in [0, 0.5) (Eq. 5); "auto": by ``group_size``, without bias.

    Raises:
        ConfigError: an argument breaks its rule.

    A group with an infinity or a NaN, or whose range overflows fp32, dequantizes to NaN.
    """
    if bits not in BITS[:-1]:
        raise ConfigError(f"bits must be one of {BITS[:-1]}, got {bits!r}")
    if dim not in (-1, -2):
        raise ConfigError(f"dim must be -1 (along channels) or -2 (along tokens), got {dim!r}")
    if x.dim() < 2 or not x.dtype.is_floating_point:
        raise ConfigError(f"x must be floating point with two dimensions or more, got {x.dtype} {tuple(x.shape)}")
    if group_size < 1 or x.shape[dim] % group_size:
        raise ConfigError(f"group_size must divide x.shape[{dim}] = {x.shape[dim]}, got {group_size}")
    if isinstance(eta, str) and eta == "auto":
        eta = unbiased_eta(group_size, bits) if bits <= 2 else 0.0
    if not isinstance(eta, int | float) or not 0 <= eta < 0.5:
        raise ConfigError(f'eta must be in [0, 0.5) or "auto", got {eta!r}')
    axis = dim % x.dim()
    grouped = x.to(torch.float32).unflatten(axis, (x.shape[axis] // group_size, group_size))
    codes, scale, zero = own_codes(grouped, bits=bits, eta=eta, dim=axis + 1, dtype=torch.float32)
    packed = pack_words(codes.flatten(axis, axis + 1), bits, axis)
    return Quantized(packed, scale.squeeze(axis + 1), zero.squeeze(axis + 1), bits, group_size, dim, x.shape, x.dtype)
