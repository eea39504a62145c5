"""Types that users get: a file that uses every public name, and one with three mistakes, under mypy."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import xquant_fx

TYPING = Path(__file__).parent / "typing"
ROOT = TYPING.parents[1]


def errors(name: str, tmp_path: Path) -> list[str]:
    """What mypy says of a file of a user, who has no settings of ours."""
    api = pytest.importorskip("mypy.api")
    settings = tmp_path / "mypy.ini"
    # Our own files are silent here: `make lint` checks them. torch leaves functions untyped.
    settings.write_text(
        f"[mypy]\nmypy_path = {ROOT}\nuntyped_calls_exclude = torch\n[mypy-xquant_fx.*]\nfollow_imports = silent\n"
    )
    out, error, _ = api.run(["--config-file", str(settings), "--strict", "--no-incremental", str(TYPING / name)])
    assert not error, error
    return [line for line in out.splitlines() if ": error:" in line and f"{name}:" in line]


def test_every_public_name_is_used() -> None:
    tree = ast.parse((TYPING / "user.py").read_text())
    used = {alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert set(xquant_fx.__all__) - {"__version__"} <= used


@pytest.mark.slow
def test_a_users_file_has_no_error(tmp_path: Path) -> None:
    assert errors("user.py", tmp_path) == []


@pytest.mark.slow
def test_three_mistakes_are_three_errors(tmp_path: Path) -> None:
    found = errors("mistakes.py", tmp_path)
    assert len(found) == 3, found
    assert [word in "".join(found) for word in ("Nonsense", "k_bits", '"str"; expected "int"')] == [True] * 3
