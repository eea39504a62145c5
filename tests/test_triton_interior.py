"""The kernel of whole groups: against the float64 truth in Triton's interpreter, when it runs, and its machine code."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from attention_cases import WHOLE_CASES, WHOLE_RANKED, WHOLE_SLOW, WHOLE_SPOILED, allowed
from test_triton_compile import decode_arguments, empty
from triton_compiled import compiled, launches
from triton_interpreter import Interpreter

from xquant_fx.kernels.decode_attention import triton_launch
from xquant_fx.kernels.decode_attention.triton_interior_settings import (
    Format,
    interior_planes,
    shared_bytes,
    tokens_of_tile,
    why_no_interior,
)
from xquant_fx.kernels.triton_device import LARGE, MOST_REGISTERS, Device, device_of

pytest.importorskip("triton")
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import sass_code
import sass_machine
import sass_model

pytest_plugins = ["triton_fixture"]

INTERIOR = ["interior_kernel", "decode_kernel", "combine_kernel"]


#: Case to the fast one that does the same beside other things.
COVERED = {
    "whole groups": "whole groups, an empty row, unwritten tokens",
    "whole groups, 16 rows, head_dim 64, 1 bit, small keys": "whole groups, head_dim 64, 1 bit, small keys",
    "ranked, whole groups": "ranked, whole groups, sinks, padding",
    "ranked, whole groups, 16 rows, padding": "whole groups, 16 rows, a mask a head; ranked, ..., sinks, padding",
}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow if name in {*WHOLE_SLOW, *COVERED} else ())
        for name in (*WHOLE_CASES, *WHOLE_RANKED, *WHOLE_SLOW)
    ],
)
def test_against_the_truth(name: str, interpreter: Interpreter) -> None:
    case = {**WHOLE_CASES, **WHOLE_RANKED, **WHOLE_SLOW}[name]
    result = interpreter.call("attention_runs:interpret", **case)
    assert result["kernels"] == INTERIOR
    assert result["same_nan"] and result["zeros_are_zero"] and result["largest"] > 0
    assert result["error"] <= allowed(result, case), result


@pytest.mark.parametrize("name", WHOLE_SPOILED)
def test_nan_propagates(name: str, interpreter: Interpreter) -> None:
    result = interpreter.call("attention_runs:interpret", **WHOLE_SPOILED[name])
    assert result["kernels"] == INTERIOR and result["same_nan"] and result["nans"]


LEFT_ALONE: dict[str, tuple[dict[str, Any], str]] = {
    "a chunk": (dict(query=64), "the query rows of a chunk keep a GPU busy"),
    "float32": (dict(dtype=torch.float32), "float32 products are not of the matrix unit's"),
    "a float mask": (dict(mask=torch.bfloat16), "a mask is added to the logits"),
    "small groups": (dict(k_group=16), "groups of 16 tokens are no multiple of 64"),
    "groups of half a word of 3 bits": (dict(k_group=32, v_bits=3), "groups of 32 tokens are no multiple of 64"),
    "groups of channels": (dict(v_group=32), "a token's values have several scales"),
    "bfloat16 scales": (dict(scales=torch.bfloat16), "scales are neither bytes nor float16 numbers"),
    "head_dim 512": (dict(dim=512), "head_dim is no multiple of 16 up to 256"),
    "head_dim 40": (dict(dim=40), "head_dim is no multiple of 16 up to 256"),
    "a short cache": (dict(max_len=512), "the cache is for fewer than 1024 tokens"),
}


@pytest.mark.parametrize("name", LEFT_ALONE)
def test_when_it_does_not_run(name: str) -> None:
    case, reason = LEFT_ALONE[name]
    given = decode_arguments(**case)
    assert why_no_interior(given, hip=False) == reason
    names = [one.kernel.fn.__name__ for one in launches(triton_launch.launch, given, hip=False)]
    assert names == INTERIOR[1:]


@pytest.mark.parametrize("ranked", [False, True])
def test_when_it_runs(ranked: bool) -> None:
    """Not on AMD's chips; and only beside windows and sinks a second program of the other kernel takes its edges."""
    residual = 256 if ranked else 128
    given = decode_arguments(ranked=ranked, residual=residual)
    assert why_no_interior(given, hip=True) and not why_no_interior(given, hip=False)
    for case, edges in ((dict(), 1), (dict(window=4096), 2), (dict(sinks=4), 2)):
        both = launches(triton_launch.launch, decode_arguments(ranked=ranked, residual=residual, **case), hip=False)
        assert [one.kernel.fn.__name__ for one in both] == INTERIOR
        assert both[1].arguments["SPLITS"] == edges
        assert both[0].options["num_warps"] == 1


def test_planes_have_32_fields_at_least() -> None:
    assert interior_planes(2, 128, True) == {"FOUR_WORDS": 4, "TWO_WORDS": 4, "ONE_WORDS": 2}
    assert interior_planes(2, 64, False) == {"FOUR_WORDS": 0, "TWO_WORDS": 4, "ONE_WORDS": 0}
    assert interior_planes(1, 64, True) == {"FOUR_WORDS": 0, "TWO_WORDS": 2, "ONE_WORDS": 1}


#: Instructions that a lane executes per code at most, and bytes a thread may spill, by configuration and chip.
MOST: dict[tuple[str, str], tuple[float, int]] = {
    **dict.fromkeys(
        [("2/2 bits", "sm_90"), ("2/2 bits", "sm_80"), ("2/1 bits", "sm_90"), ("2/1 bits", "sm_80")], (1.7, 0)
    ),
    **{(f"xquant-{bits}", chip): (2.1, 0) for bits in (1.4, 1.7, 2.2) for chip in ("sm_90", "sm_80")},
    **{("xquant-2.7", chip): (2.9, 0) for chip in ("sm_90", "sm_80")},
    ("2/2 bits, head_dim 64", "sm_90"): (2.4, 0),
    **{("2/2 bits, q = 8", chip): (3.6, 0) for chip in ("sm_90", "sm_80")},
    ("xquant-2.2, head_dim 64", "sm_90"): (3.0, 0),
    **{("xquant-2.2, q = 8", chip): (4.9, 0) for chip in ("sm_90", "sm_80")},
    **{
        (name, chip): (most, 0)
        for chip in ("sm_90", "sm_80")
        for name, most in {
            "3/3 bits": 3.4,
            "8/8 bits": 3.9,
            "2/2 bits, groups of 64": 2.2,
            "ranked 2/3 bits": 3.4,
            "ranked 3/3 bits": 3.5,
            "xquant-2.2, groups of 64": 2.7,
            "2/1 bits, q = 8": 3.6,
            "3/3 bits, q = 8": 6.2,
            "8/8 bits, q = 8": 6.6,
            "2/2 bits, groups of 32, q = 8": 4.7,
            "xquant-2.7, q = 8": 4.9,
            "xquant-1.4, q = 8": 4.9,
        }.items()
    },
    **{(f"{name}, q = 8", "sm_90"): (most, 0) for name, most in (("xquant-1.7", 4.9), ("ranked 2/3 bits", 6.4))},
    # A word or two that the loop does not want are in memory.
    ("2/2 bits, head_dim 256", "sm_90"): (1.8, 0),
    ("2/2 bits, head_dim 256", "sm_80"): (1.8, 8),
    **{("xquant-2.2, head_dim 256", chip): (3.2, 8) for chip in ("sm_90", "sm_80")},
    **{(f"{name}, q = 8", "sm_80"): (most, 8) for name, most in (("xquant-1.7", 4.9), ("ranked 2/3 bits", 6.4))},
    ("2/2 bits, groups of 32", "sm_80"): (3.1, 0),
}
QUICK = [("2/2 bits", "sm_80")]
NARROW = ["2/2 bits", "2/1 bits", "4/4 bits", "xquant-2.7", "xquant-2.2", "xquant-1.7", "xquant-1.4"]
NARROW += ["3/3 bits", "8/8 bits", "2/2 bits, groups of 64", "ranked 3/3 bits"]
#: (Name, head_dim, chip) to bytes that are kept in memory, up to five loads a tile: the compiler stops at 168
#: registers, with which twelve programs fit.
LEFT = {("4/4 bits", 64, "sm_90"): 40, ("2/2 bits, groups of 64", 64, "sm_90"): 8}


@pytest.mark.parametrize(
    ("name", "chip"), [case if case in QUICK else pytest.param(*case, marks=pytest.mark.slow) for case in MOST]
)
def test_instructions_per_code(name: str, chip: str) -> None:
    """The loop does not grow; decoded codes never pass through shared memory, which would be stores by the hundred."""
    case = sass_model.CONFIGURATIONS[name]
    made = sass_model.loop_of(case, chip)
    most, spilled = MOST[name, chip]
    assert made["warps"] == 1 and made["spilled"] <= spilled
    assert not {"LDL", "STL"} & {one.name.split(".")[0] for one in made["body"]}
    assert sass_model.instructions_a_code(made, case) <= most
    assert sass_code.count(made["body"], "kind")["STS"] <= 90  # what rows share: scales, norms, masks
    assert made["registers"] <= MOST_REGISTERS and made["shared"] <= most_shared(case) + SCRATCH


@pytest.mark.slow
@pytest.mark.parametrize("chip", ["sm_80", "sm_90"])
@pytest.mark.parametrize("dim", [64, 96])
@pytest.mark.parametrize("name", NARROW)
def test_narrow_heads_do_not_spill(name: str, dim: int, chip: str) -> None:
    """Planes of two words and of one, whose parts are halves and bytes; all presets but full precision."""
    case = dict(sass_model.CONFIGURATIONS[name], dim=dim)
    given = decode_arguments(**{**case, "sinks": 4} if case["ranked"] else case)
    interior, *_ = launches(triton_launch.launch, given, hip=False)
    assert compiled(interior, chip).spilled <= LEFT.get((name, dim, chip), 0)


#: Bytes that Triton may take for reductions beside the tiles.
SCRATCH = 4096


def most_shared(case: dict[str, Any]) -> int:
    """Shared memory of a program as the launcher estimates it."""
    a = decode_arguments(**case)
    stored = Format(a.k_order is not None, a.k_bits, int(a.v_bits), a.q.shape[3], a.v_ring.shape[3], a.k_group)
    return shared_bytes(stored, tokens_of_tile(stored, a.q.shape[1] // a.k_ring.shape[1] * a.q.shape[2]))


#: Multiprocessors, bytes of shared memory, KV heads, query tokens, and how many splits there are then.
CARDS = [
    (132, 228, 64, 1, 16),  # H100: 8 programs on each, one round for 64 heads
    (108, 164, 64, 1, 10),  # A100: 6, as shared memory says
    (128, 100, 64, 1, 8),  # RTX 4090: 4
    (132, 228, 8, 1, 122),  # few heads: all that run at a time, less what a round may lack
    (132, 228, 8, 8, 63),  # 32 query rows: two programs a head
    (24, 228, 192, 1, 1),  # a small one is full
    (16, 228, 192, 1, 2),  # one and a half rounds would leave it half empty: three
    (132, 0, 64, 1, 2),  # no room at all: a program each
]


@pytest.mark.parametrize(("multiprocessors", "shared", "kv_heads", "query", "splits"), CARDS)
def test_splits_fill_the_device(multiprocessors: int, shared: int, kv_heads: int, query: int, splits: int) -> None:
    """By what the estimate says that a device runs at a time; of both kernels, the other one's where it reads all."""
    device = Device(multiprocessors, shared=shared * 1024)
    given = decode_arguments(v_bits=2, kv_heads=kv_heads, query=query)
    interior, *_ = launches(triton_launch.launch, given, hip=False, device=device)
    assert interior.arguments["INTERIOR_SPLITS"] == splits
    floats = decode_arguments(v_bits=2, kv_heads=kv_heads, query=query, mask=torch.bfloat16)
    decode, _ = launches(triton_launch.launch, floats, hip=False, device=device)
    programs = decode.arguments["SPLITS"] * kv_heads * decode.arguments["ROW_BLOCKS"]
    at_a_time = multiprocessors * (2 if shared > 116 else 1)
    rounds = programs / at_a_time
    assert rounds / math.ceil(rounds) > 0.9


@pytest.mark.parametrize("ranked", [True, False])
def test_grids_of_long_chunks(ranked: bool) -> None:
    """CUDA's limits: 2**31 - 1 programs along the first dimension, 65,535 along others."""
    for query in (1, 65536):
        given = decode_arguments(query=query, kv_heads=32, max_len=65536, group=1, ranked=ranked, v_bits=2, mask=None)
        for launch in launches(triton_launch.launch, given, hip=False, device=LARGE):
            first, *others = launch.grid
            assert 0 < first < 2**31 and all(0 < programs <= 65535 for programs in others), launch.grid


def test_a_device_is_asked_what_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    cards = {
        "an A100": dict(multi_processor_count=108, regs_per_multiprocessor=65536, warp_size=32,
                        shared_memory_per_multiprocessor=164 * 1024, max_threads_per_multi_processor=2048),
        "an MI300X": dict(multi_processor_count=304, regs_per_multiprocessor=131072, warp_size=64,
                          shared_memory_per_multiprocessor=64 * 1024, max_threads_per_multi_processor=2048),
    }  # fmt: skip
    programs = {}
    for name, card in cards.items():
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device, card=card: SimpleNamespace(**card))
        programs[name] = device_of(torch.device("cuda")).programs(warps=4, shared=20000)
    assert programs == {"an A100": 2 * 108, "an MI300X": 2 * 304}
    assert device_of(torch.device("meta")) == LARGE


@pytest.mark.slow  # that such caches are the other kernel's: test_when_it_does_not_run
def test_what_float32_queries_pay() -> None:
    """A cache that the other kernel reads has another loop: more warps, more instructions per code."""
    made = sass_model.loop_of(dict(sass_model.PAPER, k_bits=2, v_bits=2, dim=64, mask=torch.bfloat16), "sm_80")
    assert made["warps"] == 4
    assert sass_model.instructions_a_code(made, dict(dim=64)) > 3


def text_of(lines: list[tuple[str, int, int, int, int]]) -> list[sass_code.Instruction]:
    """Instructions of (text, stall, scoreboard on write, scoreboards waited for, address of a branch or 0)."""
    return [
        sass_code.Instruction(16 * i, text.split()[0], text, stall, board, 7, waits, target or None)
        for i, (text, stall, board, waits, target) in enumerate(lines)
    ]


def test_the_machine_counts_latency_issue_and_memory() -> None:
    chip = sass_machine.CHIPS["A100"]
    chain = text_of([("LDG.E R0, [R2]", 1, 0, 0, 0), ("FADD R1, R0, R0", 4, 7, 1, 0)])
    one = sass_machine.Multiprocessor(chain, chip, 1, 1, 4.0).cycles_a_tile(40)
    assert one == pytest.approx(chip.memory_latency, rel=0.05)  # a warp alone waits for each load
    many = sass_machine.Multiprocessor(chain, chip, 8, 1, 4.0).cycles_a_tile(40)
    assert one / 10 < many < one / 6  # eight warps wait at the same time
    bytes_a_tile = 4000.0
    full = sass_machine.Multiprocessor(chain, chip, 16, 1, bytes_a_tile).cycles_a_tile(12)
    assert full == pytest.approx(bytes_a_tile / chip.bytes_a_cycle, rel=0.1)  # until the memory is busy
    busy = text_of([("IADD3 R0, R1, R2, R3", 1, 7, 0, 0)] * 40)
    adds = sass_machine.Multiprocessor(busy, chip, 16, 1, 0.0).cycles_a_tile(12)
    assert adds == pytest.approx(40 * chip.rates["alu"] / 4, rel=0.1)  # the ALU takes one every other cycle


def test_the_usual_path_skips_what_forward_branches_skip() -> None:
    body = text_of([("FADD R1, R0, R0", 1, 7, 0, 0), ("BRA 0x30", 1, 7, 0, 0x30), ("FSEL R1, R0, R0", 1, 7, 0, 0),
                    ("MUFU R1, R0", 1, 7, 0, 0), ("BRA 0x0", 1, 7, 0, 0)])  # fmt: skip
    assert [one.name for one in sass_code.usual_path(body)] == ["FADD", "BRA", "MUFU", "BRA"]


def test_a_branch_of_lanes_that_diverged_skips_nothing() -> None:
    one = sass_code._instruction(0, "BRA.DIV UR17, 0xae70", 0)
    assert one.target is None and sass_code._instruction(0, "@!P0 BRA 0x6240", 0).target == 0x6240


def test_packing_halves_is_no_slow_conversion() -> None:
    assert sass_code._instruction(0, "F2FP.F16.F32.PACK_AB R0, R1, R2", 0).pipe == "alu"
    assert sass_code._instruction(0, "F2F.F64.F32 R0, R2", 0).pipe == "xu"


def test_programs_of_a_multiprocessor() -> None:
    chip = sass_machine.CHIPS["H100"]
    assert chip.programs(255, 24576, 1) == 8  # by registers
    assert sass_machine.CHIPS["A100"].programs(168, 24576, 1) == 6  # by shared memory
    assert chip.programs(32, 0, 4) == 16  # by warps


@pytest.mark.parametrize("mask", [None, torch.bool])
def test_programs_that_read_the_mask_of_tokens_to_come(mask: torch.dtype | None) -> None:
    given = decode_arguments(max_len=131072, mask=mask)
    interior, decode, _ = launches(triton_launch.launch, given, hip=False)
    assert decode.arguments["PARTS"] - interior.arguments["INTERIOR_SPLITS"] == (3 if mask is None else 16)


def test_rows_that_differ_in_their_masks_read_them() -> None:
    a = decode_arguments(query=8)
    own, full = sass_model.bytes_a_token(a)
    less, same = sass_model.bytes_a_token(a.replace(mask=empty(1, 1, 1, a.max_len, dtype=torch.bool)))
    assert own == less + 7 and full == same == 512
