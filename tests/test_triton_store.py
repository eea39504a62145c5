"""The Triton kernels that append a step, in the interpreter, against the float64 reference and the ops.

The interpreter cuts numbers off where it should round them to bfloat16, so nothing here is rounded to it.
"""

from __future__ import annotations

from typing import Any

import pytest
from bad_positions import STEPS
from fast_and_slow import fast_but
from ranked_store import RANKED, RANKED_SCRIPT, RANKED_SHAPE, RANKED_SLOW, check_ranked
from triton_interpreter import Interpreter

from xquant_fx.kernels.faults import Fault

pytest.importorskip("triton")
pytest_plugins = ["triton_fixture"]

SCRIPT = [19, 1, 2, 3, 5, 6, 7, 8, 20, 3, -8, 5, 4]
SHAPE = dict(residual=16, group=8, max_len=110, eta=0.1, batch=1)
CASES: dict[str, dict[str, Any]] = {
    **{
        f"{side}s, {bits} bits": dict(side=side, bits=bits, **SHAPE)
        for side in ("key", "value")
        for bits in (1, 2, 3, 4, 8)
    },
    **{
        f"{side}s, head_dim {dim}, {dtype}": dict(
            side=side, dim=dim, dtype=dtype, bits=bits, fit="minmax", **{**SHAPE, "group": 8 if side == "key" else dim}
        )
        for side in ("key", "value")
        for dim, dtype, bits in ((8, "float16", 1), (96, "bfloat16", 4), (40, "float32", 3), (64, "float16", 2))
    },
    "not shared": dict(side="key", shared=False, **SHAPE),
    "one group of 24 tokens": dict(side="key", residual=24, group=24, max_len=110),
    "one group of 96 channels": dict(side="value", dim=96, residual=24, group=96, max_len=110),
    "groups of 24 channels": dict(side="value", dim=96, residual=8, group=24, max_len=110),
    "blocks below a step": dict(side="key", residual=4, group=2, max_len=110),
    "blocks of one": dict(side="key", residual=1, group=1, max_len=110, batch=1),
    "a window below a step": dict(side="value", residual=2, group=8, max_len=110, bits=8),
    "sinks, padding": dict(side="key", sinks=5, padding=[0, 7], **{**SHAPE, "batch": 2}),
    "sinks, padding, values": dict(side="value", sinks=5, padding=[3], **SHAPE),
    "float32 scales": dict(side="key", scale_dtype="float32", scale=1e-3, **SHAPE),
    "loud values": dict(side="value", scale=64.0, **SHAPE),
    "scales that do not fit": dict(side="key", scale=2.0**14, **SHAPE),
}  # fmt: skip


#: Six steps, of which two fill a group of keys, in the place of SCRIPT's ten, of each number of tokens.
SHORT_SCRIPT = [19, 8, 8, 3, 20, 1, -8, 7, 8]
#: Of 1, 3 and 8 tokens; the chunk before them is stored by the ops.
SHORT_RANKED_SCRIPT = [30, 8, 3, 8, 1, 8, -5, 8, 8]
#: Case to what has its options, too: these are slow.
COVERED = {
    "keys, 4 bits": "values, 4 bits; test_same_as_the_ops",
    "values, 1 bits": "keys, 1 bits",
    "values, 2 bits": "keys, 2 bits; test_same_as_the_ops",
    "values, 3 bits": "values, head_dim 40, float32",
    "values, 8 bits": "a window below a step",
    "keys, head_dim 96, bfloat16": "values, head_dim 96, bfloat16",
    "keys, head_dim 40, float32": "test_same_as_the_ops",
    "keys, head_dim 64, float16": "keys, head_dim 8, float16",
    "values, head_dim 8, float16": "keys, head_dim 8, float16",
    "values, head_dim 64, float16": "one group of 96 channels",
    "groups of 24 channels": "values, 4 bits; test_ranked_and_rotated_as_the_ops",
    "blocks below a step": "blocks of one",
    "loud values": "scales that do not fit",
}
#: The same of ranked keys and rotated values.
RANKED_COVERED = {
    "keys, head_dim 64, 2 bits": "keys, as the queries say",
    "keys, head_dim 96, 1 bits": "keys, head_dim 80, 1.5 bits",
    "keys, sinks, padding": "keys, token norms",
    "keys, token norms, odd head_dim, quantized at once": "keys, token norms; keys, several groups a step",
    "values, head_dim 64, groups of 64, 2 bits": "loud values",
    "values, head_dim 24, groups of 24, 4 bits": "values, head_dim 96, groups of 24, 2 bits",
    "values, head_dim 128, groups of 128, 1 bits": "values, head_dim 80, groups of 80, 1 bits",
    "values, head_dim 64, groups of 32, 3 bits": "values, float16 scales",
}


PLAYED = [name for name in CASES if name != "scales that do not fit"]


@pytest.mark.parametrize("name", [name for name in PLAYED if name not in COVERED])
def test_steps_chunks_and_rollbacks(name: str, interpreter: Interpreter) -> None:
    interpreter.call("triton_store_runs:play", script=SHORT_SCRIPT, **CASES[name])


@pytest.mark.parametrize("name", fast_but(PLAYED, {*PLAYED} - {"keys, 3 bits", "values, 4 bits"}))
def test_steps_of_each_number_of_tokens(name: str, interpreter: Interpreter) -> None:
    interpreter.call("triton_store_runs:play", script=SCRIPT, **CASES[name])


OF_OPS_SLOW = ("groups of 24 channels", "a window below a step", "keys, 1 bits", "values, 8 bits", "float32 scales")
OF_OPS = [name for i, name in enumerate(CASES) if i % 3 == 0 or "fit" in name]


@pytest.mark.parametrize("name", fast_but(OF_OPS, OF_OPS_SLOW))
def test_same_as_the_ops(name: str, interpreter: Interpreter) -> None:
    """Bit for bit, but for scales fitted by least squares, whose sums have another order."""
    found = interpreter.call("triton_store_runs:differences", script=[19, 1, 8, 5, 7, 1, 20, 6], **CASES[name])
    fitted = CASES[name].get("shared", True) and CASES[name].get("fit", "least_squares") == "least_squares"
    assert not any(count for tensor, count in found.items() if not (fitted and tensor in ("scale", "zero"))), found


@pytest.mark.parametrize(
    ("name", "shared"),
    [
        ("sinks, padding", True), ("sinks, padding, values", False),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (
            ("sinks, padding", False), ("sinks, padding, values", True),
        )),
    ],
)  # fmt: skip
def test_a_cache_filled_by_steps(name: str, shared: bool, interpreter: Interpreter) -> None:
    """From the first token on, so that groups with padding and sinks among them are quantized by the kernel."""
    interpreter.call("triton_store_runs:play", script=[8, 7, 3, 8, 6], **{**CASES[name], "shared": shared})


#: What is no number, and what is too large, on a side each; the finite one, whose range is not, on both.
BAD_SIDES = [
    ("key", "nan"), ("value", "inf"), ("key", "large"), ("value", "large"),
    *(pytest.param(*case, marks=pytest.mark.slow) for case in (("key", "inf"), ("value", "nan"))),
]  # fmt: skip


@pytest.mark.parametrize(("side", "bad"), BAD_SIDES)
def test_what_cannot_be_represented(side: str, bad: str, interpreter: Interpreter) -> None:
    found = interpreter.call(
        "triton_store_runs:differences", script=[5, 1, 8, 5, 7, 1, 1], spoil=bad, side=side, shared=False, **SHAPE
    )
    assert not any(found.values()), found


@pytest.mark.parametrize("name", [name for name in RANKED if name not in RANKED_COVERED])
def test_ranked_and_rotated_as_the_ops(name: str, interpreter: Interpreter) -> None:
    case = {"script": SHORT_RANKED_SCRIPT, **RANKED[name]}
    check_ranked(interpreter.call("triton_store_runs:ranked_differences", **case))


@pytest.mark.slow
@pytest.mark.parametrize("name", [*RANKED, *RANKED_SLOW])
def test_ranked_and_rotated_from_the_first_token_on(name: str, interpreter: Interpreter) -> None:
    case = {"script": RANKED_SCRIPT, **{**RANKED, **RANKED_SLOW}[name]}
    check_ranked(interpreter.call("triton_store_runs:ranked_differences", **case))


@pytest.mark.parametrize(("side", "bad"), BAD_SIDES)
def test_ranked_what_cannot_be_represented(side: str, bad: str, interpreter: Interpreter) -> None:
    shape = {**RANKED_SHAPE, "dim": 16, "residual": 16, "group": 8 if side == "key" else 16}
    script = [5, 1, 8, 5, 7, 1, 1, 8, 8]
    found = interpreter.call("triton_store_runs:ranked_differences", script=script, spoil=bad, side=side, **shape)
    check_ranked(found)
    assert found["nans"][0] > 0


@pytest.mark.parametrize(
    ("side", "ranked"),
    [
        ("key", True), ("value", False),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (("key", False), ("value", True))),
    ],
)  # fmt: skip
def test_faults_and_lengths(side: str, ranked: bool, interpreter: Interpreter) -> None:
    """In order, back by 8 and by more, a gap, a jump, past the end, a full cache from 0 on."""
    ranges = [(0, 5), (5, 8), (13, 2), (9, 4), (13, 8), (21, 8), (29, 1), (20, 3), (29, 1), (40, 2), (57, 5), (0, 3)]
    steps = [list(range(first, first + count)) for first, count in ranges]
    seen = interpreter.call("triton_store_runs:faults", steps=[*steps, [3, 5]], side=side, ranked=ranked)
    assert all(ours == theirs for ours, theirs in seen), seen
    assert {ours[0] for ours, _ in seen} == {0, *Fault}


@pytest.mark.parametrize("side", ["key", "value"])
@pytest.mark.parametrize("what", STEPS)
def test_positions_that_do_not_follow(side: str, what: str, interpreter: Interpreter) -> None:
    stored, positions, fault = STEPS[what]
    ours, theirs = interpreter.call("triton_store_runs:fault_of", stored=stored, positions=positions, side=side)
    assert ours == theirs and ours[0] == fault


#: Positions [3, q] after prompts of 22, 5 and 13 tokens: rows go on, are idle, begin anew, go back, one by one.
ROWS = [
    [[22], [5], [13]], [list(range(23, 31)), list(range(5, 13)), list(range(14, 22))],
    [list(range(31, 39)), list(range(13, 21)), list(range(14, 22))], [[0], [21], [21]], [[1, 2], [22, 23], [22, 23]],
]  # fmt: skip
LENGTHS_AFTER = [[3, 3], [24, 24], [24, 24]]
#: What is no append to each: too far back, a jump, past the end; one fault does not hide another row's.
BAD_ROWS = [[10, 11], [6, 8], [47, 48]]
BOTH = {
    "default schemes": dict(k_bits=2, v_bits=2, k_group_size=16, residual_length=32, sink_tokens=4),
    "range codes, shared": dict(
        k_scheme="per_channel", v_scheme="per_token", k_bits=2, v_bits=1, k_group_size=8, residual_length=16,
        share_keys_from=0, share_values_from=0, shared_fit="minmax",
    ),
    "ranked keys, values of range codes": dict(
        v_scheme="per_token", k_bits=1.5, v_bits=3, v_group_size=8, k_group_size=8, k_residual_length=16,
        v_residual_length=2, k_token_norms=True,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BOTH)
def test_keys_and_values_in_one_launch(name: str, interpreter: Interpreter) -> None:
    """As the ops store them one by one; and a fault that both sides find is left once."""
    script = [8, 7, 8, 8, 8, 6]
    found = interpreter.call("triton_store_runs:both", script=script, config=BOTH[name], positions=[45, 47])
    assert found.pop("launched") == ["append_kernel"] * (2 * len(script) + 1)
    assert found.pop("faults_before") == [0, 0] and found.pop("faults") == [Fault.NOT_CONSECUTIVE] * 2
    assert found.pop("off") < 1e-3 and not any(found.values()), found  # a code may lie at a tie


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("default schemes", 1), ("range codes, shared", 2),
        pytest.param("ranked keys, values of range codes", 1, marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_rows_of_lengths_of_their_own(name: str, layers: int, interpreter: Interpreter) -> None:
    """As the ops store them row by row, in one launch for both sides."""
    config = {**BOTH[name], "sink_tokens": 2, "rollback_tokens": 8}
    given = dict(lengths=[22, 5, 13], script=ROWS, config=config, layers=layers)
    found = interpreter.call("triton_store_runs:rows", **given)
    assert found.pop("launched") == ["append_kernel"] * (layers * len(ROWS))
    assert all(ours == theirs for ours, theirs in found["lengths"]) and found.pop("lengths")[-1][0] == LENGTHS_AFTER
    assert found.pop("faults") == [[0, 0, 0]] * 2
    assert found.pop("off") < 1e-3 and not any(found.values()), found  # a code may lie at a tie


def test_each_row_has_a_fault_of_its_own(interpreter: Interpreter) -> None:
    config = {**BOTH["range codes, shared"], "rollback_tokens": 8}
    expected = [Fault.ROLLED_BACK_TOO_FAR, Fault.NOT_CONSECUTIVE, Fault.FULL]
    for lengths, script, codes in (
        ([22, 5, 13], [[[22], [5], [13]], BAD_ROWS], expected),
        ([48, 5, 13], [[[0], [7], [13]]], [Fault.RESTARTED, Fault.NOT_APPENDED, 0]),
    ):
        found = interpreter.call("triton_store_runs:rows", lengths=lengths, script=script, config=config)
        assert found["faults"] == [codes, codes] and found["length"] == 0, found
