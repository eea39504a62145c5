"""Properties of ``quantize``, held to float64 arithmetic with the allowances of tests/numeric.py."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numeric import BITS, DTYPES, TINY, U, bounds, groups, seeded, storage_slack
from torch import Tensor

from xquant_fx import ConfigError, quantize

few = settings(max_examples=60, deadline=None)


def along(x: Tensor, dim: int) -> Tensor:
    """Rows as [rows, size], or the same laid out so that groups run along ``dim`` -2."""
    return x if dim == -1 else x.T.contiguous()


@few
@given(x=groups(), bits=st.sampled_from(BITS), dim=st.sampled_from((-1, -2)))
def test_round_trip_stays_within_half_a_step(x: Tensor, bits: int, dim: int) -> None:
    _, width, largest = bounds(x)
    n = 2**bits - 1
    out = along(quantize(along(x, dim), bits=bits, group_size=x.shape[1], dim=dim).dequantize(), dim)
    assert out.dtype == x.dtype
    slack = U * (8 * width + 3 * largest) + (n + 1) * TINY
    allowed = (width / n / 2 + slack) + storage_slack(largest + slack, x.dtype)
    assert ((out.double() - x.double()).abs() <= allowed).all()


@few
@given(
    bits=st.sampled_from(BITS),
    dim=st.sampled_from((-1, -2)),
    lead=st.lists(st.integers(1, 3), max_size=2),
    count=st.integers(1, 3),
    size=st.integers(1, 13),
    other=st.integers(1, 5),
    seed=st.integers(0, 9),
)
def test_codes_and_shapes(bits: int, dim: int, lead: list[int], count: int, size: int, other: int, seed: int) -> None:
    """Any shape: uint8 codes of the input's shape, as the equation has them, packed and unpacked."""
    length = count * size
    x = torch.randn(*lead, *((other, length) if dim == -1 else (length, other)), generator=seeded(seed))
    q = quantize(x, bits=bits, group_size=size, dim=dim)
    assert q.codes.dtype == torch.uint8 and q.codes.shape == x.shape
    assert int(q.codes.max()) <= 2**bits - 1
    shape = list(x.shape)
    shape[dim] = count
    assert q.scale.shape == q.zero.shape == torch.Size(shape)
    shape[dim] = sum(math.ceil(length * width / 32) for width in (8, 4, 2, 1) if bits & width)
    assert q.packed.dtype == torch.int32 and list(q.packed.shape) == shape
    rows = x.movedim(dim, -1).double().unflatten(-1, (count, size))
    low, width, _ = bounds(rows)
    exact = torch.where(width > 0, (rows - low) / width.clamp_min(TINY) * (2**bits - 1), 0.0)
    codes = q.codes.movedim(dim, -1).unflatten(-1, (count, size))
    assert ((codes - exact).abs() <= 0.5 + 8 * U * 2**bits).all()
    again = quantize(x.clone(), bits=bits, group_size=size, dim=dim)
    assert torch.equal(again.packed, q.packed)


@few
@given(x=groups(), bits=st.sampled_from(BITS))
def test_quantizing_again_changes_nothing(x: Tensor, bits: int) -> None:
    first = quantize(x, bits=bits, group_size=x.shape[1], dim=-1)
    once = first.dequantize()
    second = quantize(once, bits=bits, group_size=x.shape[1], dim=-1)
    assert torch.equal(second.codes, first.codes)
    _, width, largest = bounds(x)
    allowed = U * (8 * width + 6 * largest) + (2**bits) * TINY
    allowed = allowed + 2 * storage_slack(largest, x.dtype) * (x.dtype != torch.float32)
    assert ((second.dequantize().double() - once.double()).abs() <= allowed).all()


@few
@given(seed=st.integers(0, 99), bits=st.sampled_from(BITS), power=st.integers(-60, 60))
def test_scaling_by_a_power_of_two_is_exact(seed: int, bits: int, power: int) -> None:
    x = torch.randn(4, 32, generator=seeded(seed)) + 3
    a, b = (quantize(t, bits=bits, group_size=8, dim=-1) for t in (x, x * 2.0**power))
    assert torch.equal(a.packed, b.packed)
    assert torch.equal(a.scale * 2.0**power, b.scale) and torch.equal(a.zero * 2.0**power, b.zero)


@few
@given(seed=st.integers(0, 99), bits=st.sampled_from(BITS), shift=st.integers(-(2**20), 2**20))
def test_shifting_integers_is_exact(seed: int, bits: int, shift: int) -> None:
    x = torch.randint(-1000, 1000, (4, 32), generator=seeded(seed)).float()
    a, b = (quantize(t, bits=bits, group_size=8, dim=-1) for t in (x, x + shift))
    assert torch.equal(a.packed, b.packed) and torch.equal(a.scale, b.scale)
    assert torch.equal(a.zero + shift, b.zero)


@few
@given(seed=st.integers(0, 99), bits=st.sampled_from(BITS), scale=st.floats(0.01, 100), shift=st.floats(-10, 10))
def test_scaling_and_shifting_move_the_codes_only_at_ties(seed: int, bits: int, scale: float, shift: float) -> None:
    x = torch.randn(4, 32, generator=seeded(seed))
    moved = x * scale + shift
    a, b = (quantize(t, bits=bits, group_size=32, dim=-1) for t in (x, moved))
    low, width, _ = bounds(x)
    n = 2**bits - 1
    exact = (x.double() - low) / width * n
    slack = n * (8 * U + 2 * U * bounds(moved)[2] / (scale * width))
    at_tie = (exact - exact.floor() - 0.5).abs() <= 2 * slack
    assert ((a.codes == b.codes) | at_tie).all()
    assert ((a.codes.int() - b.codes.int()).abs() <= 1).all()


@few
@given(
    x=groups((torch.float32,)), bits=st.sampled_from(BITS), eta=st.floats(0, 0.484375, width=32, allow_subnormal=False)
)
def test_eta_keeps_codes_and_shrinks_the_range(x: Tensor, bits: int, eta: float) -> None:
    """Eq. 5: scale (1 - 2 eta) s, zero z + eta s n."""
    plain = quantize(x, bits=bits, group_size=x.shape[1], dim=-1)
    relaxed = quantize(x, bits=bits, group_size=x.shape[1], dim=-1, eta=eta)
    assert torch.equal(plain.packed, relaxed.packed)
    n, s, z = 2**bits - 1, plain.scale.double(), plain.zero.double()
    assert ((relaxed.scale.double() - (1 - 2 * eta) * s).abs() <= 2 * U * s + TINY).all()
    expected = z + eta * s * n
    assert ((relaxed.zero.double() - expected).abs() <= U * (2 * eta * s * n + expected.abs()) + n * TINY).all()


def test_eq_5_on_a_group_worked_by_hand() -> None:
    x = torch.tensor([[0.0, 1.0, 2.0, 6.0]])
    q = quantize(x, bits=2, group_size=4, dim=-1, eta=0.25)
    assert q.codes.tolist() == [[0, 0, 1, 3]]  # s = 2, and 0.5 is a tie, which goes to the even code
    assert q.scale.tolist() == [[1.0]] and q.zero.tolist() == [[1.5]]
    assert q.dequantize().tolist() == [[1.5, 1.5, 2.5, 4.5]]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_constant_groups_and_single_elements_read_back_exactly(bits: int, dtype: torch.dtype) -> None:
    x = torch.tensor([0.1, -3.0, 0.0, 6e4, 1e-7], dtype=dtype)
    for rows, size in ((x[:, None].expand(5, 7), 7), (x[None], 1)):
        q = quantize(rows, bits=bits, group_size=size, dim=-1)
        assert not q.codes.any() and not q.scale.any()
        assert torch.equal(q.dequantize(), rows)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 3e38])
def test_what_cannot_be_represented_reads_as_nan_in_its_group_only(bad: float) -> None:
    x = torch.linspace(-2, 3, 24).reshape(2, 12)
    x[1, 5] = bad
    if bad == 3e38:
        x[1, 6] = -bad  # both are finite, their distance is not
    q = quantize(x, bits=4, group_size=4, dim=-1, eta=0.01)
    out = q.dequantize()
    assert out[1, 4:8].isnan().all()
    assert q.scale[1, 1] == 0 and not q.codes[1, 4:8].any()
    good = torch.ones(2, 12, dtype=torch.bool)
    good[1, 4:8] = False
    clean = quantize(torch.where(good, x, 0.0), bits=4, group_size=4, dim=-1, eta=0.01).dequantize()
    assert torch.equal(out[good], clean[good])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(bits=5), ["bits", "5"]),
        (dict(bits=16), ["bits", "16"]),
        (dict(dim=0), ["dim", "0"]),
        (dict(group_size=5), ["group_size", "divide", "8", "5"]),
        (dict(group_size=0), ["group_size", "0"]),
        (dict(eta=0.5), ["eta", r"\[0, 0.5\)", "0.5"]),
        (dict(eta=math.nan), ["eta", "nan"]),
        (dict(x=torch.zeros(8)), ["two dimensions", r"\(8,\)"]),
        (dict(x=torch.zeros(8, 8, dtype=torch.int64)), ["floating point", "int64"]),
    ],
)
def test_errors_name_the_rule_and_the_value(change: dict, words: list[str]) -> None:
    arguments = dict(x=torch.zeros(8, 8), bits=2, group_size=4, dim=-1, eta=0.0) | change
    with pytest.raises(ConfigError, match=".*".join(words)) as caught:
        quantize(arguments.pop("x"), **arguments)
    assert isinstance(caught.value, ValueError)
