"""``task_report``: tasks of lm-evaluation-harness, run by it, in full precision and through quantized caches."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from xquant_fx.errors import ArgumentError
from xquant_fx.evaluate.models import fingerprint, title
from xquant_fx.evaluate.results import key_of
from xquant_fx.evaluate.settings import Setting, check_settings
from xquant_fx.evaluate.tasks.kvpress import file_name
from xquant_fx.evaluate.tasks.local_data import local_datasets
from xquant_fx.plan.config import XQuantConfig
from xquant_fx.plan.plan import Plan
from xquant_fx.tables import render

FULL = "full precision"
SAME, QUANTIZED = "same answers, %", "tokens read quantized, %"


@dataclasses.dataclass(frozen=True)
class Score:
    """One metric of one task."""

    value: float
    error: float | None
    """Standard error over items, as the harness gives it."""


@dataclasses.dataclass(frozen=True)
class TaskResult:
    """All tasks by one setting."""

    name: str
    scores: dict[str, Score]
    """"task: metric" to its score."""
    same: dict[str, float]
    """Task to the share of items that are answered as in full precision, 0 to 1."""
    quantized: float | None
    """Share of the tokens that were read quantized, mean over layers and steps; None in full precision."""


@dataclasses.dataclass(frozen=True)
class TaskReport:
    """Full precision, then the settings."""

    title: str
    results: list[TaskResult]

    def __getitem__(self, name: str) -> TaskResult:
        """The setting called ``name``; raises KeyError where there is none."""
        return {result.name: result for result in self.results}[name]

    def to_dict(self) -> dict[str, Any]:
        """All numbers, as JSON can hold them."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        rows = [[name, *(_cell(r.scores.get(name)) for r in self.results)] for name in self.results[0].scores]
        for task in self.results[0].same:
            rows.append([f"{task}: {SAME}", *(f"{100 * r.same[task]:.1f}" for r in self.results)])
        share = [r.quantized for r in self.results]
        rows.append([QUANTIZED, *("-" if each is None else f"{100 * each:.1f}" for each in share)])
        exact = [r.name for r in self.results if r.quantized == 0]
        note = f"Nothing was quantized yet where {exact} were read: contexts are shorter than their windows."
        return "\n".join([self.title, render("tasks", ["", *(r.name for r in self.results)], rows, note * bool(exact))])


def _cell(score: Score | None) -> str:
    if score is None:
        return "-"
    return f"{score.value:.4f}" + ("" if score.error is None else f" ± {score.error:.4f}")


@dataclasses.dataclass(frozen=True)
class Running:
    """How tasks are run; what is not here is as the task says."""

    limit: int | None = None
    """Items of each task; None: all."""
    num_fewshot: int | None = None
    batch_size: int = 8
    """Continuations of one context, or prompts of a generation, at a time."""
    context_steps: int | None = 1
    """See ``Through``."""
    steps: bool = False
    compiled: bool = False
    chat_template: bool = False


def task_report(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str],
    settings: Mapping[str, XQuantConfig | Plan] | Iterable[Setting],
    *,
    running: Running | None = None,
    data: str | None = None,
    out: str | None = None,
) -> TaskReport:
    """Run tasks of lm-evaluation-harness.

    Args:
        model: a Hugging Face model in eval mode, ``tokenizer`` its tokenizer.
        tasks: names that the harness knows.
        settings: name to config or plan of the cache; full precision comes first by itself.
        running: how; default ``Running()``.
        data: folder with the datasets, see ``local_datasets``; None: from the Hub.
        out: folder for ``tasks.json`` and for all answers, with which a later run goes on.

    Raises:
        ArgumentError: lm-eval is not installed or knows no such task, or a dataset is not in the folder.
        ConfigError: no settings, or one that does not fit the model.
    """
    running = running or Running()
    chosen = [Setting(*s) for s in (settings.items() if isinstance(settings, Mapping) else settings)]
    check_settings(chosen, model)
    store, runs = _Store(out, model, running), {}
    with local_datasets(data):
        for name, config in [(FULL, None), *chosen]:
            runs[name] = _run(model, tokenizer, tasks, name, config, running, store)
    full = runs[FULL][0]
    results = [_result(name, found, full, share) for name, (found, share) in runs.items()]
    report = TaskReport(_title(model, running), results)
    store.write(report)
    return report


def _run(
    model: Any, tokenizer: Any, tasks: Sequence[str], name: str, config: Any, running: Running, store: _Store
) -> tuple[Any, float | None]:
    """(what the harness returns, share of tokens read quantized) of one setting."""
    try:
        from lm_eval import simple_evaluate

        from xquant_fx.evaluate.tasks.harness import XQuantLM
    except ImportError as error:
        raise ArgumentError(f"tasks need lm-eval: pip install 'xquant-fx[tasks]' ({error})") from error
    if unknown := [task for task in tasks if task not in _known_tasks().task_index and not Path(task).is_file()]:
        near = [near for task in unknown for near in difflib.get_close_matches(task, _known_tasks().all_tasks, 5)]
        raise ArgumentError(f"a task must be one that lm-eval knows, got {unknown}; alike are {near}")
    lm = XQuantLM(
        model, tokenizer=tokenizer, config=config, batch_size=running.batch_size, steps=running.steps,
        context_steps=running.context_steps, compiled=running.compiled,
    )  # fmt: skip
    found = simple_evaluate(
        lm, tasks=list(tasks), limit=running.limit, num_fewshot=running.num_fewshot, task_manager=_known_tasks(),
        apply_chat_template=running.chat_template, use_cache=store.answers(name, config),
    )  # fmt: skip
    return found, store.share(name, config, lm.share.mean)


@functools.cache
def _known_tasks() -> Any:
    """The harness's tasks: it reads some ten thousand files to know them, once for all settings."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


class _Store:
    """The folder that answers are kept in; None: nowhere."""

    def __init__(self, out: str | None, model: Any, running: Running) -> None:
        self.folder = None if out is None else Path(out)
        self.facts = {"model": fingerprint(model), **dataclasses.asdict(running)}
        for name in ("limit", "batch_size", "num_fewshot", "chat_template"):  # a request holds what these change
            del self.facts[name]
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)

    def answers(self, name: str, config: Any) -> str | None:
        """Where the harness keeps the answers of a setting: another model, setting or code has another file."""
        if self.folder is None:
            return None
        key = key_of(setting=None if config is None else config.to_json(), **self.facts)
        return str(self.folder / "-".join([file_name(name), key[:12]]))

    def share(self, name: str, config: Any, mean: float | None) -> float | None:
        """The share of this run, or where all answers were there, of the run that gave them."""
        if self.folder is None or config is None:
            return mean
        path = Path(f"{self.answers(name, config)}.share.json")
        if mean is None and path.exists():
            return float(json.loads(path.read_text()))
        path.write_text(json.dumps(mean))
        return mean

    def write(self, report: TaskReport) -> None:
        """Write ``tasks.json``."""
        if self.folder is not None:
            (self.folder / "tasks.json").write_text(json.dumps(report.to_dict(), indent=1) + "\n")


def _title(model: Any, running: Running) -> str:
    items = "all items" if running.limit is None else f"{running.limit} items of each"
    steps = "all" if running.context_steps is None else running.context_steps
    return f"{title(model)}, {model.dtype}: {items}, {steps} token(s) of each context are steps".replace("torch.", "")


def _result(name: str, found: Any, full: Any, share: float | None) -> TaskResult:
    scores = {}
    for task, metrics in found["results"].items():
        for key, value in metrics.items():
            metric, comma, which = key.partition(",")
            if comma and not metric.endswith("_stderr") and isinstance(value, int | float):
                label = f"{task}: {metric}" + (f" ({which})" if which != "none" else "")
                error = metrics.get(f"{metric}_stderr,{which}")
                scores[label] = Score(float(value), float(error) if isinstance(error, int | float) else None)
    same = {task: _agreement(samples, full["samples"][task]) for task, samples in found["samples"].items()}
    return TaskResult(name, scores, same, share)


def _agreement(samples: list[Any], full: list[Any]) -> float:
    """Share of items that are answered alike; an item has a sample per filter, with the same answer."""
    theirs = {sample["doc_id"]: _answer(sample) for sample in full}
    ours = {sample["doc_id"]: _answer(sample) for sample in samples}
    return sum(ours[item] == theirs[item] for item in ours) / max(len(ours), 1)


def _answer(sample: Any) -> Any:
    """The choice of the largest likelihood, or the text that was written."""
    answers = [each[0] for each in sample["resps"]]
    if len(answers) > 1 and all(isinstance(each, tuple | list) for each in answers):
        return max(range(len(answers)), key=lambda i: float(answers[i][0]))
    return [each[1] if isinstance(each, tuple | list) else each for each in answers]
