"""Ways to decode that ``peers.py`` compares: ours, ``StaticCache`` under Inductor, OpenVINO."""

from __future__ import annotations

import importlib
import time
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from filled import fill
from peer_models import loaded
from transformers import StaticCache

from xquant_fx import XQuantCache, XQuantConfig

WARM_UP = 3


class Time(NamedTuple):
    """Milliseconds of one decode step: by the clock, and of all threads together on processors."""

    wall: float
    processor: float


class MissingError(Exception):
    """This way cannot be measured here, and why."""


def now() -> Time:
    """The clocks."""
    return Time(1e3 * time.perf_counter(), 1e3 * time.process_time())


def tokens(count: int) -> list[int]:
    """A prompt: timings depend on its length alone."""
    return [1000 + i * 7919 % 20000 for i in range(count)]


def need(module: str) -> Any:
    """A module, or why it is missing."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingError(f"not installed: {error} (pip install -e '.[bench-peers]')") from error


class Way(ABC):
    """One way; made once, measured in turn with the others."""

    @abstractmethod
    def steps(self, context: int, count: int) -> list[Time]:
        """Times of about ``count`` decode steps after ``context`` tokens."""


class Compiled(Way):
    """The model under torch.compile: an ``XQuantCache`` of a preset, or a ``StaticCache`` under plain Inductor.

    The former has ``room`` tokens; the latter, which reads all of its room, ``margin`` more than the context.
    """

    def __init__(self, model: Path, preset: str | None, room: int, margin: int, threads: int) -> None:
        torch.set_num_threads(threads)
        self.model, self.preset, self.room, self.margin = loaded(model), preset, room, margin
        self.caches: dict[int, Any] = {}
        self.compiled: dict[int, Any] = {}

    def _filled(self, context: int) -> Any:
        """A cache that holds random keys and values of ``context`` tokens."""
        if context not in self.caches:
            config = self.model.config
            made: Any = StaticCache(config, context + self.margin)
            if self.preset:
                made = XQuantCache(config, max_cache_len=self.room, config=XQuantConfig.preset(self.preset))
            self.caches[context] = fill(made, self.model, context)
        return self.caches[context]

    def _step(self, room: int) -> Any:
        """Compiled for caches of ``room`` tokens."""
        if room not in self.compiled:

            def step(ids: Any, cache: Any) -> Any:
                return self.model(ids, past_key_values=cache)

            # Dynamo keeps graphs by code object, and looks through all of one: each has one of its own.
            step.__code__ = step.__code__.replace(co_name=f"step_{id(self)}_{room}")
            self.compiled[room] = torch.compile(step, backend="xquant" if self.preset else "inductor", dynamic=False)
        return self.compiled[room]

    @torch.no_grad()
    def steps(self, context: int, count: int) -> list[Time]:
        """By the clocks, around each step."""
        cache, ids, times = self._filled(context), torch.zeros(1, 1, dtype=torch.long), []
        step = self._step(self.room if self.preset else context)
        for _ in range(WARM_UP + count):
            begin = now()
            step(ids, cache)
            times.append(Time(*(b - a for a, b in zip(begin, now(), strict=True))))
        return times[WARM_UP:]


class OpenVino(Way):
    """OpenVINO GenAI, which reads a GGUF file of float16 weights and computes in bfloat16 where the processor can."""

    def __init__(self, gguf: Path, kind: str, threads: int) -> None:
        self.openvino, genai = need("openvino"), need("openvino_genai")
        settings = {"KV_CACHE_PRECISION": kind, "INFERENCE_NUM_THREADS": threads}
        scheduler = genai.SchedulerConfig()  # a prompt that the cache holds is not evaluated again
        scheduler.enable_prefix_caching, scheduler.cache_size = True, 2  # GB
        self.pipeline = genai.LLMPipeline(str(gguf), "CPU", scheduler_config=scheduler, **settings)
        self.config = genai.GenerationConfig(ignore_eos=True)

        class Stamps(genai.StreamerBase):  # type: ignore[misc]
            def __init__(self) -> None:
                super().__init__()
                self.at: list[Time] = []

            def write(self, token: Any) -> Any:
                self.at.append(now())
                return genai.StreamingStatus.RUNNING

            def end(self) -> None:
                pass

        self.stamps = Stamps

    def steps(self, context: int, count: int) -> list[Time]:
        """One mean, from token to token: the next one is on its way when a token is told."""
        stamps = self.stamps()
        self.config.max_new_tokens = WARM_UP + count
        ids = torch.tensor([tokens(context)]).numpy()
        self.pipeline.generate(self.openvino.Tensor(ids), self.config, stamps)
        first, last = stamps.at[WARM_UP - 1], stamps.at[-1]
        return [Time(*((b - a) / (len(stamps.at) - WARM_UP) for a, b in zip(first, last, strict=True)))]
