"""What has been measured already: a JSON file that a later run goes on with."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import xquant_fx
from xquant_fx.errors import ArgumentError
from xquant_fx.evaluate.measures import Measured
from xquant_fx.evaluate.size import Size

FORMAT = 1


@dataclasses.dataclass(frozen=True)
class Record:
    """One window by one setting."""

    name: str
    """Of the setting."""
    measured: Measured
    size: Size


class Results:
    """Records by key, and the file that they are kept in (None: no file). Made anew as a whole at each record."""

    def __init__(self, path: str | Path | None) -> None:
        self.path = None if path is None else Path(path)
        self.records: dict[str, Record] = {}
        if self.path is not None and self.path.exists():
            self.records = _read(self.path)

    def add(self, key: str, record: Record) -> None:
        """Keep a record, in the file, too."""
        self.records[key] = record
        self.write({})

    def write(self, summary: dict[str, Any]) -> None:
        """Write the file, with a ``summary`` for readers of it."""
        if self.path is None:
            return
        records = {key: dataclasses.asdict(record) for key, record in self.records.items()}
        text = json.dumps({"xquant_eval": FORMAT, **summary, "records": records})
        part = self.path.with_name(self.path.name + ".part")
        part.write_text(text + "\n")
        os.replace(part, self.path)  # so that a run that is stopped leaves a whole file


def key_of(**facts: Any) -> str:
    """What tells one record from another: a hash of all that its numbers depend on, of this code, too."""
    text = json.dumps({**facts, "code": _code()}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:24]


@functools.cache
def _code() -> str:
    """Hash of the sources that numbers come from: who changes a kernel measures again."""
    root, digest = Path(xquant_fx.__file__).parent, hashlib.sha256()
    files = (p for folder in ("cache", "evaluate", "kernels") for p in (root / folder).rglob("*"))
    for path in sorted(p for p in files if p.suffix in (".py", ".cpp", ".h")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _read(path: Path) -> dict[str, Record]:
    try:
        data = json.loads(path.read_text())
        if data["xquant_eval"] != FORMAT:
            raise ArgumentError(f"{path} must be of format {FORMAT}, got {data['xquant_eval']!r}")
        return {
            key: Record(r["name"], Measured(**r["measured"]), Size(**r["size"])) for key, r in data["records"].items()
        }
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ArgumentError(f"{path} must hold the results of an evaluation, or not exist: {error!r}") from error
