"""Rotated values: the transform, small floats, and a scale without bias."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numeric import seeded
from states import layers_of

from xquant_fx import XQuantConfig
from xquant_fx.kernels.reference import unbiased
from xquant_fx.kernels.rotation import negative, rotate, rotate_back, rotated_size, signs
from xquant_fx.kernels.small_floats import LARGEST_MID, MID_UNIT, decode_mid, decode_scale, encode_mid, encode_scale

few = settings(max_examples=40, deadline=None)
EVERY = torch.arange(256, dtype=torch.uint8)


@pytest.mark.parametrize("dim", [1, 8, 24, 64, 80, 96, 128, 256])
def test_rotation_keeps_lengths_and_comes_back(dim: int) -> None:
    v = torch.randn(7, dim, generator=seeded(dim), dtype=torch.float64)
    y = rotate(v)
    n = rotated_size(dim)
    assert dim % n == 0 and n & (n - 1) == 0 and (dim // n) % 2
    close = dict(rtol=0, atol=1e-12)
    torch.testing.assert_close(rotate_back(y), v, **close)
    torch.testing.assert_close(y.norm(dim=1), v.norm(dim=1), **close)
    assert [s < 0 for s in signs(dim)] == [negative(c) for c in range(dim)]
    one = torch.zeros(dim, dtype=torch.float64)
    one[dim // 2] = 1.0
    spread = rotate(one).abs()
    assert torch.allclose(spread[spread > 0], torch.tensor(n**-0.5, dtype=torch.float64)) and (spread > 0).sum() == n


def test_signs_are_mixed() -> None:
    for dim in (64, 96, 128, 256):
        assert abs(sum(signs(dim))) <= dim / 4


def test_codes_of_small_floats_come_back() -> None:
    scales = decode_scale(EVERY)
    assert torch.equal(encode_scale(scales[:248]), EVERY[:248]) and scales[0] == 0
    assert (encode_scale(scales[248:]) == 0xFF).all(), "what is no number is NaN"
    assert decode_scale(torch.tensor([0xFF], dtype=torch.uint8)).isnan()
    mids = decode_mid(EVERY)
    assert torch.equal(encode_mid(mids)[EVERY != 0x80], EVERY[EVERY != 0x80]), "minus 0 is 0"
    assert mids.abs().max() == LARGEST_MID


@few
@given(exponent=st.floats(-18.9, 10.8), sign=st.sampled_from((-1.0, 1.0)))
def test_small_floats_round_to_the_nearest(exponent: float, sign: float) -> None:
    x = torch.tensor([2.0**exponent])
    every = decode_scale(EVERY[:248])
    off = (decode_scale(encode_scale(x)) - x).abs()
    # Rounded to float16 first, by half of 2**-10 at most: what is near a tie may go the other way, twice that off.
    assert off <= (every - x).abs().min() + x * 2**-10 and off <= x * (1 / 16 + 2**-10)
    mid = sign * x.clamp_max(LARGEST_MID)
    off = (decode_mid(encode_mid(mid)) - mid).abs()
    # Of small mid points float16's steps are as wide as of its least number.
    assert off <= (decode_mid(EVERY) - mid).abs().min() + x * 2**-10 + MID_UNIT * 2**-24


def test_scales_and_mid_points_of_16_bits() -> None:
    x = torch.tensor([0.0, 2.0**-24, 0.1, 65504.0, 1e5, torch.inf, torch.nan])
    seen = decode_scale(encode_scale(x, torch.float16))
    assert torch.equal(seen[:4], x[:4].half().float()) and seen[4:].isnan().all()
    mids = torch.tensor([-0.3, 1e9, -torch.inf, torch.nan])
    assert decode_mid(encode_mid(mids, torch.float16)).tolist() == [float(mids[0].half()), 480.0, -480.0, 0.0]


def test_scales_that_do_not_fit() -> None:
    bad = torch.tensor([torch.nan, torch.inf, 2000.0, 1e9])
    assert decode_scale(encode_scale(bad)).isnan().all()
    assert decode_mid(encode_mid(torch.tensor([torch.inf, -torch.inf, 1e9]))).tolist() == [480.0, -480.0, 480.0]


@few
@given(bits=st.sampled_from((1, 2, 3, 4)), seed=st.integers(0, 999))
def test_the_scale_has_no_bias(bits: int, seed: int) -> None:
    """sum x y = sum x**2, so errors of many tokens average out; least squares would shrink."""
    n = 2**bits - 1
    x = torch.randn(5, 64, generator=seeded(seed))
    levels = torch.floor(x * 1.3 + (n + 1) / 2).clamp(0, n) - n / 2
    y = unbiased(x, levels, 1) * levels
    torch.testing.assert_close((x * y).sum(1), (x * x).sum(1), rtol=1e-5, atol=0)
    assert unbiased(torch.zeros(1, 8), torch.full((1, 8), 0.5), 1) == 0


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_the_mean_of_many_tokens_comes_back(bits: int) -> None:
    """What attention makes of values: an average over tokens, whose error falls as without a bias it must."""
    config = XQuantConfig(v_bits=bits, k_group_size=8, residual_length=8, sink_tokens=0)
    state = layers_of(config, (1, 1, 4100, 64), torch.float32)[0][1]
    x = torch.randn(1, 1, 4100, 64, generator=seeded(1)) * torch.linspace(0.1, 3, 64) + torch.linspace(-1, 1, 64)
    state.store(x, torch.arange(4100))
    state.group.drop()
    seen = state.load(4100)[:, :, :4000]
    error, size = (seen - x[:, :, :4000]).norm() / 4000**0.5, x.norm() / 4100**0.5
    assert error / size < {1: 0.85, 2: 0.4, 3: 0.22, 4: 0.15}[bits]
    mean_error = (seen.mean(2) - x[:, :, :4000].mean(2)).norm()
    assert mean_error < 0.07 * x.mean(2).norm() + 4 * error / 4000**0.5


def test_a_token_that_is_not_finite_is_nan_and_others_are_not() -> None:
    state = layers_of(XQuantConfig(k_group_size=8, residual_length=8, sink_tokens=0), (1, 1, 40, 16), torch.float32)[0][
        1
    ]
    x = torch.randn(1, 1, 30, 16, generator=seeded(2))
    x[0, 0, 3, 5], x[0, 0, 4, 6], x[0, 0, 5] = torch.nan, torch.inf, 0.0
    state.store(x, torch.arange(30))
    state.group.drop()
    seen = state.load(20)[0, 0]
    assert seen[3].isnan().all() and seen[4].isnan().all() and (seen[5] == 0).all()
    assert not seen[[0, 1, 2, 6, 7]].isnan().any()
