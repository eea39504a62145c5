"""Run a case: the program compiled by the backend beside the same program in eager code.

Two rules, at every step:

1. The step is what eager code computes from the same contents: the compiled program's caches are read (dequantized)
   just before the step, an eager copy of the program runs on ordinary tensors of them, and both results agree. So
   quantized steps are judged exactly, whatever the scheme.
2. The whole is what eager code computes from the beginning: exactly at 16 bits, within a bound at 8 and 4.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import linecache
import logging
import sys
import types
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.utils import counters

from fuzz.appends import LAYOUTS
from fuzz.case import FORK, Case
from fuzz.contents import clear_behind, relative_error, seen_by_step
from fuzz.pieces import by_pieces
from fuzz.program import source
from xquant_fx import XQuantConfig
from xquant_fx.cache.fork import forked
from xquant_fx.cache.growing import GrowingKV
from xquant_fx.cache.kv_tensor import QuantizedKV
from xquant_fx.compiler.backend import compile_graph, xquant_backend
from xquant_fx.compiler.options import parse
from xquant_fx.errors import XQuantError
from xquant_fx.kernels.layout import STEP_TOKENS
from xquant_fx.warn_once import forget

#: dtype to what rounding explains, relative.
ROUNDING = {"float32": 1e-4, "float64": 1e-8, "float16": 2e-2, "bfloat16": 0.1}
#: Bits to how far the results may be from those in full precision.
BOUND = {8: 0.15, 4: 0.9}


@dataclasses.dataclass
class Outcome:
    """What became of a case."""

    kind: str
    """``right``, ``wrong``, ``crashed``, ``refused`` (by an error of ours), or ``invalid`` (eager code fails)."""
    detail: str = ""
    quantized: int = 0
    """Of the cache's tensors."""
    tensors: int = 0
    fused: int = 0
    reasons: tuple[str, ...] = ()
    """What was said of tensors that are left alone."""
    graphs: int = 0

    @property
    def is_silent(self) -> bool:
        """Whether tensors were left alone and nothing was said."""
        return self.kind == "right" and bool(self.graphs) and self.quantized < self.tensors and not self.reasons


def settings_of(case: Case) -> XQuantConfig:
    """What is stored: windows and groups so small that short sequences fill them."""
    if case.bits == 16:
        return XQuantConfig.preset("full")
    small = dict(residual_length=8, k_group_size=4, sink_tokens=0)
    if case.scheme == "ranked" and case.bits <= 4:
        return XQuantConfig(k_bits=case.bits, v_bits=case.bits, **{**small, "sink_tokens": 2})
    name, sharing = ("xquant", dict(share_values_from=0)) if case.scheme == "shared" else ("kivi-2", {})
    return XQuantConfig.preset(name).replace(k_bits=case.bits, v_bits=case.bits, **small, **sharing)


def program_of(case: Case) -> dict[str, Any]:
    """The names that the case's program defines."""
    name = "fuzz_program"
    text = source(case)
    linecache.cache[name] = len(text), None, text.splitlines(keepends=True), name
    module = sys.modules[name] = types.ModuleType(name)
    exec(compile(text, name, "exec"), module.__dict__)
    return module.__dict__


def dynamic_of(case: Case) -> bool | None:
    """What ``torch.compile`` is given of the name."""
    return True if case.all_dynamic else None if case.dynamic else False


def backend_of(case: Case, by_inductor: bool) -> Any:
    """The backend; without Inductor rewritten graphs run op by op."""
    request = parse(None, {"config": settings_of(case)})

    def backend(gm: Any, inputs: Any) -> Any:
        if by_inductor:
            return xquant_backend(gm, inputs, options={"config": settings_of(case)})
        return compile_graph(gm, inputs, request, lambda graph, *_: by_pieces(graph))

    return backend


def run(case: Case, by_inductor: bool = False) -> Outcome:
    """Compare ``case`` with eager code, step by step."""
    torch._dynamo.reset()
    forget()
    counters.clear()
    with _warnings() as said, torch.no_grad(), torch._dynamo.config.patch(recompile_limit=64):
        comparison = Comparison(case, backend_of(case, by_inductor))
        outcome = comparison.run()
    held = [b for b in comparison.parts() if isinstance(b, QuantizedKV | GrowingKV)]
    return dataclasses.replace(
        outcome, quantized=len(held), tensors=len(comparison.parts()), fused=counters["xquant"]["fuse_decode"],
        graphs=counters["xquant"]["detect"],
        reasons=tuple(dict.fromkeys(text.split(": ", 1)[-1] for text in said if "stays in full precision" in text)),
    )  # fmt: skip


class Comparison:
    """The compiled program with its cache, and the eager ones with theirs."""

    def __init__(self, case: Case, backend: Any) -> None:
        self.case, self.names = case, program_of(case)
        self.model = self.names["Decoder"]().eval()
        self.step = torch.compile(self.model, backend=backend, dynamic=dynamic_of(case))
        self.cache, self.twin = self.names["empty"](), self.names["empty"]()
        self.at, self.pad = 0, torch.arange(case.batch) * 2
        self.rows = torch.zeros(case.batch, dtype=torch.int64)
        self.kept: tuple[Any, Any, int, Tensor] | None = None
        self.random = torch.Generator().manual_seed(0)

    def parts(self, cache: Any = None) -> list[Tensor]:
        """Keys and values of each layer, of the compiled program's cache if of no other: what ``make`` was given."""
        found: list[Tensor] = self.names["parts"](self.cache if cache is None else cache)
        return found

    def run(self) -> Outcome:
        """All events, up to the first that goes wrong."""
        for number, event in enumerate(self.case.events):
            where = f"event {number} ({event}) at position {self.rows.tolist() if self.case.ragged else self.at}: "
            if event == FORK:
                self._fork()
                continue
            if event <= 0:
                self._take_back(-event, number)
                continue
            if number == 0 and self.case.ragged:
                self._fill(event)
                continue
            outcome = self._advance(event, number)
            if outcome.kind != "right":
                return dataclasses.replace(outcome, detail=where + outcome.detail)
        return Outcome("right")

    def _fork(self) -> None:
        """Go on with a copy that shares memory, or, the next time, with what was copied."""
        if self.kept is not None:
            (self.cache, self.twin, self.at, self.rows), self.kept = self.kept, None
            return
        self.kept = self.cache, self.twin, self.at, self.rows
        held = self.parts()
        groups = {id(b.state.group) for b in held if type(b) is QuantizedKV}
        if len(groups) == 1 and all(type(b) is QuantizedKV for b in held):
            self.cache = forked(self.cache, [b.live for b in held], held[0].state.group)
        else:
            self.cache = copy.deepcopy(self.cache)
        self.twin = copy.deepcopy(self.twin)

    def _fill(self, tokens: int) -> None:
        """Give each row of a ragged batch a prompt, each of another length."""
        self.rows = (tokens - 3 * torch.arange(self.case.batch)).clamp_min(1)
        dim = LAYOUTS[self.case.layout][3]
        for mine, theirs in zip(self.parts(), self.parts(self.twin), strict=True):
            for row, length in enumerate(self.rows.tolist()):
                part = mine[row].narrow(dim - 1, 0, length)
                part.copy_(torch.randn(part.shape, generator=self.random))
            theirs.copy_(mine)

    def _take_back(self, tokens: int, number: int) -> None:
        if self.case.ragged:
            row = number % self.case.batch
            self.rows = self.rows.clone()
            self.rows[row] = (self.rows[row] - tokens).clamp_min(1) if tokens else 0
            return
        self.at -= tokens or self.at
        if not tokens:
            for cache in (self.cache, self.twin):
                for buffer in self.names["leaves"](cache):
                    buffer.zero_()

    def _advance(self, tokens: int, number: int) -> Outcome:
        first: Any = self.rows if self.case.ragged else self.at
        if self.case.rotating:
            first = self.at % self.case.rotating
            tokens = min(tokens, self.case.rotating - first)
        ids = torch.randint(48, (self.case.batch, tokens), generator=self.random)
        pos = torch.arange(tokens) + (first[:, None] if self.case.ragged else first)
        args = ids, pos, 0 if self.case.ragged else first, self.pad
        whole = [b.dequantize() if isinstance(b, QuantizedKV) else b.clone() for b in self.parts()]
        copies = self.names["make"]([seen_by_step(buffer, first, 0) for buffer in self.parts()])
        try:
            right, self.twin = self.model(*self._fresh(args), self.twin)
            here, after = self.model(*self._fresh(args), copies)
        except Exception as error:
            return Outcome("invalid", f"{type(error).__name__}: {error}")
        ordinary = [type(buffer) is Tensor for buffer in self.parts()]
        step = self.model if number == 0 and self.case.eager_prompt else self.step
        try:
            out, self.cache = step(*self._fresh(args), self.cache)
        except Exception as error:
            return _failure(error)
        self.at, self.rows = self.at + tokens, self.rows + tokens
        if ordinary < [type(buffer) is Tensor for buffer in self.parts()]:  # they were given back
            here, after = self.model(*self._fresh(args), self.names["make"](whole))
        elif ordinary != [type(buffer) is Tensor for buffer in self.parts()]:  # they were taken over
            if self.case.append == "cat":
                after = self.names["make"](self.parts())  # it saw full precision, and returned codes
            elif tokens > STEP_TOKENS:
                here, after = out, self.names["make"](self.parts())  # what it saw cannot be had any more
            else:
                here, after = self._taken_over(args, first, tokens)
        elif self.case.append == "one by one" and tokens > 1 and self.case.bits < 16:
            # Each token is an append of its own: what leaves the window meanwhile is read as codes.
            here, after = out, self.names["make"](self.parts())
        return self._judge(out, here, right, self.parts(after), first, tokens)

    def _taken_over(self, args: tuple[Any, ...], first: Any, tokens: int) -> tuple[Tensor, Any]:
        """The step once more in eager code, on what it saw: tokens before it as they were quantized by it."""
        seen = [seen_by_step(buffer, first, tokens) for buffer in self.parts()]
        for tensor, buffer in zip(seen, self.parts(), strict=True):
            clear_behind(tensor, first, buffer)
        out: tuple[Tensor, Any] = self.model(*self._fresh(args), self.names["make"](seen))
        return out

    @staticmethod
    def _fresh(args: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(a.clone() if isinstance(a, Tensor) else a for a in args)

    def _judge(self, out: Tensor, here: Tensor, right: Tensor, after: list[Tensor], first: Any, tokens: int) -> Outcome:
        rounding = ROUNDING[self.case.dtype]
        if (error := relative_error(out, here)) > rounding:
            return Outcome("wrong", f"differs from eager code on the same contents by {error:.2g}")
        bound = rounding if self.case.bits == 16 else BOUND.get(self.case.bits)
        if self.case.scheme == "shared" and self.case.bits < 16:
            bound = None  # how far another layer's codes fit depends on both layers
        if bound is not None and (error := relative_error(out, right)) > bound:
            return Outcome("wrong", f"differs from eager code from the beginning by {error:.2g}")
        if self.case.bits == 16 or tokens <= STEP_TOKENS:
            for i, (mine, theirs) in enumerate(zip(self.parts(), after, strict=True)):
                pair = [seen_by_step(buffer, first, tokens) for buffer in (mine, theirs)]
                if isinstance(mine, QuantizedKV):  # what lies behind is forgotten
                    for dense in pair:
                        clear_behind(dense, first + tokens, mine)
                if (error := relative_error(*pair)) > rounding:
                    return Outcome("wrong", f"tensor {i} of the cache differs from eager code's by {error:.2g}")
        return Outcome("right")


def _failure(error: BaseException) -> Outcome:
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, XQuantError):
        cause = getattr(cause, "inner_exception", None) or cause.__cause__
    kind = "crashed" if cause is None else "refused"
    return Outcome(kind, " ".join(f"{type(cause or error).__name__}: {cause or error}".split())[:600])


@contextlib.contextmanager
def _warnings() -> Iterator[list[str]]:
    said: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    handler, log = Keep(logging.WARNING), logging.getLogger("xquant_fx")
    log.addHandler(handler)
    try:
        yield said
    finally:
        log.removeHandler(handler)
