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
from torch._inductor import config as inductor_config

from xquant_fx import ops
from xquant_fx.kernels.cpu import at_hand, build
from xquant_fx.kernels.cpu.isa import ISAS
from xquant_fx.kernels.shared_code_load import cpu_call as cpu_load
from xquant_fx.kernels.shared_code_load.arguments import LoadArguments
from xquant_fx.kernels.shared_code_load.cpu_source import source
from xquant_fx.warn_once import forget

CASE = Case(bits=2, dtype=torch.float32, dim=16, residual=16, group=16, max_len=80, shared=False)


@pytest.fixture(autouse=True)
def nothing_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine on which nothing was built yet, but for the libraries of Inductor's cache."""
    monkeypatch.setattr(at_hand, "folder", lambda: tmp_path / "steps")
    for name, empty in (("_found", {}), ("_missing", set())):
        monkeypatch.setattr(at_hand, name, empty)
    monkeypatch.setattr(at_hand, "_failed", [])
    return tmp_path


def a_load() -> LoadArguments:
    state = pair_of(CASE)[0]
    append_by_op(state, CASE.tokens(60, 0), torch.arange(60))
    return LoadArguments(**load_arguments(state, 59, 1, 80))


def plain_ones(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was left to plain torch of a chunk of 60 tokens and a load."""
    seen: list[str] = []
    with monkeypatch.context() as patched:
        for name, module, function in (("store", ops.plain_store, "store"), ("load", ops.plain_load, "load")):
            plain = getattr(module, function)
            patched.setattr(module, function, lambda a, name=name, plain=plain: seen.append(name) or plain(a))
        ops.shared_code_load(**a_load()._asdict())
    return seen


def test_few_numbers_do_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are plain torch's, whether the kernels are there or not; in a compiled model they are the kernels'."""
    assert plain_ones(monkeypatch) == ["store", "load"]
    with at_hand.wanted():
        assert not plain_ones(monkeypatch)
    assert len(at_hand._found) == 2
    assert plain_ones(monkeypatch) == ["store", "load"]


def test_many_numbers_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_load, "MANY", CASE.batch * CASE.heads * 80 * CASE.dim)
    assert plain_ones(monkeypatch) == ["store"]
    monkeypatch.setattr(cpu_load, "MANY", cpu_load.MANY + 1)
    assert plain_ones(monkeypatch) == ["store", "load"]


@pytest.mark.parametrize("error", [build.CompileError(["g++"], "no space left"), OSError("no space left")])
def test_a_compiler_that_fails_is_told_once(
    error: Exception, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*args: object) -> None:
        raise error

    monkeypatch.setattr(at_hand, "built", fail)
    forget()
    with at_hand.wanted():
        assert plain_ones(monkeypatch) == plain_ones(monkeypatch) == ["store", "load"]
    (told,) = [record.getMessage() for record in caplog.records if "no space left" in record.getMessage()]
    assert "stays slow" in told


def test_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "has_compiler", lambda: False)
    with at_hand.wanted():
        assert plain_ones(monkeypatch) == ["store", "load"]


def test_a_damaged_note(nothing_there: Path) -> None:
    """Is not gone by, and made anew."""
    cpu_load.run(a_load())
    (note,) = (nothing_there / "xquant_kernels").iterdir()
    whole = note.read_text()
    note.write_text(whole[:-20])
    problem = cpu_load.problem_of(a_load())
    at_hand._found.clear()
    assert at_hand.at_hand(source, problem) is None
    at_hand.built(source, problem)
    assert note.read_text() == whole


def test_notes_are_no_kept_steps(nothing_there: Path) -> None:
    """Whose folder tells whether what only a compilation needs can wait until there is one."""
    cpu_load.run(a_load())
    assert not (nothing_there / "steps").exists()


def test_other_flags_are_another_library() -> None:
    cpu_load.run(a_load())
    problem = cpu_load.problem_of(a_load())
    at_hand._found.clear()
    with inductor_config.patch({"cpp.enable_floating_point_contract_flag": "fast"}):
        assert at_hand.at_hand(source, problem) is None


def test_while_another_thread_imports_the_builder(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is among the modules before it has anything in it."""
    monkeypatch.setitem(sys.modules, build.__name__, type(sys)("half"))
    assert at_hand._isa().name in ISAS


def test_another_process_asks_no_compiler(nothing_there: Path) -> None:
    """It finds the library by the source alone, which says what the source is compiled for."""
    cpu_load.run(a_load())
    program = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
import test_at_hand as t
t.at_hand.folder = lambda: Path({str(nothing_there)!r}) / "steps"
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
