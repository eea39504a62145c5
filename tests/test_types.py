"""What type checkers tell people who use xquant_fx: nothing of right code, and of every mistake.

The files are in tests/typing; pyright is what many editors run.
"""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import xquant_fx

ROOT = Path(__file__).resolve().parents[1]
USER, MISTAKES = (ROOT / "tests" / "typing" / name for name in ("user.py", "mistakes.py"))


def check(*command: str) -> str:
    """What a checker prints about both files."""
    command = (sys.executable, "-m", *command, str(USER), str(MISTAKES))
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode in (0, 1), done.stdout + done.stderr
    return done.stdout


def mypy() -> list[tuple[str, int]]:
    # As a user has it: strict, without the settings of pyproject.toml, silent on what is installed. The functions of
    # transformers are not all annotated.
    flags = ("--config-file=", "--follow-imports=silent", "--untyped-calls-exclude=transformers")
    out = check("mypy", "--strict", *flags, f"--cache-dir={ROOT / '.mypy_cache' / 'user'}")
    return [(name, int(line)) for name, line in re.findall(r"(\w+\.py):(\d+): error:", out)]


def pyright() -> list[tuple[str, int]]:
    found = json.loads(check("pyright", "--outputjson", "--pythonpath", sys.executable))["generalDiagnostics"]
    return [(Path(d["file"]).name, d["range"]["start"]["line"] + 1) for d in found if d["severity"] == "error"]


@pytest.mark.slow
@pytest.mark.parametrize("checker", [mypy, pyright])
def test_every_mistake_is_found_and_nothing_else(checker):
    lines = MISTAKES.read_text().splitlines()
    marked = [("mistakes.py", number) for number, line in enumerate(lines, start=1) if line.endswith("# mistake")]
    assert len(marked) == 3
    assert sorted(checker()) == marked


def test_the_user_file_has_every_public_name():
    imports = [n for n in ast.parse(USER.read_text()).body if isinstance(n, ast.ImportFrom)]
    (names,) = ({a.name for a in n.names} for n in imports if n.module == "xquant_fx")
    assert names == set(xquant_fx.__all__)
