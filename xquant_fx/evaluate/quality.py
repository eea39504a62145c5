"""``quality_report``: next tokens of a quantized cache against full precision, read at depth and in decode."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from xquant_fx.cache.huggingface import XQuantCache
from xquant_fx.errors import ArgumentError, ConfigError
from xquant_fx.evaluate.measures import measure, summarize
from xquant_fx.evaluate.models import fingerprint, title
from xquant_fx.evaluate.report import Quality, QualityReport
from xquant_fx.evaluate.results import Record, Results, key_of
from xquant_fx.evaluate.settings import Setting, check_names
from xquant_fx.evaluate.simulate import Prefilled, check_attention, reference_logits, simulated_logits
from xquant_fx.evaluate.size import size_of
from xquant_fx.evaluate.steps import step_logits
from xquant_fx.plan.config import XQuantConfig
from xquant_fx.plan.plan import Plan

#: Positions of the first window at which the model's own attention is asked, too.
CHECKED = 32


@dataclasses.dataclass(frozen=True)
class Reading:
    """How a window is read.

    Raises:
        ArgumentError: a number is not positive.
    """

    prompt: int = 1024
    """Tokens of a window that are prefilled in full precision."""
    stride: int = 2
    """Every so many of the tokens after them is measured."""
    steps: bool = False
    """Real decode steps through an ``XQuantCache``, one by one; else all of them in one pass, which gives the same."""
    compiled: bool = False
    """Real steps are compiled."""

    def __post_init__(self) -> None:
        if self.prompt < 1 or self.stride < 1:
            raise ArgumentError(f"prompt and stride must be 1 or more, got {self.prompt} and {self.stride}")
        if self.compiled and not self.steps:
            raise ArgumentError("only real steps can be compiled: compiled=True needs steps=True")

    def positions(self, window: int) -> Tensor:
        """What is measured of a window of so many tokens: int64 positions that have a token after them.

        Raises:
            ArgumentError: none has.
        """
        if window < self.prompt + 2:
            raise ArgumentError(f"a window must hold 2 tokens after its prompt of {self.prompt}, got {window} in all")
        return torch.arange(self.prompt, window - 1, self.stride)


@torch.no_grad()
def quality_report(
    model: Any,
    windows: Tensor,
    settings: Mapping[str, XQuantConfig | Plan] | Iterable[Setting],
    *,
    reading: Reading | None = None,
    out: str | None = None,
    progress: bool = False,
    skip_invalid: bool = False,
) -> QualityReport:
    """Measure what quantized caches do to a model's next tokens, on windows of text.

    Args:
        model: a Hugging Face model in eval mode; its full-attention layers are quantized.
        windows: int64 token ids [windows, T].
        settings: name to config or plan; each becomes a column of the report.
        reading: prompt length, stride and way of each window; default ``Reading()``.
        out: JSON file for all numbers. Windows that it holds already, of the same model, tokens and settings, are not
            run again.
        progress: show a bar.
        skip_invalid: leave a setting out that does not fit the model; ``refused`` of the report says why.

    Raises:
        ArgumentError: windows are too short, or ``out`` is another kind of file.
        ConfigError: no settings, or one that does not fit the model.
    """
    reading = reading or Reading()
    chosen = [Setting(*s) for s in (settings.items() if isinstance(settings, Mapping) else settings)]
    check_names(chosen)
    run = _Run(model, reading, Results(out), reading.positions(windows.shape[1]).to(windows.device), skip_invalid)
    records: dict[str, list[Record]] = {setting.name: [] for setting in chosen}
    limit = torch._dynamo.config.recompile_limit * len(chosen)  # each setting has graphs of its own
    more_graphs = torch._dynamo.config.patch(recompile_limit=limit)
    with tqdm(total=len(windows) * len(chosen), disable=not progress) as bar, more_graphs:
        for ids in windows:
            for name, record in run.window(ids[None], chosen, bar):
                records[name].append(record)
    qualities = [_quality(name, of_windows) for name, of_windows in records.items() if name not in run.refused]
    report = QualityReport(_title(model, reading, windows), qualities, run.refused)
    run.results.write({"report": report.to_dict()})
    return report


def _quality(name: str, records: list[Record]) -> Quality:
    return Quality(name, summarize([record.measured for record in records]), records[0].size)


def _title(model: Any, reading: Reading, windows: Tensor) -> str:
    way = "compiled steps" if reading.compiled else "eager steps" if reading.steps else "simulated steps"
    count, tokens = windows.shape
    return (
        f"{title(model)}, {model.dtype}: {count} window(s) of {tokens:,} tokens, prompt {reading.prompt:,}, "
        f"1 position in {reading.stride}, {way}".replace("torch.", "")
    )


class _Run:
    """Measures windows one by one and keeps what was found."""

    def __init__(
        self, model: Any, reading: Reading, results: Results, positions: Tensor, skip_invalid: bool = False
    ) -> None:
        self.model, self.reading, self.results, self.positions = model, reading, results, positions
        self.skip_invalid = skip_invalid
        self.refused: dict[str, str] = {}
        self.model_key = fingerprint(model)
        self.is_checked = False

    def window(self, ids: Tensor, settings: list[Setting], bar: Any) -> Iterable[tuple[str, Record]]:
        """(setting's name, record) for each setting; the model runs only where a record is missing."""
        prefilled, full = None, None
        for setting in settings:
            key = self._key(ids, setting)
            bar.set_postfix_str(setting.name)
            if key not in self.results.records and setting.name not in self.refused:
                if prefilled is None or full is None:
                    prefilled, full = self._full_precision(ids)
                self._add(key, prefilled, full, setting)
            bar.update()
            if key in self.results.records:
                yield setting.name, dataclasses.replace(self.results.records[key], name=setting.name)

    def _add(self, key: str, prefilled: Prefilled, full: Tensor, setting: Setting) -> None:
        """Measure and keep, or note why the model cannot be run so."""
        try:
            self.results.add(key, self._measure(prefilled, full, setting))
        except ConfigError as error:
            if not self.skip_invalid:
                raise
            self.refused[setting.name] = str(error)

    def _full_precision(self, ids: Tensor) -> tuple[Prefilled, Tensor]:
        """(the window, its logits [positions, V] in full precision).

        A simulation is compared with the same arithmetic, so that it differs by quantization alone; steps with the
        model's own attention.
        """
        prefilled = Prefilled.of(self.model, ids, self.reading.prompt)
        if self.reading.steps:
            return prefilled, prefilled.rest(self.positions)[0]
        full = reference_logits(prefilled, self.positions)
        if not self.is_checked:
            check_attention(prefilled, self.positions[:CHECKED], full[:, :CHECKED])
            self.is_checked = True
        return prefilled, full[0]

    def _measure(self, window: Prefilled, full: Tensor, setting: Setting) -> Record:
        setting.check_model(self.model)
        logits, cache = self._logits(window, setting)
        targets = window.ids[0, self.positions + 1]
        return Record(setting.name, measure(full, logits[0], targets, self.positions), size_of(cache))

    def _logits(self, window: Prefilled, setting: Setting) -> tuple[Tensor, XQuantCache]:
        if not self.reading.steps:
            return simulated_logits(window, self.positions, setting.config)
        compiled = self.reading.compiled
        return step_logits(self.model, window.ids, window.prompt, self.positions, setting.config, compiled)

    def _key(self, ids: Tensor, setting: Setting) -> str:
        tokens = hashlib.sha256(str(ids.tolist()).encode()).hexdigest()
        reading = dataclasses.asdict(self.reading)
        return key_of(model=self.model_key, tokens=tokens, setting=setting.config.to_json(), reading=reading)
