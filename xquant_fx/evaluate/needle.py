"""Retrieval of a pass key from long text, over lengths and depths.

The text is the prompt, which the model reads in full precision; the question and the answer come token by token, so
the answer has to come from the cache. The steps are simulated. All tokens of an answer are its most likely ones, each
after those before it, exactly if greedy decoding writes the answer: so one pass tells.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from xquant_fx.errors import ArgumentError
from xquant_fx.evaluate.models import title
from xquant_fx.evaluate.settings import Setting, check_settings
from xquant_fx.evaluate.simulate import Prefilled, reference_logits, simulated_logits
from xquant_fx.evaluate.tasks.needle_results import Found, write_results
from xquant_fx.evaluate.windows import token_ids
from xquant_fx.plan.config import XQuantConfig
from xquant_fx.plan.plan import Plan
from xquant_fx.tables import render

FULL = "full precision"
NEEDLE = "\n\nThe pass key is {key}. Remember it. {key} is the pass key.\n\n"
QUESTION = "\n\nWhat is the pass key? The pass key is"


@dataclasses.dataclass(frozen=True)
class NeedleReport:
    """Share of pass keys found, by setting, depth and length."""

    title: str
    lengths: list[int]
    """Tokens of the prompt."""
    depths: list[float]
    """Where in the prompt the key stands, 0 (first) to 1 (last)."""
    found: dict[str, list[list[float]]]
    """Setting, "full precision" among them, to a row per depth with the share found, 0 to 1, per length."""

    def to_dict(self) -> dict[str, Any]:
        """All numbers, as JSON can hold them."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        columns = ["depth, %", *(f"{length:,} tokens" for length in self.lengths)]
        tables = []
        for name, shares in self.found.items():
            mean = torch.tensor(shares).mean().item()
            rows = [
                [f"{100 * depth:.0f}", *(f"{100 * share:.0f}" for share in row)]
                for depth, row in zip(self.depths, shares, strict=True)
            ]
            tables += [f"{name}: {100 * mean:.1f} % of pass keys found", render("", columns, rows)]
        return "\n".join([self.title, *tables])


@torch.no_grad()
def needle_report(
    model: Any,
    tokenizer: Any,
    text: str,
    settings: Mapping[str, XQuantConfig | Plan] | Iterable[Setting],
    *,
    lengths: Sequence[int] = (512, 1024),
    depths: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0),
    trials: int = 4,
    progress: bool = False,
    results: str | None = None,
) -> NeedleReport:
    """Hide pass keys of five digits in ``text`` and ask for them.

    Args:
        model: a Hugging Face model in eval mode, ``tokenizer`` its tokenizer.
        text: what the keys are hidden in; at least the longest of ``lengths``.
        settings: name to config or plan of the cache.
        lengths: tokens of the prompts.
        depths: places of the key, 0 to 1.
        trials: keys for each length and depth, the same for every setting.
        progress: show a bar.
        results: folder for the answers in the layout of kvpress (``tasks/needle_results.py``).

    Raises:
        ArgumentError: the text is too short for a length, a length for the needle, or a depth not in [0, 1].
        ConfigError: no settings, or one that does not fit the model.
    """
    chosen = [Setting(*s) for s in (settings.items() if isinstance(settings, Mapping) else settings)]
    check_settings(chosen, model)
    hay = Haystack(tokenizer, text, model.device)
    names = [FULL, *(setting.name for setting in chosen)]
    found = {name: torch.zeros(len(depths), len(lengths)) for name in names}
    cells = [(i, j, trial) for i in range(len(depths)) for j in range(len(lengths)) for trial in range(trials)]
    answers: list[Found] = []
    for i, j, trial in tqdm(cells, disable=not progress):
        ids, prompt = hay.window(lengths[j], depths[i], trial)
        wanted = ids[0, ids.shape[1] - hay.answer_tokens :].tolist()
        for name, given in _answers(model, ids, prompt, hay.answer_tokens, chosen):
            found[name][i, j] += (given == wanted) / trials
            texts = (
                [tokenizer.decode(each).strip() for each in (wanted, _written(given, wanted))] if results else ["", ""]
            )
            answers.append(Found(name, lengths[j], depths[i], trial, *texts))
    if results:
        write_results(results, model, {FULL: None, **dict(chosen)}, answers)
    heading = f"{title(model)}, {model.dtype}: {trials} pass keys per cell, found in simulated steps, %"
    shares = {name: each.tolist() for name, each in found.items()}
    return NeedleReport(heading.replace("torch.", ""), list(lengths), list(depths), shares)


class Haystack:
    """Token ids of a text with a key in it, and of a question with the answer."""

    def __init__(self, tokenizer: Any, text: str, device: torch.device) -> None:
        self.tokenizer, self.device = tokenizer, device
        self.begin, self.text = token_ids(tokenizer, text)
        self.answer_tokens = 0

    def window(self, length: int, depth: float, trial: int) -> tuple[Tensor, int]:
        """(ids [1, T], tokens of the prompt): ``length`` tokens with the key at ``depth``, then question and answer."""
        key = f"{random.Random(1000 * length + trial).randrange(10000, 100000)}"
        needle, question = self._ids(NEEDLE.format(key=key)), self._ids(QUESTION)
        answer = self._ids(f"{QUESTION} {key}")[len(question) :]
        room = length - len(self.begin) - len(needle)
        if not 0 <= depth <= 1 or not 0 <= room <= len(self.text):
            raise ArgumentError(
                f"a depth must be in [0, 1] and a length {len(needle)} (the needle) to {len(self.text)} tokens "
                f"(the text), got {depth} and {length}"
            )
        at, self.answer_tokens = int(room * depth), len(answer)
        prompt = [*self.begin, *self.text[:at], *needle, *self.text[at:room]]
        return torch.tensor([[*prompt, *question, *answer]], device=self.device), len(prompt)

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]


def _written(given: list[int], wanted: list[int]) -> list[int]:
    """What greedy decoding writes of ``given``: up to the first token that is not the wanted one."""
    wrong = (i for i, (ours, theirs) in enumerate(zip(given, wanted, strict=True)) if ours != theirs)
    return given[: next(wrong, len(given)) + 1]


def _answers(
    model: Any, ids: Tensor, prompt: int, answer: int, settings: list[Setting]
) -> Iterable[tuple[str, list[int]]]:
    """(name, the most likely token at each of the last ``answer`` tokens of ``ids``).

    They are those tokens exactly if greedy decoding writes them; after a wrong one they follow the right answer.
    """
    window = Prefilled.of(model, ids, prompt)
    keep = torch.arange(ids.shape[1] - answer - 1, ids.shape[1] - 1, device=ids.device)
    yield FULL, reference_logits(window, keep)[0].argmax(-1).tolist()
    for setting in settings:
        logits, _ = simulated_logits(window, keep, setting.config)
        yield setting.name, logits[0].argmax(-1).tolist()
