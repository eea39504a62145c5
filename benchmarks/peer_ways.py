"""The ways to decode that ``peers.py`` compares: ours, ``StaticCache`` under Inductor, llama.cpp, OpenVINO.

Each is in a process of its own, as users have it: llama.cpp and torch would share one OpenMP, which puts threads to
sleep at the end of each parallel region as soon as the teams of a process are more than its processors.
"""

from __future__ import annotations

import argparse
import importlib
import multiprocessing
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM, StaticCache

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
        self.model: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).eval()
        self.preset, self.room, self.margin = preset, room, margin
        self.caches: dict[int, Any] = {}
        self.compiled: dict[int, Any] = {}

    @torch.no_grad()
    def _filled(self, context: int) -> Any:
        if context not in self.caches:
            config = self.model.config
            made: Any = StaticCache(config, context + self.margin)
            if self.preset:
                made = XQuantCache(config, max_cache_len=self.room, config=XQuantConfig.preset(self.preset))
            self.model(torch.tensor([tokens(context)]), past_key_values=made, logits_to_keep=1)
            self.caches[context] = made
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


class LlamaCpp(Way):
    """llama.cpp, by xllamacpp; a prompt that the cache holds is not evaluated again."""

    def __init__(self, gguf: Path, kind: str, room: int, threads: int) -> None:
        library = need("xllamacpp")
        given = library.CommonParams()
        given.model.path, given.n_ctx, given.n_parallel = str(gguf), room, 1
        given.cpuparams.n_threads = given.cpuparams_batch.n_threads = threads
        given.cache_type_k = given.cache_type_v = getattr(library.ggml_type, f"GGML_TYPE_{kind.upper()}")
        given.verbosity = -1
        given.flash_attn_type = library.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_ENABLED
        self.server, self.instructions = library.Server(given), library.get_system_info().strip()

    def _run(self, context: int, count: int) -> Time:
        begin = now()
        request = {"prompt": tokens(context), "n_predict": count, "ignore_eos": True, "temperature": 0}
        self.server.handle_completions({**request, "cache_prompt": True})
        return Time(*(b - a for a, b in zip(begin, now(), strict=True)))

    def steps(self, context: int, count: int) -> list[Time]:
        """One mean of ``count`` steps: what more tokens take longer than few."""
        self._run(context, 2)
        few, many = self._run(context, 4), self._run(context, 4 + count)
        return [Time(*((b - a) / count for a, b in zip(few, many, strict=True)))]


class OpenVino(Way):
    """OpenVINO GenAI, which reads a GGUF file of float16 weights and computes in bfloat16 where the processor can."""

    def __init__(self, gguf: Path, kind: str, threads: int) -> None:
        self.openvino, genai = need("openvino"), need("openvino_genai")
        settings = {"KV_CACHE_PRECISION": kind, "INFERENCE_NUM_THREADS": threads}
        self.pipeline = genai.LLMPipeline(str(gguf), "CPU", **settings)
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


class Apart(Way):
    """A way in a process of its own, which waits while others are measured.

    Raises:
        MissingError: it cannot be made there, and why.
    """

    def __init__(self, make: Callable[..., Way], *args: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        context.Process(target=_serve, args=(theirs, make, args), daemon=True).start()
        theirs.close()
        self.instructions: str = self._answer()

    def _answer(self) -> Any:
        try:
            found = self.pipe.recv()
        except EOFError:
            found = MissingError("its process died")
        if isinstance(found, Exception):
            raise found
        return found

    def steps(self, context: int, count: int) -> list[Time]:
        """As the way measures them."""
        self.pipe.send((context, count))
        made: list[Time] = self._answer()
        return made


def _serve(pipe: Any, make: Callable[..., Way], args: tuple[Any, ...]) -> None:
    """Make a way, tell for which instructions it is built ("" if it does not say so), then measure when asked."""
    try:
        way = make(*args)
        pipe.send(getattr(way, "instructions", ""))
        while True:
            pipe.send(way.steps(*pipe.recv()))
    except EOFError:
        return
    except Exception as error:  # a library's exceptions may not travel
        pipe.send(MissingError(f"{type(error).__name__}: {error}"))


def ways(args: argparse.Namespace, ggufs: dict[str, Path]) -> tuple[dict[str, Way], dict[str, str]]:
    """All ways by name, and why some are missing."""
    made, missing, margin = dict[str, Way](), dict[str, str](), args.rounds * (WARM_UP + args.steps) + 8
    room = max(args.contexts) + margin
    compiled = (Compiled, args.model)
    makers: dict[str, Any] = {f"ours, {p}": (*compiled, p, room, margin, args.threads) for p in args.presets}
    makers["StaticCache, Inductor"] = (*compiled, None, room, margin, args.threads)
    for kind in ("f16", "q4_0"):
        makers[f"llama.cpp, {kind} cache"] = (LlamaCpp, ggufs["BF16"], kind, room, args.threads)
    makers["OpenVINO, u8 cache"] = (OpenVino, ggufs["F16"], "u8", args.threads)
    for name, maker in makers.items():
        if args.only and not any(word in name for word in args.only):
            missing[name] = "left out (--only)"
            continue
        try:
            made[name] = Apart(*maker)
        except MissingError as error:
            missing[name] = str(error)
    return made, missing
