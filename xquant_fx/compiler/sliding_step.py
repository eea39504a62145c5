"""Steps of sliding windows that are full: the one in which they begin to slide, and compiled ones after it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from torch.fx import GraphModule

from xquant_fx.cache.kv_tensor import QuantizedKV
from xquant_fx.compiler.give_back import GiveBack
from xquant_fx.compiler.options import Request
from xquant_fx.compiler.proof import Call
from xquant_fx.errors import UnsupportedWriteError
from xquant_fx.kernels.cpu.at_hand import as_wanted
from xquant_fx.passes.context import Context
from xquant_fx.passes.facts import is_sliding
from xquant_fx.passes.graph import size_among_inputs
from xquant_fx.passes.records import Detection, Write
from xquant_fx.plan.windows import full_precision_tokens, why_not_window, why_short

NOT_HELD = "a window is moved that holds fewer tokens than it has room for"
#: Arguments, and how many tokens they get: a number, or the argument and its dimension that say so.
Moved = list[tuple[int, int | tuple[int, int]]]


def begin_to_slide(gm: GraphModule, found: Detection, inputs: list[Any], request: Request) -> Callable[..., Any] | None:
    """The step in which windows begin to slide that were written like any cache until now; None if none does.

    While they filled it could not be told that they are windows. Those that are not worth it are given back now.
    """
    places = {node: i for i, node in enumerate(found.gm.graph.find_nodes(op="placeholder"))}
    moved = [(places.get(write.buffer, -1), write) for write in found.writes if write.moves]
    windows = {i: write for i, write in moved if i >= 0 and type(inputs[i]) is QuantizedKV}
    quantized = [i for i, value in enumerate(inputs) if isinstance(value, QuantizedKV)]
    for i in windows:
        tokens, others = inputs[i].shape[2], (len(quantized) - len(windows)) // 2
        if reason := why_not_window(tokens, others, request.effective):
            is_short = bool(why_short(tokens, full_precision_tokens(request.effective)))
            told = dataclasses.replace(request, strict=False) if is_short else request
            return GiveBack(as_wanted(gm.forward), quantized, reason, told)
    return BeginToSlide(as_wanted(gm.forward), found, windows, quantized, request) if windows else None


class BeginToSlide:
    """Runs a graph that moves quantized windows, op by op: ``cache/sliding.py`` makes of them what can be moved."""

    def __init__(
        self,
        graph: Callable[..., Any],
        found: Detection,
        windows: Mapping[int, Write],
        quantized: list[int],
        request: Request,
    ) -> None:
        self.found, self.windows, self.graph = found, windows, graph
        self.foresights = {write.node: found.foresights[write.node] for write in windows.values()}
        self.give_back = GiveBack(graph, quantized, NOT_HELD, request)

    def __call__(self, *args: Any) -> Any:
        """One step; buffers that hold another number of tokens than the graph takes for granted are given back."""
        placeholders = self.found.gm.graph.find_nodes(op="placeholder")
        call = Call(self.found.gm, dict(zip(placeholders, args, strict=True)), self.foresights)
        known = all(not foresight.reason for foresight in self.foresights.values())
        windows = [(args[i].live, write) for i, write in self.windows.items()]
        if known and all(w.length == call.tokens_before(write) and not w.spec.ragged for w, write in windows):
            return self.graph(*args)
        return self.give_back(*args)


def moved_windows(context: Context) -> Moved:
    """The windows that a graph moves, before the passes change it.

    Raises:
        UnsupportedWriteError: no input tells how many tokens one of them gets.
    """
    moved: Moved = []
    for write in context.detection.writes:
        if write.moves and is_sliding(write.buffer):
            tokens = write.tokens
            where = tokens if isinstance(tokens, int) else size_among_inputs(context.placeholders, tokens)
            if where is None:
                raise UnsupportedWriteError("no input tells how many tokens are new in a sliding window")
            moved.append((context.placeholders[write.buffer], where))
    return moved


class SlidingStep:
    """Calls a compiled step and counts what windows got; one that there is no room for runs uncompiled."""

    def __init__(self, step: Callable[..., Any], uncompiled: Callable[..., Any], moved: Moved) -> None:
        self.step, self.uncompiled, self.moved = step, uncompiled, moved

    def __call__(self, *args: Any) -> Any:
        """One step."""
        new = [(args[i], n if isinstance(n, int) else args[n[0]].shape[n[1]]) for i, n in self.moved]
        if not all(window.has_room(n) for window, n in new):
            return self.uncompiled(*args)
        results = self.step(*args)
        for window, n in new:
            window.slid(n)
        return results
