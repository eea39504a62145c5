"""Kernels that uncompiled code takes only if they are there: found without asking a compiler, built when it pays."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from store_reference import Case
from store_runs import append as append_by_op
from store_runs import load_arguments, pair_of

from xquant_fx import ops
from xquant_fx.cache.state import KVState
from xquant_fx.kernels.cpu import at_hand, build
from xquant_fx.kernels.quantize_store import cpu_call as cpu_store
from xquant_fx.kernels.quantize_store.arguments import StoreArguments
from xquant_fx.kernels.shared_code_load import cpu_call as cpu_load
from xquant_fx.kernels.shared_code_load.arguments import LoadArguments
from xquant_fx.kernels.shared_code_load.cpu_source import source
from xquant_fx.warn_once import forget

CASE = Case(bits=2, dtype=torch.float32, dim=16, residual=16, group=16, max_len=80, shared=False)


@pytest.fixture(autouse=True)
def nothing_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine on which nothing was built yet, but for the libraries of Inductor's cache."""
    monkeypatch.setattr(at_hand, "folder", lambda: tmp_path)
    for name, empty in (("_found", {}), ("_missing", set()), ("_begun", set())):
        monkeypatch.setattr(at_hand, name, empty)
    monkeypatch.setattr(cpu_load, "_failed", [])
    monkeypatch.setattr(cpu_load, "_by_torch", type(cpu_load._by_torch)())
    return tmp_path


def filled() -> KVState:
    state = pair_of(CASE)[0]
    append_by_op(state, CASE.tokens(60, 0), torch.arange(60))
    return state


def a_load() -> LoadArguments:
    return LoadArguments(**load_arguments(filled(), 59, 1, 80))


def loads_by_kernel(monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the op leaves nothing to plain torch."""
    seen = []
    with monkeypatch.context() as patched:
        plain = ops.plain_load.load
        patched.setattr(ops.plain_load, "load", lambda a: seen.append(a) or plain(a))
        ops.shared_code_load(**a_load()._asdict())
    return not seen


def test_a_load_is_plain_torch_until_its_kernel_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not loads_by_kernel(monkeypatch)
    cpu_load.run(a_load())
    assert loads_by_kernel(monkeypatch)


def test_built_once_it_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    a_step = 2 * 80 * 16 * CASE.heads
    monkeypatch.setattr(cpu_load, "WORTH_BUILDING", 3 * a_step)
    assert [loads_by_kernel(monkeypatch) for _ in range(4)] == [False, False, True, True]


def test_a_compiler_that_fails_is_told_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def fail(*args: object) -> None:
        raise build.CompileError(["g++"], "no space left")

    monkeypatch.setattr(cpu_load, "WORTH_BUILDING", 0)
    monkeypatch.setattr(cpu_load, "built", fail)
    forget()
    assert not any(loads_by_kernel(monkeypatch) for _ in range(2))
    (told,) = [record.getMessage() for record in caplog.records if "no space left" in record.getMessage()]
    assert "stays slow" in told


def test_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_load, "WORTH_BUILDING", 0)
    monkeypatch.setattr(build, "has_compiler", lambda: False)
    assert not loads_by_kernel(monkeypatch)
    cpu_load.begin_kernel(a_load())
    assert not at_hand._begun


def test_in_the_background(monkeypatch: pytest.MonkeyPatch) -> None:
    works = []
    monkeypatch.setattr(build, "in_background", works.append)
    for _ in range(2):
        cpu_load.begin_kernel(a_load())
    (work,) = works
    work()
    assert loads_by_kernel(monkeypatch)


def test_short_chunks_do_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are stored by plain torch, and by the kernel once it is there."""
    seen: list[StoreArguments] = []
    plain = ops.plain_store.store
    monkeypatch.setattr(ops.plain_store, "store", lambda a: seen.append(a) or plain(a))
    first = filled()
    assert len(seen) == 1
    cpu_store.run(seen[0])
    second = filled()
    assert len(seen) == 1
    torch.testing.assert_close(first.load(60), second.load(60), rtol=0, atol=0)


def test_a_damaged_note(nothing_there: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cpu_load.run(a_load())
    (note,) = (nothing_there / "kernels").iterdir()
    note.write_text(note.read_text()[:-20])
    at_hand._found.clear()
    assert not loads_by_kernel(monkeypatch)


def test_another_process_asks_no_compiler(nothing_there: Path) -> None:
    """It finds the library by the source alone, which says what the source is compiled for."""
    cpu_load.run(a_load())
    program = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
import test_at_hand as t
t.at_hand.folder = lambda: Path({str(nothing_there)!r})
t.build.isa.cache_clear()
kernel = t.at_hand.at_hand(t.source, t.cpu_load.problem_of(t.a_load()))
assert kernel is not None and not t.build.isa_is_known()
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_the_isa_is_that_of_inductor() -> None:
    """Or nothing would ever be found."""
    build.isa.cache_clear()
    assert not build.isa_is_known()
    guessed = at_hand._isa()
    assert guessed == build.isa() and source(cpu_load.problem_of(a_load()), guessed)
