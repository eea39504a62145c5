"""The Triton kernels of decode attention, run by Triton's interpreter, against the float64 truth.

The interpreter computes float16 and float32 as a GPU does, but for the order of sums; bfloat16 it gets
wrong, so there the kernels are told to compute in float32 and only reading and writing is tested.
"""

from __future__ import annotations

import pytest
from attention_cases import (
    CASES,
    RANKED_CASES,
    RANKED_SLOW,
    RANKED_SPOILED,
    REPEATED,
    ROW_CASES,
    ROWS_QUICK,
    SPOILED,
    WHOLE_ROWS,
    allowed,
)
from fast_and_slow import fast_but
from triton_interpreter import Interpreter

pytest.importorskip("triton")
pytest_plugins = ["triton_fixture"]
#: Long to interpret: many programs, or many rows. Of each option there is another case.
LONG = {
    "one token outweighs all others, float16, 2 bits", "a prompt", "a prompt on a long past",
    "a chunk of odd head_dims", "ranked, 3 query tokens, padding", "ranked, more rows than a program takes",
    "ranked, several tiles a split",
}  # fmt: skip
#: Case to the fast one that has its options, too.
COVERED = {
    "a chunk": "a chunk over the sink tokens; rows",
    "a chunk, float32": "a chunk in the window; nothing before, 5 tokens",
    "a chunk with alibi, small groups": "a chunk in the window; alibi; groups of one",
    "batch, heads, padding": "alibi; one query head",
    "head_dim 256": "test_with_the_tiles_of_amd; ranked, the default lengths",
    "a bias a token": "alibi; rows of the least number",
    "sink tokens": "many sink tokens, window; sinks of tokens to come",
    "another head_dim of values": "ranked, head_dim 48, values 24",
    "loud channels": "float32 scales",
    "small groups, sink tokens": "groups of one; many sink tokens, window",
    "ranked, float32": "ranked, token norms, float32, softcap, window",
    "ranked, sink tokens": "ranked, values that came rotated; ranked, token norms, float32, softcap, window",
    "ranked, values of 3 bits, groups of channels, float32": "ranked, float16 scales, float32, or groups of channels",
    "ranked, a chunk, float32, softcap, window": "ranked, token norms, a chunk",
    "ranked, one token outweighs all others": "one token outweighs all others, float32, 2 bits",
    "ranked, token norms": "ranked, token norms, float32, softcap, window",
    "ranked, one query head": "ranked, float16; one query head",
    "ranked, full": "full",
    "ranked, nothing before": "ranked, the first key in codes",
    "ranked, alibi, float32": "alibi",
    "ranked, one group in the window": "ranked, the default lengths",
    "ranked, keys later than values": "ranked, values that came rotated",
    "ranked, keys or values later, in turns": "ranked, values that came rotated",
    "ranked, loud channels": "ranked, float16 scales, groups of channels",
    "ranked, an empty row with sink logits": "an empty row with sink logits",
    "ranked, head_dim 96, keys 1.5, values 2 bits": "test_with_the_tiles_of_amd",
    "ranked, head_dim 80, keys 2, values 1 bits": "ranked, token norms, float32, softcap, window",
    "ranked, head_dim 64, keys 3, values 1 bits": "ranked, head_dim 48, values 24",
    "ranked, head_dim 128, keys 4, values 4 bits": "ranked, head_dim 8",
    "ranked, many sink tokens, window": "ranked, sink tokens; many sink tokens, window",
    "ranked, window in the ring": "window in the ring",
    "ranked, no mask, softcap, window": "ranked, token norms, float32, softcap, window",
}
SLOW = {*REPEATED, *RANKED_SLOW, *LONG, *COVERED} - {"ranked, token norms, a chunk"}
AMD = (
    "float16",
    "float32",
    "head_dim 256",
    "odd groups",
    "ranked, float32",
    "ranked, head_dim 96, keys 1.5, values 2 bits",
)


@pytest.mark.parametrize(
    "name",
    fast_but((*CASES, *RANKED_CASES, *RANKED_SLOW), SLOW),
)
def test_against_the_truth(name: str, interpreter: Interpreter) -> None:
    case = {**CASES, **RANKED_CASES, **RANKED_SLOW}[name]
    result = interpreter.call("attention_runs:interpret", **case)
    assert result["same_nan"] and result["zeros_are_zero"]
    assert result["largest"] > 0
    assert result["error"] <= allowed(result, case), result


@pytest.mark.parametrize(
    "name", [n if n in ROWS_QUICK else pytest.param(n, marks=pytest.mark.slow) for n in (*ROW_CASES, *WHOLE_ROWS)]
)
def test_rows_of_lengths_of_their_own(name: str, interpreter: Interpreter) -> None:
    """Each against the truth of a batch of one; nothing is stored of some, and one is full."""
    case = {**ROW_CASES, **WHOLE_ROWS}[name]
    for row in interpreter.call("attention_runs:interpret_rows", **case):
        assert row["kernels"] == ["interior_kernel"] * (name in WHOLE_ROWS) + ["decode_kernel", "combine_kernel"]
        assert row["same_nan"] and row["zeros_are_zero"]
        assert row["error"] <= allowed(row, case), row


@pytest.mark.parametrize("name", [*AMD, "groups of 32 in blocks of 64"])
def test_with_the_tiles_of_amd(name: str, interpreter: Interpreter) -> None:
    case = {**CASES, **RANKED_CASES, "groups of 32 in blocks of 64": dict(residual=64, k_group=32)}[name]
    result = interpreter.call("attention_runs:interpret", hip=True, **case)
    assert result["same_nan"] and result["largest"] > 0
    assert result["error"] <= allowed(result, case), result


#: Each tensor with groups of one size or the other, and with scales of one kind or the other.
QUICK_SPOILED = {
    "key.zero, 8 a group", "key.scale, 32 a group", "value.zero, 32 a group", "value.scale, 8 a group",
    "ranked, key.scale", "ranked, key.center, float16 scales", "ranked, value.scale, float16 scales",
}  # fmt: skip


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=() if n in QUICK_SPOILED else pytest.mark.slow) for n in (*SPOILED, *RANKED_SPOILED)],
)
def test_nan_propagates(name: str, interpreter: Interpreter) -> None:
    case = {**{**SPOILED, **RANKED_SPOILED}[name], "past": 100}
    result = interpreter.call("attention_runs:interpret", **case)
    assert result["same_nan"] and result["nans"]
    assert result["error"] <= allowed(result, case), result
