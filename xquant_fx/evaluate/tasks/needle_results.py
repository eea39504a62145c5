"""Answers of ``xquant needle`` in the layout of kvpress: one folder per setting and length, scored as its RULER is.

The dataset is called "passkey": the keys and the text are ours, so it is not among those of kvpress's leaderboard.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from xquant_fx.evaluate.models import fingerprint, title
from xquant_fx.evaluate.results import key_of
from xquant_fx.evaluate.tasks.answers import nominal_ratio
from xquant_fx.evaluate.tasks.kvpress import Evaluation, ResultFolder

DATASET = "passkey"


class Found(NamedTuple):
    """One pass key that was asked for."""

    name: str
    """Of the setting."""
    length: int
    depth: float
    trial: int
    answer: str
    predicted: str
    """What greedy decoding writes, up to the first wrong token."""


def write_results(root: str, model: Any, settings: Mapping[str, Any], answers: Sequence[Found]) -> None:
    """Write the folders of ``settings`` (name to config or plan; None: full precision) under ``root``."""
    model_key = fingerprint(model)
    for name, config in settings.items():
        chosen = "{}" if config is None else config.to_json()
        ours = [found for found in answers if found.name == name]
        for length in sorted({found.length for found in ours}):
            rows = [_row(found) for found in ours if found.length == length]
            evaluation = Evaluation(
                dataset=DATASET, data_dir=str(length), model=title(model), settings=chosen,
                press_name="no_press" if config is None else name, compression_ratio=nominal_ratio(model, config),
                key=key_of(model=model_key, setting=chosen, rows=[[row["_id"], row["answer"]] for row in rows]),
                device=str(model.device), dtype=str(model.dtype).removeprefix("torch."),
            )  # fmt: skip
            _write(ResultFolder(root, evaluation), rows)


def _row(found: Found) -> dict[str, Any]:
    task = f"passkey_depth{100 * found.depth:.0f}"
    return {
        "_id": f"{task}-{found.trial}", "task": task, "length": found.length, "answer": [found.answer],
        "predicted_answer": found.predicted,
    }  # fmt: skip


def _write(results: ResultFolder, rows: Sequence[dict[str, Any]]) -> None:
    results.rows.clear()
    for row in rows:
        results.add(row)
    scores: dict[str, list[float]] = {}
    for row in rows:
        hit = row["answer"][0].lower() in row["predicted_answer"].lower()
        scores.setdefault(row["task"], []).append(float(hit))
    results.finish({task: {"string_match": round(100 * sum(hits) / len(hits), 2)} for task, hits in scores.items()})
