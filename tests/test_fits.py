"""Scales and zero points for given codes, masks and stored dtypes: kernels/reference.py beyond ``quantize``."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numeric import BITS, TINY, U, bounds, groups, seeded
from torch import Tensor

from xquant_fx import quantize
from xquant_fx.kernels.reference import fit_codes, least_squares, own_codes

few = settings(max_examples=60, deadline=None)


def sum_of_squares(x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    return ((x.double() - codes.double() * scale.double() - zero.double()) ** 2).sum(-1)


@few
@given(x=groups((torch.float32,)), bits=st.sampled_from(BITS), seed=st.integers(0, 99))
def test_least_squares_is_never_worse_than_minmax(x: Tensor, bits: int, seed: int) -> None:
    """On codes of its own or of another layer. An fp32 mean of m numbers is off by up to m u of the largest;
    as the residual of a fit is orthogonal to what it can change, its error enters squared."""
    x = x.clamp(-(2.0**100), 2.0**100)
    x = torch.where(x.abs() < 2.0**-100, 0.0, x)
    own = own_codes(x, bits=bits, eta=0.0, dim=-1, dtype=torch.float32)[0]
    lent = torch.randint(0, 2**bits, x.shape, generator=seeded(seed), dtype=torch.int32)
    common = dict(bits=bits, eta=0.0, dim=-1, dtype=torch.float32)
    m = x.shape[1]
    allowed = m * (16 * (m + 2) * U * bounds(x)[2].squeeze(-1)) ** 2
    for codes in (own, lent):
        fitted, plain = (
            sum_of_squares(x, codes, *fit_codes(x, codes, fit=f, **common)) for f in ("least_squares", "minmax")
        )
        assert (fitted <= plain * (1 + 1e-12) + allowed).all()


def test_least_squares_recovers_a_line_and_gives_scale_0_for_constant_codes() -> None:
    codes = torch.tensor([[0.0, 1.0, 2.0, 3.0], [2.0, 2.0, 2.0, 2.0]])
    x = torch.stack([4 - 0.5 * codes[0], torch.tensor([1.0, 2.0, 3.0, 6.0])])
    scale, zero = least_squares(x, codes, -1)
    assert scale.tolist() == [[-0.5], [0.0]]
    assert zero.tolist() == [[4.0], [3.0]]


@pytest.mark.parametrize("fit", ["least_squares", "minmax", None])
def test_elements_left_out_take_no_part(fit: str | None) -> None:
    x = torch.randn(3, 16, generator=seeded(0))
    codes = torch.randint(0, 4, x.shape, generator=seeded(1), dtype=torch.int32)
    valid = torch.arange(16) >= torch.tensor([[0], [5], [16]])
    common = dict(bits=2, eta=0.1, dim=-1, dtype=torch.float32)

    def scales(values: Tensor, lent: Tensor, **more: Tensor) -> list[Tensor]:
        if fit is None:
            return list(own_codes(values, **common, **more)[1:])
        return list(fit_codes(values, lent, fit=fit, **common, **more))

    junk = torch.where(valid, x, torch.tensor([math.nan, math.inf, 1e30, -1e30]).repeat(4))
    masked = scales(junk, torch.where(valid, codes, 3), valid=valid)
    for got, row_0, row_1 in zip(masked, scales(x[:1], codes[:1]), scales(x[1:2, 5:], codes[1:2, 5:]), strict=True):
        torch.testing.assert_close(got[:1], row_0, rtol=32 * U, atol=32 * U)
        torch.testing.assert_close(got[1:2], row_1, rtol=32 * U, atol=32 * U)
        assert got[2].item() == 0


@pytest.mark.parametrize("fit", ["least_squares", "minmax"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, 7e4])
def test_fits_that_do_not_fit_their_dtype_are_nan(fit: str, bad: float) -> None:
    x = torch.full((1, 4), bad)
    codes = torch.tensor([[0, 1, 2, 3]], dtype=torch.int32)
    scale, zero = fit_codes(x, codes, bits=2, eta=0.0, dim=-1, dtype=torch.float16, fit=fit)
    assert scale.item() == 0 and zero.isnan().item()


def test_codes_of_elements_outside_the_range_are_clamped() -> None:
    """Padding takes no part in the range, and the step of 382 smallest subnormals is 1, not 1.498, of them."""
    x = torch.tensor([[-9.0, 0.0, 1.0, 9.0, math.nan]])
    valid = torch.tensor([[False, True, True, False, False]])
    assert own_codes(x, bits=2, eta=0.0, dim=-1, dtype=torch.float32, valid=valid)[0].tolist() == [[0, 0, 3, 3, 0]]
    assert quantize(torch.tensor([[0.0, 382 * TINY]]), bits=8, group_size=2, dim=-1).codes.tolist() == [[0, 255]]
