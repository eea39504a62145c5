"""Slices of a quantized buffer, and slices of those: what is read, and where is appended."""

from __future__ import annotations

import pytest
import torch
from states import layers_of

from xquant_fx import CacheStateError, XQuantConfig
from xquant_fx.cache.kv_tensor import QuantizedKV

CONFIG = XQuantConfig.preset("full")
SHAPE = (1, 2, 32, 4)


@pytest.fixture
def buffer() -> QuantizedKV:
    """Twelve of thirty-two tokens are stored, unquantized, so that each is told from the others."""
    keys = QuantizedKV.of(layers_of(CONFIG, SHAPE, torch.float32)[0][0])
    keys[:, :, torch.arange(12)] = torch.arange(12.0).view(12, 1).expand(1, 2, 12, 4)
    return keys


def tokens(x: torch.Tensor) -> list[float]:
    return x.clone()[0, 0, :, 0].tolist()


@pytest.mark.parametrize(
    ("outer", "inner"),
    [
        (slice(2, 20), slice(3, 9)),
        (slice(5, None), slice(None, 4)),
        (slice(None, 10), slice(8, None)),
        (slice(-28, None), slice(-26, -20)),
        (slice(4, 12), slice(0, 100)),
        (slice(4, 12), slice(6, 3)),
    ],
)
def test_reads(buffer: QuantizedKV, outer: slice, inner: slice) -> None:
    dense = [*range(12), *[0] * 20]
    assert tokens(buffer[:, :, outer]) == dense[outer]
    assert tokens(buffer[:, :, outer][:, :, inner]) == dense[outer][inner]
    assert tokens(buffer[:, :, outer][:, :, inner][:, :, 1:3]) == dense[outer][inner][1:3]


def test_appends(buffer: QuantizedKV) -> None:
    buffer[:, :, 4:20][:, :, 8:10] = torch.full((1, 2, 2, 4), 7.0)
    assert buffer.live.length == 14 and tokens(buffer)[10:15] == [10, 11, 7, 7, 0]
    buffer[:, :, 1:][:, :, 12:][:, :, 1:2] = torch.full((1, 2, 1, 4), 9.0)
    assert buffer.live.length == 15 and tokens(buffer)[13:16] == [7, 9, 0]
    with pytest.raises(CacheStateError, match="position 24"):
        buffer[:, :, 4:][:, :, 20:21] = torch.zeros(1, 2, 1, 4)
    with pytest.raises(CacheStateError, match="is tokens 4 to 31 of a quantized buffer"):
        _ = buffer[:, :, 4:].live
