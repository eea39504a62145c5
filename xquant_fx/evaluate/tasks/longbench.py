"""``longbench_report``: LongBench in full precision and through quantized caches.

The context of an item is prefilled in full precision, as a prompt is; the question that follows it and the answer read
the quantized cache, as in kvpress. ``whole_prompt`` prefills the question, too, as a program does that gets both in one
prompt: then only the answer reads the cache, and its first token does by the prompt's last.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tqdm import tqdm

from xquant_fx.evaluate.models import fingerprint, title
from xquant_fx.evaluate.results import key_of
from xquant_fx.evaluate.settings import Setting, check_settings
from xquant_fx.evaluate.tasks.answers import compiling, nominal_ratio, write_answer
from xquant_fx.evaluate.tasks.kvpress import Evaluation, ResultFolder
from xquant_fx.evaluate.tasks.longbench_data import EVEN, Prompts, read_items, task_of
from xquant_fx.evaluate.tasks.report import FULL, QUANTIZED, SAME
from xquant_fx.plan.config import XQuantConfig
from xquant_fx.plan.plan import Plan
from xquant_fx.tables import render

#: Upper ends of the lengths that LongBench-E tells apart, in words or Chinese characters.
LENGTHS = {"0-4k": 4000, "4-8k": 8000, "8k+": float("inf")}


@dataclasses.dataclass(frozen=True)
class LongBenchReport:
    """Scores of LongBench, 0 to 100, by setting, "full precision" among them."""

    title: str
    scores: dict[str, dict[str, float]]
    """Setting to task to score; a task of LongBench-E is one per range of lengths."""
    same: dict[str, float]
    """Setting to the share of items with the same answer as in full precision, 0 to 1."""
    quantized: dict[str, float]
    """Setting to the share of tokens that were read quantized, mean over layers, steps and items, 0 to 1."""

    def to_dict(self) -> dict[str, Any]:
        """All numbers, as JSON can hold them."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        tasks = list(self.scores[FULL])
        rows = [[task, *(f"{scores[task]:.2f}" for scores in self.scores.values())] for task in tasks]
        if len(tasks) > 1:
            rows.append(["average", *(f"{sum(s.values()) / len(s):.2f}" for s in self.scores.values())])
        rows.append([SAME, *(f"{100 * share:.1f}" for share in self.same.values())])
        rows.append([QUANTIZED, *(f"{100 * share:.1f}" for share in self.quantized.values())])
        return "\n".join([self.title, render("LongBench", ["", *self.scores], rows)])


@dataclasses.dataclass(frozen=True)
class Reading:
    """How items are read and answered."""

    max_length: int | None = None
    """Tokens of a prompt, beyond which its middle is cut out; None: what the model's positions leave for the answer."""
    limit: int | None = None
    """Items of each task; None: all."""
    whole_prompt: bool = False
    chat: bool = True
    """The tokenizer's chat template, for the tasks that LongBench uses one with."""
    compiled: bool = False


def longbench_report(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str],
    settings: Mapping[str, XQuantConfig | Plan] | Iterable[Setting],
    *,
    data: str | None = None,
    reading: Reading | None = None,
    out: str | None = None,
    progress: bool = False,
) -> LongBenchReport:
    """Answer the items of LongBench and score the answers.

    Args:
        model: a Hugging Face model in eval mode, ``tokenizer`` its tokenizer.
        tasks: names of tasks, with "_e" behind them those of LongBench-E.
        settings: name to config or plan of the cache; full precision comes first by itself.
        data: folder with a file ``<task>.jsonl`` each, or the released ``data.zip``; None: that of the Hub.
        reading: how; default ``Reading()``.
        out: folder for the answers and scores in kvpress's layout (``kvpress.py``), with which a later run goes on.
        progress: show a bar.

    Raises:
        ArgumentError: no such task, no such file, or a package is missing that scores a task.
        ConfigError: no settings, or one that does not fit the model.
    """
    chosen = [Setting(*s) for s in (settings.items() if isinstance(settings, Mapping) else settings)]
    check_settings(chosen, model)
    items = {task: read_items(data, task) for task in tasks if task_of(task)}
    run = _Run(model, tokenizer, reading or Reading(), out)
    rows: dict[str, dict[str, list[Any]]] = {}
    with tqdm(total=sum(map(run.count, items.values())) * (1 + len(chosen)), disable=not progress) as bar:
        for name, config in [(FULL, None), *chosen]:
            rows[name] = {task: run.task(name, config, task, items[task], bar) for task in tasks}
    return _report(run.title, rows)


class _Run:
    """Answers items and keeps the answers."""

    def __init__(self, model: Any, tokenizer: Any, reading: Reading, out: str | None) -> None:
        self.model, self.tokenizer, self.reading, self.out = model, tokenizer, reading, out
        self.model_key = fingerprint(model)
        items = "all items" if reading.limit is None else f"{reading.limit} items of each"
        self.title = f"{title(model)}, {model.dtype}: {items}".replace("torch.", "")

    def count(self, items: list[Any]) -> int:
        """How many of the items are read."""
        return len(items) if self.reading.limit is None else min(self.reading.limit, len(items))

    def task(self, name: str, config: Any, task: str, items: list[Any], bar: Any) -> list[Any]:
        """Rows of the items of a task, as they are in predictions.csv."""
        prompts = Prompts(self.tokenizer, self._max_length(task), self.reading.chat)
        results = ResultFolder(self.out, self._evaluation(name, config, task, items))
        rows = []
        for item in items[: self.count(items)]:
            mark = _mark(item)
            bar.set_postfix_str(f"{name}, {task}")
            if results.find(mark) is None:
                with compiling(self.model, self.reading.compiled and config is not None):
                    results.add(self._answered(config, task, item, mark, prompts))
            rows.append(results.find(mark))
            bar.update()
        results.finish(score(task, rows))
        return rows

    def _answered(self, config: Any, task: str, item: Any, mark: str, prompts: Prompts) -> dict[str, Any]:
        prompt, rules = prompts.of(task, item), task_of(task)
        context = len(prompt.ids) - 1 if self.reading.whole_prompt else prompt.context
        found = write_answer(self.model, prompt.ids, context, config, rules.new_tokens, self._end(task))
        return {
            "_id": mark, "task": task, "question": item["input"], "answers": item["answers"],
            "all_classes": item["all_classes"] or [], "length": item["length"], "max_new_tokens": rules.new_tokens,
            "predicted_answer": self.tokenizer.decode(found.ids, skip_special_tokens=True),
            "compression_ratio": found.compression_ratio, "prompt_tokens": len(prompt.ids),
            "context_tokens": context, "read_quantized": found.quantized,
        }  # fmt: skip

    def _end(self, task: str) -> list[int]:
        """Summaries of dialogues end with their line, or models write dialogues for ever."""
        if task.removesuffix(EVEN) != "samsum":
            return []
        line = self.tokenizer("\n", add_special_tokens=False)["input_ids"][-1]
        return [self.tokenizer.eos_token_id, line]

    def _max_length(self, task: str) -> int:
        if self.reading.max_length is not None:
            return self.reading.max_length
        # 64 tokens for a chat template.
        return int(self.model.config.max_position_embeddings) - task_of(task).new_tokens - 64

    def _evaluation(self, name: str, config: Any, task: str, items: list[Any]) -> Evaluation:
        even, chosen = task.endswith(EVEN), "{}" if config is None else config.to_json()
        facts = {k: v for k, v in dataclasses.asdict(self.reading).items() if k != "limit"}
        facts["items"] = hashlib.sha256(json.dumps(items).encode()).hexdigest()
        return Evaluation(
            dataset="longbench-e" if even else "longbench", data_dir=task.removesuffix(EVEN), model=title(self.model),
            press_name="no_press" if config is None else name, compression_ratio=nominal_ratio(self.model, config),
            key=key_of(model=self.model_key, task=task, setting=chosen, **facts), settings=chosen,
            device=str(self.model.device), dtype=str(self.model.dtype).removeprefix("torch."),
            fraction=self.count(items) / max(len(items), 1), max_context_length=self.reading.max_length,
            query_aware=self.reading.whole_prompt,
        )  # fmt: skip


def _mark(item: Any) -> str:
    """An item's own id, or else one of its text."""
    text = json.dumps([item["context"], item["input"]])
    return str(item.get("_id") or hashlib.sha256(text.encode()).hexdigest()[:24])


def score(task: str, rows: Sequence[Any]) -> Any:
    """Score of a task in percent, as LongBench rounds it; of LongBench-E, range of lengths to score."""
    found = [_score(task, row) for row in rows]
    if not task.endswith(EVEN):
        return _percent(found)
    lengths = [next(name for name, end in LENGTHS.items() if int(row["length"]) < end) for row in rows]
    by = {name: [s for s, length in zip(found, lengths, strict=True) if length == name] for name in LENGTHS}
    return {name: _percent(scores) for name, scores in by.items() if scores}


def _score(task: str, row: Any) -> float:
    """The best score against any of the true answers."""
    rules, answer = task_of(task), row["predicted_answer"]
    if rules.first_line:
        answer = answer.lstrip("\n").split("\n")[0]
    truths, classes = json.loads(row["answers"]), json.loads(row["all_classes"])
    return max((rules.metric(answer, truth, classes) for truth in truths), default=0.0)


def _percent(scores: Sequence[float]) -> float:
    return round(100 * sum(scores) / max(len(scores), 1), 2)


def _report(heading: str, rows: dict[str, dict[str, list[Any]]]) -> LongBenchReport:
    scores, same, quantized = {}, {}, {}
    full = [row for of_task in rows[FULL].values() for row in of_task]
    for name, tasks in rows.items():
        every = [row for of_task in tasks.values() for row in of_task]
        equal = (a["predicted_answer"] == b["predicted_answer"] for a, b in zip(every, full, strict=True))
        scores[name] = {label: value for task, found in tasks.items() for label, value in _labelled(task, found)}
        same[name] = sum(equal) / max(len(every), 1)
        quantized[name] = sum(float(row["read_quantized"]) for row in every) / max(len(every), 1)
    return LongBenchReport(heading, scores, same, quantized)


def _labelled(task: str, rows: Sequence[Any]) -> list[tuple[str, float]]:
    found = score(task, rows)
    return [(f"{task} {name}", value) for name, value in found.items()] if isinstance(found, dict) else [(task, found)]
