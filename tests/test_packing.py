"""The bit layout that packing.py states, checked with plain Python integers."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from states import bare_spec
from torch import Tensor

from xquant_fx.kernels.packing import (
    BITS,
    FIELD_WIDTHS,
    code_planes,
    codes_per_block,
    high_and_low,
    pack_words,
    plane_widths,
    shifts,
    unpack_words,
    word_count,
)

QUANTIZED = BITS[:-1]
#: Widths of the planes of codes, and how many bits of the code are below each.
PLANES = {1: [(1, 0)], 2: [(2, 0)], 3: [(2, 1), (1, 0)], 4: [(4, 0)], 8: [(8, 0)]}
few = settings(max_examples=50, deadline=None)


def word_of(codes: list[int], bits: int) -> int:
    """Code r in byte r % 4, at bit ``bits * (r // 4)`` of that byte; byte 0 is the lowest; signed 32 bits."""
    data = bytearray(4)
    for r, code in enumerate(codes):
        data[r % 4] |= code << (bits * (r // 4))
    return int.from_bytes(data, "little", signed=True)


def words_of(codes: list[int], bits: int) -> list[int]:
    """The words of ``codes``, plane by plane."""
    words = []
    for width, shift in PLANES[bits]:
        fields, per = [c >> shift & (2**width - 1) for c in codes], 32 // width
        words += [word_of(fields[i : i + per], width) for i in range(0, len(codes), per)]
    return words


def random_codes(shape: tuple[int, ...], bits: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 2**bits, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("bits", FIELD_WIDTHS)
def test_where_each_code_of_a_word_sits(bits: int) -> None:
    per = 32 // bits
    for r in range(per):
        only = [2**bits - 1 if i == r else 0 for i in range(per)]
        word = pack_words(torch.tensor(only), bits, 0)
        assert word.tolist() == [word_of(only, bits)]
        assert int(word) & 0xFFFFFFFF == (2**bits - 1) << int(shifts(bits, word.device)[r])


@pytest.mark.parametrize("bits", FIELD_WIDTHS)
def test_one_shift_and_one_mask_give_four_neighbours(bits: int) -> None:
    """Bytes of ``(word >> bits * i) & mask`` are codes 4 i to 4 i + 3: what integer dot products take."""
    per = 32 // bits
    codes = random_codes((per,), bits)
    word = int(pack_words(codes, bits, 0)) & 0xFFFFFFFF
    mask = (2**bits - 1) * 0x01010101
    for i in range(per // 4):
        four = ((word >> (bits * i)) & mask).to_bytes(4, "little")
        assert list(four) == codes[4 * i : 4 * i + 4].tolist()


@few
@given(
    bits=st.sampled_from(QUANTIZED),
    shape=st.lists(st.integers(1, 5), min_size=0, max_size=3),
    length=st.integers(1, 70),
    place=st.integers(0, 3),
    dtype=st.sampled_from((torch.int32, torch.int64, torch.uint8)),
    seed=st.integers(0, 99),
)
def test_packing_along_any_dimension(bits, shape, length, place, dtype, seed) -> None:
    dim = min(place, len(shape))
    shape = (*shape[:dim], length, *shape[dim:])
    codes = random_codes(shape, bits, seed)
    words = pack_words(codes.to(dtype), bits, dim)
    assert words.dtype == torch.int32
    assert words.shape == (*shape[:dim], word_count(bits, length), *shape[dim + 1 :])
    rows, packed = codes.movedim(dim, -1).reshape(-1, length), words.movedim(dim, -1).reshape(-1, words.shape[dim])
    for row, got in zip(rows.tolist(), packed.tolist(), strict=True):
        assert got == words_of(row, bits)
    assert torch.equal(words, pack_words(codes, bits, dim - len(shape)))
    assert torch.equal(unpack_words(words, bits, dim, length), codes.int())
    assert torch.equal(unpack_words(words, bits, dim - len(shape), length), codes.int())


@pytest.mark.parametrize("bits", QUANTIZED)
def test_where_planes_are(bits: int) -> None:
    """Known from the number of words alone, for any number of codes."""
    assert list(plane_widths(bits)) == [width for width, _ in PLANES[bits]] and sum(plane_widths(bits)) == bits
    assert high_and_low(bits) == (*plane_widths(bits), 0)[:2]
    for length in range(1, 200):
        planes = code_planes(bits, word_count(bits, length))
        assert [(p.width, p.shift) for p in planes] == PLANES[bits]
        assert [p.words for p in planes] == [math.ceil(length * p.width / 32) for p in planes]
        assert [p.first for p in planes] == [0, *(p.words for p in planes[:-1])]
    assert codes_per_block(bits) == max(32 // width for width, _ in PLANES[bits])


@few
@given(bits=st.sampled_from(QUANTIZED), blocks=st.integers(1, 4), data=st.data())
def test_every_word_unpacks_to_codes_that_pack_to_it(bits: int, blocks: int, data) -> None:
    """No bit of a word is spare, the sign bit included."""
    length = blocks * codes_per_block(bits)
    count = length * bits // 32
    words = data.draw(st.lists(st.integers(-(2**31), 2**31 - 1), min_size=count, max_size=count))
    given_words = torch.tensor(words, dtype=torch.int32)
    codes = unpack_words(given_words, bits, 0, length)
    assert int(codes.min()) >= 0 and int(codes.max()) < 2**bits
    assert torch.equal(pack_words(codes, bits, 0), given_words)


@few
@given(
    bits=st.sampled_from(QUANTIZED),
    side=st.sampled_from(("key", "value")),
    max_len=st.integers(1, 300),
    residual=st.integers(1, 40),
    dim=st.sampled_from((8, 16, 24, 32, 96)),
)
def test_stored_shapes(bits: int, side: str, max_len: int, residual: int, dim: int) -> None:
    """Keys [B, H, words of D, tokens], values [B, H, words of tokens, D]; tokens cover max_cache_len."""
    group = 1 if side == "key" else dim // 2
    spec = bare_spec(
        role=side, scheme="per_channel" if side == "key" else "per_token", shape=(2, 3, max_len, dim),
        dtype=torch.float16, bits=bits,
        group_size=group, residual_length=residual, sink_tokens=2, scale_dtype=torch.bfloat16,
    )  # fmt: skip
    shapes, per, tokens = spec.tensor_shapes(), codes_per_block(bits), spec.stored_tokens
    unit = residual if side == "key" else per
    spare = 1 if side == "key" else max(1, math.ceil(16 / dim))  # rows of values hold a vector's last load
    assert tokens % unit == 0 and max_len + spare * unit <= tokens < max_len + (spare + 1) * unit
    if side == "key":
        expected = {"codes": (2, 3, word_count(bits, dim), tokens), "scale": (2, 3, tokens, dim)}
    else:
        expected = {"codes": (2, 3, tokens * bits // 32, dim), "scale": (2, 3, 2, tokens)}
    expected |= {"zero": expected["scale"], "ring": (2, 3, residual + 8, dim), "sink": (2, 3, 3, dim), "length": (2,)}
    assert {name: shape for name, (shape, _) in shapes.items()} == expected
    dtypes = {"codes": torch.int32, "scale": torch.bfloat16, "zero": torch.bfloat16, "length": torch.int64}
    assert all(dtype == dtypes.get(name, torch.float16) for name, (_, dtype) in shapes.items())
