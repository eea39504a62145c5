"""Runs of a benchmark in processes of their own, with what earlier runs have compiled, or without. No torch in here."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

#: "new": with nothing on disk; "cold": with torch's precompiled headers alone; "warm": with all that earlier runs left.
WAYS = {"new": ("cache", "headers"), "cold": ("cache",), "warm": ()}


def in_new_process(way: str, arguments: Sequence[str], folder: Path) -> dict[str, Any]:
    """What this script, called with these ``arguments``, prints as JSON; its caches are in ``folder``."""
    for name in WAYS[way]:
        shutil.rmtree(folder / name, ignore_errors=True)
    (folder / "headers").mkdir(parents=True, exist_ok=True)
    # Torch keeps precompiled headers in the folder for temporary files, wherever its other caches are.
    places = {"TORCHINDUCTOR_CACHE_DIR": str(folder / "cache"), "TMPDIR": str(folder / "headers")}
    command = [sys.executable, sys.argv[0], *arguments]
    done = subprocess.run(command, env={**os.environ, **places}, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[-4000:])
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found
