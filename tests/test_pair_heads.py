"""Calls of the op give each query head its own heads of keys and values."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xquant_fx.passes.pair_heads import MOST_CALLS, paired
from xquant_fx.passes.records import HeadPart, Pairing


def read(pairing: Pairing, heads: int, kv_heads: int) -> list[tuple[int, int]]:
    """The heads of keys and values that each of the program's query heads reads in these calls."""
    order = list(range(heads))
    if pairing.turned is not None:
        a, b, c = pairing.turned
        assert a * b * c == heads
        order = [(j * b + i) * c + k for i in range(b) for j in range(a) for k in range(c)]
    every = slice(0, kv_heads)
    out: list[tuple[int, int]] = [(-1, -1)] * heads
    for query, keys, values in pairing.parts or [HeadPart(slice(0, heads), every, every)]:
        pairs = list(zip(range(kv_heads)[keys], range(kv_heads)[values], strict=True))
        group, rest = divmod(query.stop - query.start, len(pairs))
        assert not rest
        for i in range(query.start, query.stop):
            out[order[i]] = pairs[(i - query.start) // group]
    return out


@st.composite
def repeated(draw: st.DrawFn) -> list[int]:
    """Some of 4 heads, repeated in front and behind, 8 in all."""
    first, count = draw(st.sampled_from([(0, 4), (0, 2), (2, 2), (1, 1), (3, 1)]))
    tile = draw(st.sampled_from([n for n in (1, 2, 4, 8) if count * n <= 8]))
    return [first + i for _ in range(tile) for i in range(count) for _ in range(8 // count // tile)]


@settings(max_examples=200, deadline=None)
@given(repeated(), st.one_of(repeated(), st.none()))
def test_each_query_head_reads_its_own(keys: list[int], values: list[int] | None) -> None:
    values = keys if values is None else values
    pairing = paired(keys, values, 4)
    if not isinstance(pairing, str):
        assert read(pairing, 8, 4) == list(zip(keys, values, strict=True))
        assert len(pairing.parts) <= MOST_CALLS
    else:
        assert keys != values and "order" in pairing


@pytest.mark.parametrize(
    ("keys", "values", "expected"),
    [
        ([0, 0, 1, 1], [0, 0, 1, 1], Pairing()),
        ([0, 1, 0, 1], [0, 1, 0, 1], Pairing((2, 2, 1))),
        ([0, 1], [1, 1], Pairing(None, (HeadPart(*[slice(0, 1)] * 2, slice(1, 2)), HeadPart(*[slice(1, 2)] * 3)))),
        ([0, 0, 0, 1], [0, 0, 0, 1], "query heads read keys and values in an order that is not understood"),
        ([1, 0, 2, 3], [1, 0, 2, 3], "query heads read keys and values in an order that is not understood"),
        (range(5), [4, 3, 2, 1, 0], "query heads read keys and values in an order that takes 5 calls, more than 4"),
    ],
)
def test_pairings(keys: list[int], values: list[int], expected: Pairing | str) -> None:
    assert paired(keys, values, max(*keys, *values) + 1) == expected
