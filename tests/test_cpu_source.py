"""The texts of the C++ kernels: one instruction set each, no warnings, and readable by editors.

``python tests/test_cpu_source.py`` writes the example headers anew.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from attention_runs import Setup, arguments, inputs
from states import layers_of
from store_reference import Case
from store_runs import load_arguments, pair_of

from xquant_fx import XQuantConfig
from xquant_fx.cache.state import KVState
from xquant_fx.kernels.arguments import Overload
from xquant_fx.kernels.cpu import build
from xquant_fx.kernels.cpu import source as cpu_source
from xquant_fx.kernels.cpu.isa import ISAS, named_by_inductor
from xquant_fx.kernels.cpu.kept_call import for_this_machine
from xquant_fx.kernels.cpu.side import Side
from xquant_fx.kernels.decode_attention import cpu_call as attention
from xquant_fx.kernels.decode_attention import cpu_source as cpu_attention
from xquant_fx.kernels.decode_attention.arguments import DecodeArguments
from xquant_fx.kernels.linear_rows import cpu_source as cpu_linear
from xquant_fx.kernels.linear_rows.cpu_call import is_faster_here
from xquant_fx.kernels.prompt_attention import cpu_source as cpu_prompt
from xquant_fx.kernels.quantize_store import cpu_call as append
from xquant_fx.kernels.quantize_store import cpu_source as cpu_store
from xquant_fx.kernels.quantize_store.arguments import OWN, StoreArguments
from xquant_fx.kernels.shared_code_load import cpu_call as load
from xquant_fx.kernels.shared_code_load import cpu_source as cpu_load
from xquant_fx.kernels.shared_code_load.arguments import LoadArguments

KERNELS = Path(__file__).parents[1] / "kernels"
OPS = ("decode_attention", "quantize_store", "shared_code_load", "linear_rows", "prompt_attention")


LINEAR = cpu_linear.Problem(dtype=torch.bfloat16, rows=1, biased=(True, False))
ADDMM = cpu_linear.Problem(dtype=torch.bfloat16, rows=1, biased=(True,), in_first=True)
PROMPT = cpu_prompt.Problem(dtype=torch.bfloat16, dim=64)
NEW_PAIR = dict(k_scheme="per_channel_ranked", v_scheme="per_token_rotated", residual=64)


def decode_problem(**more: Any) -> cpu_attention.Problem:
    setup = Setup(kv_heads=2, dim=128, max_len=1024, dtype="bfloat16", v_bits=2, sinks=4, softcap=30.0, **more)
    return attention.problem_of(DecodeArguments(**arguments(setup, inputs(setup))))


def append_problem() -> cpu_store.Append:
    case = Case(dtype=torch.bfloat16, dim=128, residual=128, group=128, max_len=1024, sinks=4)
    return append_of(pair_of(case)[0])


def new_states() -> list[KVState]:
    """Keys and values of the preset xquant-2.2."""
    return layers_of(XQuantConfig(), (2, 1, 1024, 128), torch.bfloat16)[0]


def append_of(state: KVState) -> cpu_store.Append:
    batch, heads, _, dim = state.spec.shape
    x = torch.zeros(batch, heads, 1, dim, dtype=state.spec.dtype)
    given = dict(x=x, pos=torch.arange(1), **state.tensors, **state.spec.store_constants())
    return append.problem_of(StoreArguments(**given))


def load_problem() -> Side:
    case = Case(dtype=torch.bfloat16, dim=128, residual=128, group=128, max_len=1024, sinks=4)
    return load_of(pair_of(case)[0])


def load_of(state: KVState) -> Side:
    return load.problem_of(LoadArguments(**load_arguments(state, 0, 1, 1)))


def examples() -> dict[str, str]:
    """Text of the example header of each op."""
    constants = (
        cpu_attention.constants(decode_problem()),
        cpu_store.constants(append_problem()),
        cpu_load.constants(load_problem()),
        cpu_linear.constants(LINEAR),
        cpu_prompt.constants(PROMPT),
    )
    tensors = (
        cpu_source.pointers(DecodeArguments, Overload()),
        cpu_source.pointers(StoreArguments, OWN),
        cpu_source.pointers(LoadArguments, Overload(omit=frozenset({"first"}))),
        {},
        {},
    )
    sizes = (cpu_attention.SIZES, cpu_store.SIZES, cpu_load.SIZES, (), ())
    return {op: cpu_source.example(*parts) for op, *parts in zip(OPS, constants, tensors, sizes, strict=True)}


def write_examples() -> None:
    for op, text in examples().items():
        (KERNELS / op / cpu_source.EXAMPLE).write_text(text)


def whole_sources(isa: str) -> dict[str, str]:
    """What is compiled, by op."""
    decodes = {"decode": decode_problem(), "decode, ranked": decode_problem(**NEW_PAIR)}
    appends = {
        "append": append_problem(),
        **{f"append {state.spec.scheme}": append_of(state) for state in new_states()},
    }
    loads = {"load": load_problem(), **{f"load {state.spec.scheme}": load_of(state) for state in new_states()}}
    made = {name: cpu_attention.source(p, ISAS[isa])[1] for name, p in decodes.items()}
    made |= {name: cpu_load.source(p, ISAS[isa])[1] for name, p in loads.items()}
    made["prompt"] = cpu_prompt.source(PROMPT, ISAS[isa])[1]
    made |= {name: cpu_linear.source(p, ISAS[isa])[1] for name, p in {"linear": LINEAR, "addmm": ADDMM}.items()}
    return made | {name: cpu_store.source(a, ISAS[isa])[1] for name, a in appends.items()}


def compile_only(*args: str) -> None:
    gcc = shutil.which("g++")
    if gcc is None:
        pytest.skip("no g++")
    command = [gcc, "-std=c++17", "-fsyntax-only", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", *args]
    made = subprocess.run(command, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr


@pytest.mark.parametrize("op", OPS)
def test_example_header_is_true(op: str) -> None:
    assert (KERNELS / op / cpu_source.EXAMPLE).read_text() == examples()[op]


@pytest.mark.parametrize("file", [*(f"{op}/cpu.cpp" for op in OPS), "linear_rows/columns.cpp"])
def test_editors_can_read(file: str) -> None:
    """The file alone, without a flag of ours, is C++ without a warning."""
    compile_only("-Wshadow", str(KERNELS / file))


@pytest.mark.parametrize("isa", ISAS)
def test_one_instruction_set_in_each_source(isa: str) -> None:
    row = ISAS[isa]
    for code in whole_sources(isa).values():
        assert code.startswith(f"{for_this_machine()}#define {row.macro}\n")
        assert f"defined({row.macro})" in code or isa == "portable"
        assert [line for line in code.splitlines() if "define XQ_LANES" in line] == [f"#define XQ_LANES {row.lanes}"]
        assert code.count("inline vf exp_negative(vf x) {") == code.count("inline float sum(vf x) {") == 1
        assert "#pragma once" not in code


def precompiled(flags: list[str], sources: Iterable[str], folder: Path) -> Path:
    """A header of all the standard ones in ``sources``: reading them takes most of the time."""
    header = folder / "headers.h"
    names = {line for code in sources for line in code.splitlines() if line.startswith("#include <")}
    of_others = {"#include <arm_neon.h>"} if flags else {"#include <arm_neon.h>", "#include <immintrin.h>"}
    header.write_text("\n".join(sorted(names - of_others)))
    subprocess.run(["g++", "-std=c++17", *flags, "-x", "c++-header", str(header)], check=True)
    return header


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
@pytest.mark.parametrize("flags", [[], ["-march=haswell"]], ids=["portable", "avx2"])
def test_no_warnings(flags: list[str], tmp_path: Path) -> None:
    """GCC's own header of AVX-512 warns, so not that."""
    sources = whole_sources("avx2" if flags else "portable")
    header = precompiled(flags, sources.values(), tmp_path)
    for op, code in sources.items():
        (tmp_path / f"{op}.cpp").write_text(code)
        compile_only(*flags, "-Winvalid-pch", "-include", str(header), str(tmp_path / f"{op}.cpp"))


@pytest.mark.parametrize(
    ("name", "isa"),
    [
        ("avx512 avx512_vnni amx_tile", "avx512"),
        ("avx512 avx512_vnni", "avx512"),
        ("avx512", "avx512"),
        ("avx2", "avx2"),
        ("asimd", "neon"),
        ("INVALID_VEC_ISA", "portable"),
        ("vsx", "portable"),
    ],
)
def test_names_of_inductor(name: str, isa: str) -> None:
    assert named_by_inductor(name) == ISAS[isa]


def test_names_of_inductor_are_its_own() -> None:
    from torch._inductor import cpu_vec_isa

    known = {str(isa) for isa in (*cpu_vec_isa.supported_vec_isa_list, cpu_vec_isa.invalid_vec_isa)}
    assert {row.inductor for row in ISAS.values()} <= {word for name in known for word in name.split()}


def test_asked_in_the_background(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once; what is needed waits for it, and what the processor has by its own word is what Inductor finds."""
    monkeypatch.setattr(build, "_begun", [])
    monkeypatch.setattr(build, "get_compile_threads", lambda: 1)
    build.begin_probes()
    assert not build._begun  # nothing runs in the background then
    monkeypatch.setattr(build, "get_compile_threads", lambda: 2)
    for _ in range(2):
        build.begin_probes()
    (asked,) = build._begun
    build.isa.cache_clear()
    assert build.isa().name in ISAS and asked.done() and asked.exception() is None
    assert is_faster_here() == (build.isa().name in cpu_linear.FASTER)


if __name__ == "__main__":
    write_examples()
