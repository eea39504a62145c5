"""The C++ kernel of decode attention against the float64 truth, for every width of vectors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from attention_cases import CASES, RANKED_CASES, RANKED_SLOW, REPEATED, allowed
from attention_runs import Setup, arguments, errors, inputs, reference
from fast_and_slow import fast_but
from torch.utils._python_dispatch import TorchDispatchMode

from xquant_fx import ops
from xquant_fx.kernels.cpu import build as cpu_build
from xquant_fx.kernels.cpu.isa import ISAS, Isa
from xquant_fx.kernels.decode_attention.arguments import DecodeArguments
from xquant_fx.kernels.decode_attention.cpu_call import attend_chunk, empty_output, problem_of, run_cpu, sizes_given
from xquant_fx.kernels.decode_attention.cpu_source import ONE_DIGIT_BITS, digits, source
from xquant_fx.kernels.decode_attention.plain_torch import attend
from xquant_fx.kernels.schemes import per_channel, per_token

EVERY: dict[str, dict[str, Any]] = {**CASES, **RANKED_CASES}
#: These share their kernels with other cases, as steps after other numbers of tokens do.
SHARING = {
    "a chunk on nothing": {**CASES["a chunk"], "past": 0},
    "ranked, float16, the first key in codes": {**RANKED_CASES["ranked, float16"], "past": 32},
}
#: Options of several cases together, which do not touch one another: each case has a kernel of its own, which takes
#: seconds to compile. What fails here is to be looked for in the slow tests, which have them one by one.
MIXED: dict[str, dict[str, Any]] = {
    "bfloat16, keys 8, values 1 bits, one query head": dict(dtype="bfloat16", k_bits=8, v_bits=1, group=1, kv_heads=2),
    "bfloat16 scales, keys 1, values 8 bits": dict(dtype="bfloat16", scale_dtype="bfloat16", k_bits=1, v_bits=8),
    "more rows than a program takes, quiet values": dict(query=6, group=4, mask="heads", loud=1e-3, scale=3.0),
    "alibi, odd groups, value windows longer than keys'": dict(
        mask="alibi", batch=2, start=(0, 9), query=3, k_group=24, residual=24, v_group=32, v_residual=70
    ),
    "rows of the least number, a softcap that hardly caps": dict(mask="least", query=2, softcap=1e5, dtype="float32"),
    "many sink tokens, window, groups of one": dict(
        sinks=40, window=130, k_group=1, v_group=8, residual=20, dtype="float32"
    ),
    "a chunk over the sink tokens, longer than the window": dict(
        query=30, past=3, sinks=20, start=(2,), loud=5.0, window=15, group=1
    ),
}
EVERY |= {**SHARING, **MIXED}
#: Case to the fast ones that try the same.
COVERED = {
    **{name: name_of_both for name_of_both in MIXED for name in name_of_both.split(", ") if name in EVERY},
    "keys 8, values 1 bits": "bfloat16, keys 8, values 1 bits, one query head",
    "keys 1, values 8 bits": "bfloat16 scales, keys 1, values 8 bits",
    "many sink tokens, window": "many sink tokens, window, groups of one",
    "a chunk in the window": "a chunk over the sink tokens, longer than the window",
    "float32": "float32 scales",
    "keys 4, values 2 bits": "test_a_width_of_two_planes; one token outweighs all others, float32, 2 bits",
    "3 bits, float32, head_dim 40": "groups below a tile, 3 bits; a chunk of odd head_dims",
    "no mask, softcap, window": "sinks of tokens to come; ranked, token norms, float32, softcap, window",
    "softcap": "rows of the least number, a softcap that hardly caps; ranked, token norms, float32, softcap, window",
    "sink tokens": "sinks of tokens to come; many sink tokens, window, groups of one",
    "head_dim 8": "ranked, head_dim 8",
    "one token outweighs all others, float16, 2 bits": "the same of float32",
    "batch, heads, padding": "a chunk",
    "window in the codes": "many sink tokens, window, groups of one",
    "window in the ring": "a chunk over the sink tokens, longer than the window",
    "a chunk, float32": "a chunk of odd head_dims",
    "a chunk with alibi, small groups": "alibi, odd groups, ...; groups below a tile, 3 bits; a chunk",
    "a prompt": "a chunk on nothing",
    "a prompt on a long past": "a chunk of odd head_dims, whose own tokens are more than the window, too",
    "another head_dim of values": "a chunk of odd head_dims",
    "nothing before, 5 tokens": "nothing before",
    "small groups, sink tokens": "many sink tokens, window, groups of one",
    "head_dim 256": "float16; ranked, the default lengths",
    "key windows of several blocks more": "value windows longer than keys'; ranked, values that came rotated",
    "a bias a token": "alibi, odd groups, ...; rows of the least number, ...",
    "loud channels": "float32 scales",
    "ranked, float32": "ranked, token norms, float32, softcap, window",
    "ranked, the first key in codes": "the same of float16",
    "ranked, sink tokens": "ranked, token norms, float32, softcap, window; ranked, values that came rotated",
    "ranked, float16 scales, float32": "ranked, float16 scales, groups of channels",
    "ranked, head_dim 64, keys 3, values 1 bits": "ranked, float16; ranked, head_dim 8",
    "ranked, head_dim 80, keys 2, values 1 bits": "ranked, token norms, float32, softcap, window",
    "ranked, head_dim 96, keys 1.5, values 2 bits": "ranked, a chunk, float32, softcap, window",
    "ranked, head_dim 128, keys 2, values 2 bits": "ranked, the default lengths",
    "ranked, head_dim 128, keys 4, values 4 bits": "ranked, head_dim 8",
    "ranked, one query head": "ranked, float16; bfloat16, keys 8, values 1 bits, one query head",
    "ranked, 3 query tokens, padding": "ranked, values that came rotated",
    "ranked, no mask, softcap, window": "ranked, token norms, float32, softcap, window",
    "ranked, alibi, float32": "alibi, odd groups, ...",
    "ranked, window in the ring": "ranked, a chunk, float32, softcap, window",
    "ranked, an empty row with sink logits": "an empty row with sink logits",
    "ranked, more rows than a program takes": "ranked, a chunk, float32, softcap, window",
    "ranked, keys later than values": "ranked, values that came rotated",
    "ranked, many sink tokens, window": "ranked, token norms, float32, softcap, window; many sink tokens, window, ...",
    "ranked, one group in the window": "ranked, the default lengths; float16",
    "ranked, several tiles a split": "ranked, the default lengths",
    "ranked, one token outweighs all others": "one token outweighs all others, float32, 2 bits",
    "ranked, values of 3 bits, groups of channels, float32": "ranked, keys or values later, in turns",
    "ranked, token norms": "ranked, token norms, float32, softcap, window",
    "ranked, loud channels": "ranked, float16 scales, groups of channels",
}
assert {*COVERED} <= {*EVERY}
SLOW = {*REPEATED, *RANKED_SLOW, *COVERED} - {"nothing before"}
#: float32 and bfloat16, 1 to 3 and 8 bits, scales of bytes and of float16, groups of channels, ranks, token norms, sink
#: tokens, softcap; the others of narrower vectors are slow.
NARROW = (
    "bfloat16, keys 8, values 1 bits, one query head",
    "groups below a tile, 3 bits",
    "ranked, token norms, float32, softcap, window",
)

#: In bfloat16 few bits are multiplied with numbers of one digit: all cases once more, on vectors of all widths.
ONE_DIGIT: dict[str, dict[str, Any]] = {
    name: {**case, "dtype": "bfloat16"}
    for name, case in {**EVERY, **RANKED_SLOW, "head_dim 40": dict(dim=40, v_bits=2)}.items()
    if min(case.get("k_bits", 2), case.get("v_bits", 1)) <= ONE_DIGIT_BITS
}
#: Range codes and ranks, 1 and 2 bits, head_dims that fill no vector, sink tokens, token norms, a chunk.
ONE_DIGIT_QUICK = {
    *((name, isa) for name in ("head_dim 40", "ranked, token norms, float32, softcap, window")
      for isa in ("widest", "avx2")),
    ("ranked, the default lengths", "widest"), ("a chunk over the sink tokens, longer than the window", "widest"),
    ("head_dim 40", "portable"),
}  # fmt: skip

EMULATED = ("bfloat16", "keys 8, values 1 bits", "3 bits, float32, head_dim 40", "ranked, sink tokens", *NARROW)
EMULATED += ("float32", "sink tokens", "head_dim 8", "a bias a token", "softcap", "ranked, float32")
EMULATED += ("ranked, head_dim 48, values 24", "ranked, float16 scales, float32", "ranked, one query head")
#: The products of bytes either way, those of bfloat16 numbers, and ranks: of few rows, which take half as long.
QUICK = {
    ("bfloat16, keys 8, values 1 bits, one query head", "__AVX512VNNI__"),
    ("bfloat16, keys 8, values 1 bits, one query head", "__AVX512BW__"),
    ("ranked, one query head", "__AVX512VNNI__"),
}


def check(setup: Setup, out: torch.Tensor, given: dict[str, Any], digits: bool = True) -> dict[str, Any]:
    result = errors(setup, out, given, digits)
    assert result["same_nan"] and result["zeros_are_zero"]
    # The fields of ranked keys count 1, 2 or 4 times and share one fixed-point unit, which is that much coarser.
    roundings = 16 if setup.k_scheme == "per_channel_ranked" else 8
    assert result["error"] <= allowed(result, vars(setup), roundings), result
    return result


@pytest.mark.parametrize("name", fast_but((*EVERY, *RANKED_SLOW), SLOW))
def test_against_the_truth(name: str) -> None:
    setup = Setup(**{**EVERY, **RANKED_SLOW}[name])
    given = inputs(setup)
    assert check(setup, ops.DECODE(**arguments(setup, given)), given)["largest"] > 0


def run_on(isa: Isa, setup: Setup, given: dict[str, Any], any_queries: bool = False) -> torch.Tensor:
    """The step by vectors of an instruction set; ``any_queries``: by the kernel for any number of tokens."""
    if isa.lanes > cpu_build.isa().lanes:
        pytest.skip(f"this machine has {cpu_build.isa().name} only")
    a = DecodeArguments(**arguments(setup, given)).mapped(torch.Tensor.contiguous)
    problem = problem_of(a).any_queries() if any_queries else problem_of(a)
    types, code = source(problem, isa)
    out = empty_output(**a._asdict())
    cpu_build.load(types, code)(*a.tensors.values(), out, *sizes_given(a))
    return out


@pytest.mark.parametrize("isa", ["portable", "avx2"])
@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in NARROW else pytest.mark.slow) for n in EVERY])
def test_narrower_vectors(name: str, isa: str) -> None:
    setup = Setup(**EVERY[name])
    given = inputs(setup)
    check(setup, run_on(ISAS[isa], setup, given), given)


ONE_DIGIT_CASES = [(name, isa) for name in ONE_DIGIT for isa in ("widest", "avx2", "portable")]


@pytest.mark.parametrize("case", fast_but(ONE_DIGIT_CASES, {*ONE_DIGIT_CASES} - ONE_DIGIT_QUICK), ids=str)
def test_one_digit(case: tuple[str, str]) -> None:
    """Off by what rounding to bytes costs, and not by more."""
    name, isa = case
    setup = Setup(**ONE_DIGIT[name])
    given = inputs(setup)
    check(setup, run_on(ISAS.get(isa, cpu_build.isa()), setup, given), given)


#: Chunks whose kernel does not know how many tokens they have, by a name of ``EVERY``, and how many: less than a block
#: of rows, a block and some, and several.
ANY = {
    "a chunk": (9, 20, 33, 70),
    "ranked, token norms, a chunk": (9, 32, 33, 65),
    "a chunk of odd head_dims": (11, 50),
    "a chunk, a mask a head, sink logits": (12, 75),
    "a chunk over the sink tokens, longer than the window": (9, 64, 90),
    "ranked, a chunk, float32, softcap, window": (17, 40),
    "ranked, values that came rotated, a chunk": (20, 100),
}


def chunks(name: str) -> list[Setup]:
    return [Setup(**{**EVERY[name], "query": query, "max_len": 400}) for query in ANY[name]]


@pytest.mark.parametrize("name", fast_but(ANY, {*ANY} - {"a chunk", "ranked, token norms, a chunk"}))
def test_chunks_of_any_number_of_tokens(name: str) -> None:
    """By one kernel."""
    kernels = set()
    for setup in chunks(name):
        given = inputs(setup)
        a = DecodeArguments(**arguments(setup, given))
        kernels.add(problem_of(a).any_queries())
        out = attend_chunk(a)
        assert out is not None and check(setup, out, given)["largest"] > 0
    assert len(kernels) == 1


ANY_NARROW = [(name, isa) for name in ANY for isa in ("avx2", "portable")]


@pytest.mark.parametrize("case", fast_but(ANY_NARROW, {*ANY_NARROW} - {("a chunk", "avx2")}), ids=str)
def test_chunks_of_any_number_of_tokens_by_narrower_vectors(case: tuple[str, str]) -> None:
    name, isa = case
    for setup in chunks(name):
        given = inputs(setup)
        check(setup, run_on(ISAS[isa], setup, given, any_queries=True), given)


def test_what_one_digit_costs_is_known() -> None:
    """The reference that is rounded so is as far from the truth as the kernel, and well above what two digits lose."""
    setup = Setup(dtype="bfloat16", v_bits=2)
    given = inputs(setup)
    one = errors(setup, ops.DECODE(**arguments(setup, given)), given, digits=True)
    two = errors(setup, attend(DecodeArguments(**arguments(setup, given))), given)
    assert one["usual"] / 3 < one["error"] < 3 * one["usual"] and one["error"] > 2 * two["error"]


@pytest.mark.parametrize("new", [{}, RANKED_CASES["ranked, float16"]], ids=["range codes", "ranked"])
def test_keys_are_rounded_as_the_reference_rounds_them(new: dict[str, Any]) -> None:
    """And by nothing else, their middles least of all: where values have two digits, outputs come out the same."""
    setup = Setup(**{**new, "dtype": "bfloat16", "v_bits": 4})
    given = inputs(setup)
    out, rounded = ops.DECODE(**arguments(setup, given)).double(), reference(setup, given, torch.float64, None, True)
    truth = reference(setup, given, torch.float64, None)
    off = (out - rounded.bfloat16()).norm()
    assert off < (rounded - truth).norm() / 4 and off < (rounded.bfloat16() - rounded).norm() / 2, off


@pytest.mark.parametrize("new", [{}, RANKED_CASES["ranked, float16"]], ids=["range codes", "rotated"])
def test_values_lose_what_the_reference_loses(new: dict[str, Any]) -> None:
    """Their middles, which rotated back are one channel, lose nothing; what is carried on makes up to sqrt(2) of it."""
    setup = Setup(**{**new, "dtype": "bfloat16", "k_bits": 4, "v_bits": 2, "past": 900, "max_len": 1000})
    given = inputs(setup)
    out, rounded = ops.DECODE(**arguments(setup, given)).double(), reference(setup, given, torch.float64, None, True)
    truth = reference(setup, given, torch.float64, None)
    assert (out - truth).norm() < 1.6 * (rounded - truth).norm() + (truth.bfloat16() - truth).norm()


def test_how_many_digits() -> None:
    """One where codes lose more than it does themselves, and the model is no more exact."""
    assert [digits(torch.bfloat16, bits) for bits in (1, 1.5, 2, 2.5, 3, 4, 8)] == [1, 1, 1, 1, 2, 2, 2]
    assert {digits(torch.float16, bits) for bits in (1, 8)} == {2} and digits(torch.float32, 1) == 3


@pytest.mark.parametrize(
    ("name", "macro"),
    [
        pytest.param(name, macro, marks=() if (name, macro) in QUICK else pytest.mark.slow)
        for name in EMULATED
        for macro in ("__AVX512VNNI__", "__AVX512BW__")
    ],
)
def test_avx512_without_the_processor(name: str, macro: str) -> None:
    """The 16-lane code with its intrinsics spelt out (avx512.h), so that no machine leaves it untested."""
    setup = Setup(**EVERY[name])
    given = inputs(setup)
    a = DecodeArguments(**arguments(setup, given)).mapped(torch.Tensor.contiguous)
    types, code = source(problem_of(a), ISAS["avx512"])
    others = "".join(f"#undef {m}\n" for m in ("__AVX512VNNI__", "__AVX512VL__", "__AVX512BW__", "__AVX512BF16__"))
    with_bfloat16 = "#define __AVX512BF16__ 1\n" if macro == "__AVX512VNNI__" else ""
    shim = f"{others}#define {macro} 1\n{with_bfloat16}{(Path(__file__).parent / 'avx512.h').read_text()}"
    assert code.count("#include <immintrin.h>") == 1
    out = empty_output(**a._asdict())
    cpu_build.load(types, code.replace("#include <immintrin.h>", shim))(*a.tensors.values(), out, *sizes_given(a))
    check(setup, out, given)


@pytest.mark.parametrize(
    ("spoil", "name"),
    [
        *((what, "float16") for what in ("key.zero", "key.scale", "value.zero", "value.scale")),
        *(
            (what, name)
            for name in ("ranked, float16", "ranked, float16 scales, groups of channels")
            for what in ("key.scale", "key.center", "value.scale")
        ),
    ],
)
def test_nan_propagates(spoil: str, name: str) -> None:
    """To the sequence that it is in, and not to the other one."""
    setup = Setup(**EVERY[name], spoil=spoil, batch=2)
    given = inputs(setup)
    out = ops.DECODE(**arguments(setup, given))
    assert check(setup, out, given)["nans"] and not out[1].isnan().any()


@pytest.mark.parametrize("kv_heads", [1, 8])  # spans of 256 and of 1,024 tokens
def test_many_threads_and_splits_give_the_same(kv_heads: int) -> None:
    setup = Setup(past=2200, max_len=2400, kv_heads=kv_heads, group=2, dim=32, residual=128, k_group=128)
    given, threads = inputs(setup), torch.get_num_threads()
    one = run_cpu(**arguments(setup, given))
    try:
        torch.set_num_threads(3)
        many = run_cpu(**arguments(setup, given))
    finally:
        torch.set_num_threads(threads)
    check(setup, many, given)
    torch.testing.assert_close(one, many)


@pytest.mark.parametrize("name", EVERY)
def test_plain_torch_twin(name: str) -> None:
    """What devices without a kernel run."""
    setup = Setup(**EVERY[name])
    given = inputs(setup)
    check(setup, attend(DecodeArguments(**arguments(setup, given))), given, digits=False)


def test_a_width_of_two_planes_needs_nothing_but_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """5 = 4 + 1 and 6 = 4 + 2 bits are stored, appended and read, as ARCHITECTURE.md says."""
    for scheme in (per_channel, per_token):
        monkeypatch.setattr(scheme, "BITS", (5, 6))
    setup = Setup(k_bits=5, v_bits=6, dim=40, dtype="float32", query=2)
    given = inputs(setup)
    check(setup, ops.DECODE(**arguments(setup, given)), given)
    setup = Setup(k_bits=6, v_bits=5, dim=40, dtype="float32", query=2)
    given = inputs(setup)
    check(setup, attend(DecodeArguments(**arguments(setup, given))), given)


def test_opcheck() -> None:
    setup = Setup(past=40, max_len=48, mask="padded")
    args = arguments(setup, inputs(setup))
    args["q"] = args["q"].contiguous()
    torch.library.opcheck(ops.DECODE_CPU, (), args)
    torch.library.opcheck(ops.DECODE, (), args)


def test_a_mode_sees_the_kernel_as_an_op() -> None:
    """Nothing but eager code that nobody watches calls the kernel past torch's dispatcher."""
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(func)
            return func(*args, **(kwargs or {}))

    setup = Setup(past=40, max_len=48, mask="padded")
    args = arguments(setup, inputs(setup))
    with Watch():
        watched = ops.DECODE(**args)
    assert ops.DECODE_CPU in seen
    assert torch.equal(watched, ops.decode_attention(**args))


def given_to(**kwargs: Any) -> DecodeArguments:
    setup = Setup(**kwargs)
    return DecodeArguments(**arguments(setup, inputs(setup)))


@pytest.mark.parametrize("name", [pytest.param("no mask", marks=pytest.mark.slow), "ranked, float32"])
def test_as_many_tokens_as_are_written(name: str) -> None:
    """Where no number is given: what lies behind them is junk here, and counts as nothing."""
    setup = Setup(**{**EVERY[name], "mask": "causal"})
    given = inputs(setup)
    a = DecodeArguments(**arguments(setup, given)).replace(mask=None, max_len=0)
    check(setup, ops.DECODE(**a._asdict()), given)
    check(setup, attend(a), given)
    with pytest.raises(AssertionError, match="a mask says how many"):
        problem_of(a.replace(mask=torch.ones(1, 1, 1, 200, dtype=torch.bool)))


@pytest.mark.parametrize("new", [{}, RANKED_CASES["ranked, float32"]], ids=["", "ranked"])
def test_one_kernel_for_all_lengths_and_batches(new: dict[str, Any]) -> None:
    """And one more for batches of few heads; the scale and what a mask is given for are its own."""
    caches = [dict(max_len=200), dict(max_len=5000), dict(max_len=64, past=40), dict(batch=3, start=(0, 2, 5))]
    made = [source(problem_of(given_to(**{**new, **each})), ISAS["avx2"]) for each in caches]
    assert len({*made}) == 1
    others = [dict(batch=8), dict(query=2), dict(dim=32), dict(mask="heads"), dict(kv_heads=2)]
    apart = {source(problem_of(given_to(**{**new, **each})), ISAS["avx2"]) for each in others}
    assert len(apart) == len(others) and made[0] not in apart


def test_rows_of_their_own_lengths_have_one_kernel() -> None:
    made = set()
    for batch, max_len in ((2, 200), (5, 200), (2, 320)):
        a = given_to(batch=batch, max_len=max_len, start=(0,) * batch)
        made.add(source(problem_of(a.replace(past=torch.full((batch,), 150))), ISAS["avx2"]))
    assert len(made) == 1
