"""LongBench's tasks, items and prompts.

Items are what was released: ``data.zip`` with a file ``data/<task>.jsonl`` per task, or a folder with these files. The
prompts are LongBench's own (LONGBENCH_LICENSE).
"""

from __future__ import annotations

import functools
import json
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from xquant_fx.errors import ArgumentError
from xquant_fx.evaluate.tasks import longbench_metrics as metrics

#: (repository of the Hub, file) that items come from without a folder.
HUB = ("THUDM/LongBench", "data.zip")
#: The suffix of LongBench-E: of the same tasks, items of evenly spread length.
EVEN = "_e"


class Task(NamedTuple):
    """How a task is answered and scored."""

    metric: metrics.Metric
    new_tokens: int
    """Most tokens of an answer."""
    examples: bool = False
    """Its context are examples to continue, or code: no chat template."""
    first_line: bool = False
    """Only the first line of an answer counts."""


TASKS: dict[str, Task] = {
    "narrativeqa": Task(metrics.qa_f1, 128),
    "qasper": Task(metrics.qa_f1, 128),
    "multifieldqa_en": Task(metrics.qa_f1, 64),
    "multifieldqa_zh": Task(metrics.qa_f1_zh, 64),
    "hotpotqa": Task(metrics.qa_f1, 32),
    "2wikimqa": Task(metrics.qa_f1, 32),
    "musique": Task(metrics.qa_f1, 32),
    "dureader": Task(metrics.rouge_zh, 128),
    "gov_report": Task(metrics.rouge, 512),
    "qmsum": Task(metrics.rouge, 512),
    "multi_news": Task(metrics.rouge, 512),
    "vcsum": Task(metrics.rouge_zh, 512),
    "trec": Task(metrics.classification, 64, examples=True, first_line=True),
    "triviaqa": Task(metrics.qa_f1, 32, examples=True, first_line=True),
    "samsum": Task(metrics.rouge, 128, examples=True, first_line=True),
    "lsht": Task(metrics.classification, 64, examples=True, first_line=True),
    "passage_count": Task(metrics.count, 32),
    "passage_retrieval_en": Task(metrics.retrieval, 32),
    "passage_retrieval_zh": Task(metrics.retrieval_zh, 32),
    "lcc": Task(metrics.code_sim, 64, examples=True),
    "repobench-p": Task(metrics.code_sim, 64, examples=True),
}


def task_of(name: str) -> Task:
    """The task called ``name``, or of LongBench-E with "_e" behind it; raises ArgumentError where there is none."""
    if name.removesuffix(EVEN) not in TASKS:
        raise ArgumentError(f"a task of LongBench must be one of {list(TASKS)} (or with {EVEN!r}), got {name!r}")
    return TASKS[name.removesuffix(EVEN)]


@functools.cache
def prompts() -> dict[str, str]:
    """Task to its prompt, with places for the fields of an item."""
    found: dict[str, str] = json.loads(Path(__file__).with_name("longbench_prompts.json").read_text(encoding="utf-8"))
    return found


def read_items(data: str | None, name: str) -> list[dict[str, Any]]:
    """The items of a task from a folder or a ``data.zip``; None: from the Hub.

    Raises:
        ArgumentError: no such file, or an item without a field that is needed.
    """
    if data is None:
        from huggingface_hub import hf_hub_download

        data = hf_hub_download(*HUB, repo_type="dataset")
    items = [json.loads(line) for line in _text(Path(data), f"{name}.jsonl").splitlines() if line.strip()]
    needed = {"input", "context", "answers", "all_classes", "length"}
    for i, item in enumerate(items):
        if missing := needed - set(item):
            raise ArgumentError(
                f"an item of LongBench must have {sorted(needed)}: item {i} of {name} lacks {sorted(missing)}"
            )
    return items


def _text(data: Path, name: str) -> str:
    if data.suffix == ".zip":
        with zipfile.ZipFile(data) as archive:
            for member in (f"data/{name}", name):
                if member in archive.namelist():
                    return archive.read(member).decode("utf-8")
    for path in (data / name, data / "data" / name):
        if path.is_file():
            return path.read_text(encoding="utf-8")
    raise ArgumentError(f"LongBench's {name} must lie in {data}, or in its folder data")


class Prompt(NamedTuple):
    """What a model reads for an item."""

    ids: list[int]
    context: int
    """Tokens up to the end of the item's context; those after it are the question."""


class Prompts:
    """Makes prompts: middle cut out where they are too long, in a chat template where a task wants one.

    Args:
        tokenizer: of the model.
        max_length: tokens of a prompt, without the template.
        chat: use the tokenizer's chat template, if it has one, but for tasks of examples and code.
    """

    def __init__(self, tokenizer: Any, max_length: int, chat: bool = True) -> None:
        if max_length < 2:
            raise ArgumentError(f"max_length must be 2 tokens or more, got {max_length}")
        self.tokenizer, self.max_length = tokenizer, max_length
        self.chat = chat and bool(getattr(tokenizer, "chat_template", None))

    def of(self, name: str, item: dict[str, Any]) -> Prompt:
        """The prompt of an item of task ``name``."""
        form = prompts()[name.removesuffix(EVEN)]
        text = self._cut(form.format(**item))
        chat = self.chat and not task_of(name).examples
        if chat:
            message = [{"role": "user", "content": text}]
            text = self.tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        ids = self.tokenizer(text, add_special_tokens=not chat, verbose=False)["input_ids"]
        # At least one token is left to be read by the cache, so that the answer's first token comes from it.
        return Prompt(ids, max(1, min(self._context(text, form, item, ids, chat), len(ids) - 1)))

    def _context(self, text: str, form: str, item: dict[str, Any], ids: list[int], chat: bool) -> int:
        """Tokens before the question; all, if the cut went through it or the prompt has none."""
        question = form.split("{context}")[1].format(**item)
        at = text.rfind(question) if question else -1
        if at < 0:
            return len(ids)
        before = self.tokenizer(text[:at], add_special_tokens=not chat, verbose=False)["input_ids"]
        return _common(ids, before)

    def _cut(self, text: str) -> str:
        """The first and the last half of ``max_length`` tokens of a text that has more, as text."""
        ids = self.tokenizer(text, verbose=False)["input_ids"]
        if len(ids) <= self.max_length:
            return text
        half = self.max_length // 2
        decode: Callable[..., str] = functools.partial(self.tokenizer.decode, skip_special_tokens=True)
        return decode(ids[:half]) + decode(ids[-half:])


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens both begin with."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
