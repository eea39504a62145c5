"""Keys with mixed widths: which rank gets how many bits, how channels are ranked, and what a group is fitted to."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numeric import seeded
from states import layers_of
from torch import Tensor

from xquant_fx import XQuantConfig
from xquant_fx.cache.state import KVState
from xquant_fx.kernels.schemes import per_channel_ranked
from xquant_fx.kernels.schemes.per_channel_ranked import largest_codes, pack, quantize, unpack
from xquant_fx.kernels.small_floats import DTYPES, decode_mid, decode_scale
from xquant_fx.kernels.widths import QUAD, fields_of, plain_words, planes, quads_of, rank_widths, words_of

few = settings(max_examples=30, deadline=None)
bits_of = st.sampled_from(per_channel_ranked.BITS)
dims = st.sampled_from((8, 16, 24, 40, 64, 80, 96, 128, 256))


@few
@given(bits=bits_of, dim=dims)
def test_widths_fall_with_rank_and_waste_no_bit(bits: float, dim: int) -> None:
    widths = rank_widths(bits, dim)
    assert len(widths) == dim and all(0 <= b <= 7 for b in widths)
    assert list(widths) == sorted(widths, reverse=True)
    assert sum(widths) <= 32 * words_of(bits, dim), "what a token's words can hold"
    if bits * dim % 32 == 0 and dim >= 64:
        assert sum(widths) == bits * dim


@pytest.mark.parametrize("bits", per_channel_ranked.BITS)
def test_widths_follow_importance(bits: float) -> None:
    """A second way to the same: give one bit at a time to whom it helps most. Whole words cost little."""
    dim, ratio = 128, 250.0
    error = (1.0, 0.3634, 0.1188, 0.03744, 0.01154, 0.00349, 0.00104, 0.0003)
    importance = [ratio ** -((r / (dim - 1)) ** 0.5) for r in range(dim)]
    filled = [0] * dim
    for _ in range(int(bits * dim)):
        best = max(range(dim), key=lambda r: importance[r] * (error[filled[r]] - error[min(filled[r] + 1, 7)]))
        filled[best] += 1

    def total(widths: Any) -> float:
        return sum(i * error[b] for i, b in zip(importance, widths, strict=True))

    found = rank_widths(bits, dim)
    assert total(filled) <= total(found) <= (1.15 if bits <= 2.5 else 1.6) * total(filled)
    assert sum(len(plane.ranks) for plane in planes(bits, dim)) <= 1.125 * dim
    assert all(len(set(found[r : r + QUAD])) == 1 for r in range(0, dim, QUAD))


@few
@given(bits=bits_of, dim=dims, seed=st.integers(0, 99))
def test_pack_and_unpack(bits: float, dim: int, seed: int) -> None:
    largest = largest_codes(bits, dim, torch.device("cpu"))
    codes = torch.floor(torch.rand(2, 3, 5, dim, generator=seeded(seed)) * (largest + 1)).to(torch.int32)
    words = pack(codes, bits)
    assert words.shape == (2, 3, words_of(bits, dim), 5)
    assert torch.equal(unpack(words, bits, dim), codes)


@few
@given(bits=bits_of, dim=dims)
def test_fields_and_quads_are_the_same_layout(bits: float, dim: int) -> None:
    """Codes put together from ``fields_of`` are what ``pack`` stores; ``quads_of`` and ``plain_words`` read them."""
    stored = planes(bits, dim)
    largest = largest_codes(bits, dim, torch.device("cpu")).long()
    codes = torch.floor(torch.rand(dim, generator=seeded(dim)) * (largest + 1)).long()
    words = [0] * words_of(bits, dim)
    for field in fields_of(stored):
        words[field.word] |= (int(codes[field.rank]) >> field.shift & field.mask) << field.bit
    packed = pack(codes.view(1, 1, 1, dim).to(torch.int32), bits).flatten().tolist()
    assert [w if w < 2**31 else w - 2**32 for w in words] == packed
    quads = [sum(_shifted(words[p.word], p.shift) & p.mask for p in quad) for quad in quads_of(stored)]
    read = [quad >> 8 * byte & 0xFF for quad in quads for byte in range(QUAD)]
    assert read == [int(c) for c, b in zip(codes, rank_widths(bits, dim), strict=True) if b]
    for plain in plain_words(stored):
        mask, per = 2**plain.width - 1, 32 // plain.width
        for i in range(plain.words * per):
            word, place = words[plain.word + i // per], i % per
            assert word >> 8 * (place % 4) + plain.width * (place // 4) & mask == int(codes[plain.rank + i])


def _shifted(word: int, shift: int) -> int:
    return word >> shift if shift >= 0 else word << -shift & 0xFFFFFFFF


def group_of(count: int, dim: int, seed: int = 0) -> Tensor:
    spread = torch.linspace(3.0, 0.05, dim)
    return (torch.randn(1, 1, 1, count, dim, generator=seeded(seed)) * spread + spread.flip(0)).float()


def everything(x: Tensor) -> Tensor:
    return torch.ones(1, 1, 1, x.shape[3], 1, dtype=torch.bool)


def dequantized(codes: Tensor, scale: Tensor, zero: Tensor, center: Tensor, bits: float) -> Tensor:
    levels = codes - largest_codes(bits, codes.shape[4], codes.device) / 2
    return decode_scale(scale) * (levels + decode_mid(zero)) + center


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [1.0, 2.0, 3.0, 4.0])
def test_the_spread_and_the_mean_of_a_channel_are_kept(bits: float, dtype: torch.dtype) -> None:
    """Up to what scale and mid point are rounded to: std and mean to a sixteenth in 8 bits, to 2**-11 in float16."""
    off = 0.07 if dtype == torch.uint8 else 0.001
    x = group_of(128, 64)
    center = torch.zeros(1, 1, 1, 1, 64)
    y = dequantized(*quantize(x, everything(x), center, bits, dtype), center, bits)
    coded = torch.tensor(rank_widths(bits, 64)) > 0
    std_x, std_y = (t.std(3, unbiased=False).flatten()[coded] for t in (x, y))
    assert ((std_y / std_x - 1).abs() < off).all()
    assert ((y - x).mean(3).abs().flatten() <= off * (x.mean(3).abs() + x.std(3)).flatten()).all()
    assert (y.std(3).flatten()[~coded] == 0).all(), "without bits the mean is left"


def test_large_constant_parts_go_into_the_center() -> None:
    """A bias of a hundred times the spread, as some models have in keys, must not drown in the mid point's 8 bits."""
    x = group_of(128, 64) + 300.0
    near, far = x.mean(3, keepdim=True) + 0.1, torch.zeros(1, 1, 1, 1, 64)
    made = [dequantized(*quantize(x, everything(x), c, 3.0, torch.uint8), c, 3.0) for c in (near, far)]
    off = [(y - x).abs().mean().item() for y in made]
    assert off[0] < off[1] / 5, off


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_constant_channel_and_one_that_is_not_finite(dtype: torch.dtype) -> None:
    x = group_of(32, 64)
    x[..., 3], x[..., 5, 7], x[..., 9, 11] = 2.0, torch.nan, torch.inf
    center = torch.zeros(1, 1, 1, 1, 64)
    y = dequantized(*quantize(x, everything(x), center, 2.0, dtype), center, 2.0)
    assert ((y[..., 3] - 2.0).abs() < 0.2).all()
    assert y[..., [7, 11]].isnan().all() and not y[..., [0, 3, 8, 63]].isnan().any()


CONFIG = XQuantConfig(k_group_size=16, residual_length=32, sink_tokens=2)


def keys_state(max_len: int = 200, dim: int = 64, batch: int = 1, start: Tensor | None = None) -> KVState:
    return layers_of(CONFIG.replace(k_token_norms=False), (batch, 1, max_len, dim), torch.float32, start=start)[0][0]


def keys(count: int, dim: int = 64, batch: int = 1) -> Tensor:
    channel = torch.rand(dim, generator=seeded(3)) * 3
    return torch.randn(batch, 1, count, dim, generator=seeded(4)) * channel


def append(state: KVState, x: Tensor, past: int = 0) -> None:
    state.store(x, torch.arange(past, past + x.shape[2]))


def test_channels_are_ranked_by_what_queries_make_of_them() -> None:
    x, q = keys(100), torch.randn(1, 4, 100, 64, generator=seeded(5)) * torch.linspace(5, 0.01, 64)
    plain, shown = keys_state(), keys_state()
    append(plain, x)
    append(shown, x)
    shown.note_queries(q)
    groups = x[:, :, :80].unflatten(2, (5, 16)).clone()
    groups[:, :, 0, :2] = torch.nan  # the sinks take no part
    variance = (groups - groups.nanmean(3, keepdim=True)).square().nanmean((2, 3))
    for state, energy in ((plain, groups.square().nanmean((2, 3))), (shown, q.square().mean((1, 2))[None])):
        expected = (variance * energy).argsort(2, descending=True)
        assert torch.equal(state.owned["order"].long(), expected)
    assert not torch.equal(plain.owned["order"], shown.owned["order"])
    again = keys_state()
    again.note_queries(q)
    append(again, x)
    assert all(torch.equal(again.owned[n], shown.owned[n]) for n in again.owned), "it may be shown before or after"


def test_few_queries_and_later_ones_change_nothing() -> None:
    state, q = keys_state(), torch.rand(1, 4, 100, 64)
    state.note_queries(q[:, :, :15])
    assert not state.owned["energy"].any()
    append(state, keys(100))
    state.note_queries(q)
    before = {name: t.clone() for name, t in state.owned.items()}
    state.note_queries(2 * q + 1)
    assert all(torch.equal(before[name], state.owned[name]) for name in before)


def test_stored_groups_are_never_ranked_again() -> None:
    state, x = keys_state(), keys(180)
    x[:, :, 60:] = x[:, :, 60:].flip(3)  # what follows would be ranked the other way round
    append(state, x[:, :, :60])
    order, codes = state.owned["order"].clone(), state.owned["codes"].clone()
    for past in range(60, 180):
        append(state, x[:, :, past : past + 1], past)
    assert torch.equal(order, state.owned["order"])
    assert torch.equal(codes[..., :32], state.owned["codes"][..., :32]), "32 of the first 60 tokens were quantized"


def test_decode_from_nothing_ranks_the_first_group() -> None:
    state, x = keys_state(), keys(48)
    for past in range(48):
        append(state, x[:, :, past : past + 1], past)
        assert bool(state.owned["order"].any()) == (past >= 31), "with 32 tokens the first 16 are due"
    whole = keys_state()
    append(whole, x[:, :, :32])
    assert torch.equal(state.owned["order"], whole.owned["order"])


def test_a_padded_row_is_ranked_by_what_is_no_padding() -> None:
    state = keys_state(batch=2, start=torch.tensor([0, 40]))
    x = keys(100, batch=2)
    x[1, :, :40] = 1e4 * torch.rand(1, 40, 64)
    append(state, x)
    alone = keys_state(start=torch.tensor([40]))
    append(alone, x[1:])
    assert torch.equal(state.owned["order"][1], alone.owned["order"][0])
    assert torch.equal(state.owned["codes"][1, ..., 48:80], alone.owned["codes"][0, ..., 48:80])


def test_the_latest_tokens_and_the_sinks_are_exact() -> None:
    state, x = keys_state(), keys(100)
    append(state, x[:, :, :90])
    for past in range(90, 100):
        append(state, x[:, :, past : past + 1], past)
    seen = state.load(100)
    assert torch.equal(seen[:, :, :2], x[:, :, :2])
    assert torch.equal(seen[:, :, 80:], x[:, :, 80:]) and not torch.equal(seen[:, :, 79], x[:, :, 79])


def test_a_reset_cache_remembers_the_queries() -> None:
    state, q = keys_state(), torch.rand(1, 4, 100, 64, generator=seeded(6))
    state.note_queries(q)
    append(state, keys(100))
    before = {name: t.clone() for name, t in state.owned.items()}
    state.reset()
    assert not state.owned["order"].any() and not state.owned["codes"].any() and state.length == 0
    append(state, keys(100))
    assert all(torch.equal(before[name], state.owned[name]) for name in before)
