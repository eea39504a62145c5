"""Results in the file layout that kvpress writes and its leaderboard takes (kvpress 0.5.5, evaluation/evaluate.py).

    <root>/<dataset>__<data_dir>__<model>__<press>__<ratio>[__fraction<f>][__max_context<n>][__query_aware]/
        predictions.csv     a row per item, without its context
        metrics.json        what kvpress's scorer of the dataset returns
        config.yaml         the fields of kvpress's EvaluationConfig, and ours under "xquant_..."

A press is a setting here, and the ratio what it saves: 1 - true bits / 16. A folder of another run, model or code is
left alone, as kvpress does: the new one is a numbered folder inside.
"""

from __future__ import annotations

import csv
import dataclasses
import itertools
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What kvpress calls the configuration of an evaluation."""

    dataset: str
    data_dir: str
    model: str
    press_name: str
    """"no_press" in full precision."""
    compression_ratio: float
    key: str
    """Hash of all that the numbers depend on (``results.key_of``)."""
    settings: str
    """The config or plan as JSON."""
    device: str = "cpu"
    dtype: str = "float32"
    fraction: float = 1.0
    max_context_length: int | None = None
    query_aware: bool = False
    """The question is prefilled with the context, so that neither reads a quantized token."""

    @property
    def folder(self) -> str:
        """Name of the folder."""
        parts = [self.dataset, self.data_dir, self.model.replace("/", "--"), file_name(self.press_name)]
        parts.append(f"{self.compression_ratio:.2f}")
        if self.fraction < 1:
            parts.append(f"fraction{self.fraction:.3f}")
        if self.max_context_length is not None:
            parts.append(f"max_context{self.max_context_length}")
        return "__".join(filter(None, [*parts, "query_aware" * self.query_aware]))

    def to_dict(self) -> dict[str, Any]:
        """The fields by kvpress's names."""
        ours = {"xquant_key": self.key, "xquant_settings": self.settings}
        fields = {k: v for k, v in dataclasses.asdict(self).items() if k not in ("key", "settings", "dtype")}
        unused = ("key_channel_compression_ratio", "head_compression_ratio", "threshold", "max_new_tokens",
                  "needle_depth", "compression_interval", "target_size", "hidden_states_buffer_size")  # fmt: skip
        rest = {"model_kwargs": {"dtype": self.dtype}, "press_init_command": f"XQuantCache({self.press_name})"}
        return {**fields, **dict.fromkeys(unused), **rest, "seed": 42, "fp8": False, **ours}


class ResultFolder:
    """The folder of one evaluation under ``root``, with the rows that are in it; None: rows are kept in memory."""

    def __init__(self, root: str | Path | None, evaluation: Evaluation) -> None:
        self.rows: list[dict[str, Any]] = []
        self.folder: Path | None = None
        if root is None:
            return
        self.folder = next(f for f in _folders(Path(root) / evaluation.folder) if _is_ours(f, evaluation.key))
        self.folder.mkdir(parents=True, exist_ok=True)
        predictions = self.folder / "predictions.csv"
        if predictions.exists():
            with predictions.open(newline="", encoding="utf-8") as file:
                self.rows = list(csv.DictReader(file))
        (self.folder / "config.yaml").write_text(yaml.safe_dump(evaluation.to_dict(), sort_keys=False, indent=2))

    def find(self, item: str) -> dict[str, Any] | None:
        """The row with this ``_id``."""
        return next((row for row in self.rows if row["_id"] == item), None)

    def add(self, row: dict[str, Any]) -> None:
        """Keep a row, in the file, too; lists as JSON."""
        self.rows.append({k: json.dumps(v, ensure_ascii=False) if isinstance(v, list) else v for k, v in row.items()})
        if self.folder is None:
            return
        part = self.folder / "predictions.csv.part"
        with part.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(self.rows[0]))
            writer.writeheader()
            writer.writerows(self.rows)
        os.replace(part, self.folder / "predictions.csv")

    def finish(self, metrics: Any) -> None:
        """Write the metrics."""
        if self.folder is not None:
            (self.folder / "metrics.json").write_text(json.dumps(metrics, indent=4) + "\n")


def file_name(name: str) -> str:
    """A setting's name with what may not be in a file's name left out."""
    return re.sub(r"[^\w.=-]+", "-", name)


def _folders(first: Path) -> Iterator[Path]:
    yield first
    yield from (first / str(i) for i in itertools.count(1))


def _is_ours(folder: Path, key: str) -> bool:
    """Whether this run may write there: nothing is there, or what the same run left."""
    config = folder / "config.yaml"
    if not config.exists():
        return not folder.exists()
    return bool(yaml.safe_load(config.read_text()).get("xquant_key") == key)
