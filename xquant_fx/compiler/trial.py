"""Caches that are quantized before Dynamo traces their first step, on trial: so one trace serves it and all others.

A takeover (``takeover.py``) is a trace of its own: Dynamo has seen ordinary buffers then, and traces the next step for
quantized ones. What it would find is foreseen of a ``StaticCache`` or a ``DynamicCache`` (``cache/early.py``). The
graph that Dynamo makes for quantized buffers is judged as it would be for what they were: if detection takes all of
them over, by the same plan, behind the same tokens, the cache stays quantized. If not, it becomes what it was, the step
runs uncompiled, and the next one is traced for ordinary buffers.

Nobody judges a call of which no graph with these buffers is made. Where there may be one already that serves it, a
function that took such caches before, it is quantized whatever comes. Else uncompiled code that gets to any of its
buffers finds all of them as they were (``end_trials`` in ``cache/reads.py``); so what got tokens got them from a graph.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import GraphModule

from xquant_fx.cache.early import Early, StaticBefore, grows, held_by, those_quantized
from xquant_fx.cache.growing import STORED_KV
from xquant_fx.cache.left import why_kept, why_left
from xquant_fx.cache.storage import why_not_alone
from xquant_fx.compiler.any_room import NEEDED, may_take_any_room
from xquant_fx.compiler.detection import detect_in
from xquant_fx.compiler.dynamo_frames import forget_compiled_frame
from xquant_fx.compiler.left_alone import report_left
from xquant_fx.compiler.options import Request
from xquant_fx.compiler.proof import Call, why_not_held
from xquant_fx.compiler.takeover import warn_of_more
from xquant_fx.errors import ConfigError
from xquant_fx.kernels.cpu.at_hand import as_wanted, wanted
from xquant_fx.passes.graph import clone, without_guards
from xquant_fx.passes.records import Detection
from xquant_fx.plan.plan import make_plan
from xquant_fx.plan.spec import KVSpec

log = logging.getLogger(__name__)


class Asked(NamedTuple):
    """What a backend is asked for, and whether it has Inductor compile that."""

    request: Request
    by_inductor: bool = True


class Trial:
    """One cache from before its step is traced until that has ended; ``is_known``: there may be a graph for it."""

    def __init__(self, early: Early, is_known: bool) -> None:
        self.early, self.is_known = early, is_known
        self.accepted: bool | None = None
        """What was decided of its graph; None: no graph was made."""
        early.group.on_trial = self

    @property
    def ends_at_once(self) -> bool:
        """Whether uncompiled code ends it."""
        return self.accepted is None and not self.is_known

    def why_not(self, found: Detection, given: Sequence[Any]) -> str:
        """Why ``found``, of the graph as it would be if these were its inputs, is no takeover as was foreseen."""
        early, states = self.early, {id(part.original): part.state for part in self.early.parts}
        if len(found.ordinary) != len(states):
            return f"{len(found.ordinary)} buffers would be taken over, of {len(states)}"
        if found.plans != (early.group.plan,):
            return "the plan is another"
        inputs = dict(zip(found.gm.graph.find_nodes(op="placeholder"), given, strict=True))
        call = Call(found.gm, inputs, {each.write.node: each.foresight for each in found.ordinary})
        for each in found.ordinary:
            held = inputs.get(each.write.past or each.node)
            state = states.pop(id(held), None)
            if state is None or not _is_for(found.specs[each.node], state.spec, early.grows):
                return f"{each.node.name} is stored otherwise"
            if not early.grows and (first := call.first_position(each.write)) != early.tokens:
                return f"{each.node.name} is appended to at position {first}, not {early.tokens}"
        return ""

    def originals(self, inputs: Sequence[Any]) -> list[Any]:
        """``inputs``, with what the quantized ones were in their place."""
        originals = {id(part.quantized): part.original for part in self.early.parts}
        return [originals.get(id(each), each) for each in inputs]

    def accept(self) -> None:
        """The graph is one for quantized buffers."""
        self.accepted = True
        if not self.early.grows:
            warn_of_more([part.state.spec for part in self.early.parts], self.early.name)

    def take_back(self) -> None:
        """Make the buffers what they were."""
        self._over(self.early.take_back)

    def end(self, failed: bool) -> bool:
        """Behind the call, which may have ``failed``: whether the cache is quantized now."""
        group, early = self.early.group, self.early
        if group.on_trial is None:  # it was taken back
            return False
        if failed and group.interrupted:
            self._over(lambda: early.take_back(forget_step=True))
            return False
        if early.has_more or (self.accepted and not failed):
            self._over(early.keep)
            return True
        self.take_back()
        return False

    def _over(self, last: Callable[[], None]) -> None:
        self.early.group.on_trial = None
        with torch.inference_mode(False), torch.no_grad():
            last()


class TakenBack:
    """Stands in for a graph of a cache whose trial is lost."""

    def __init__(self, trial: Trial, graph: Callable[..., Any]) -> None:
        self.trial, self.graph = weakref.ref(trial), as_wanted(graph)

    def __call__(self, *args: Any) -> Any:
        """Run the step on what the buffers were, as the same objects; Dynamo traces the next one anew."""
        if (trial := self.trial()) is not None:
            trial.take_back()
        forget_compiled_frame()
        return self.graph(*args)


def begin_trial(cache: Any, new: tuple[int, int], asked: Asked, is_known: bool) -> Trial | None:
    """Quantize ``cache``, given to a step of so many ``new`` rows and tokens; None: what it holds must be judged as it
    is."""
    (request, by_inductor), (rows, more) = asked, new
    held = None if request.self_check else held_by(cache)
    if held is None or held[0][0].keys.shape[0] != rows:
        return None
    tokens = held[1]
    layers = those_quantized(held[0], request.effective, tokens + more)
    buffers = [buffer for layer in layers for buffer in (layer.keys, layer.values)]
    with torch.no_grad(), wanted():
        if not buffers or any(why_left(x) or why_kept(x) for x in buffers):
            return None
        if not grows(layers) and any(why_not_alone(x) or why_not_held(x, tokens) for x in buffers):
            return None
        try:
            any_room = by_inductor and buffers[0].device.type == "cpu" and not request.disable & NEEDED
            before = [] if grows(layers) else [StaticBefore(layer, more) for layer in held[0]]
            plan = make_plan(request.effective, len(layers))
            return Trial(Early(plan, layers, tokens, any_room, before), is_known)
        except ConfigError:  # of which one is told by the step
            return None


def judged(gm: GraphModule, inputs: list[Any], asked: Asked) -> Callable[..., Any] | None:
    """If ``inputs`` hold a cache on trial: what is to be called for ``gm``, or None where it passes.

    Raises:
        NotRewrittenError: under ``strict``, if a KV cache was left in full precision.
    """
    trial = _trial_of(inputs)
    if trial is None:
        return None
    request, given = asked.request, trial.originals(inputs)
    with without_guards(gm.graph):  # of the graph that there would be: sizes are looked at which this one leaves open
        found = detect_in(_as_for(gm), given, request)
        reason = trial.why_not(found, given)
    if trial.early.grows and trial.early.any_room != (asked.by_inductor and may_take_any_room(found, request)):
        reason = reason or "its steps are made for the room that there is"
    if not reason:
        trial.accept()
        return None
    report_left(found.sites, request)
    return lost(gm, inputs, reason)


def lost(gm: GraphModule, inputs: Sequence[Any], reason: str) -> Callable[..., Any] | None:
    """If ``inputs`` hold a cache on trial: what is to be called for ``gm``, which is no graph for quantized ones."""
    trial = _trial_of(inputs)
    if trial is None:
        return None
    log.info("a cache that was quantized before its step was traced becomes what it was: %s", reason)
    trial.accepted = False
    return TakenBack(trial, gm.forward)


def _is_for(spec: KVSpec, early: KVSpec, grows: bool) -> bool:
    """Whether a buffer that a takeover would store as ``spec`` was stored so; of such as grow, whatever the room."""
    return (spec.with_room(early.shape[2]) if grows else spec) == early


def _trial_of(inputs: Sequence[Any]) -> Trial | None:
    """That of a cache among ``inputs`` of which nothing is decided yet."""
    groups = (each.live.group for each in inputs if isinstance(each, STORED_KV) and each.state is not None)
    trials = (group.on_trial for group in groups)
    return next((each for each in trials if isinstance(each, Trial) and each.accepted is None), None)


def _as_for(gm: GraphModule) -> GraphModule:
    """``gm`` as Dynamo makes it for ordinary buffers."""
    copy = clone(gm)
    for node in copy.graph.nodes:
        value = node.meta.get("example_value")
        if isinstance(value, STORED_KV):
            node.meta = {**node.meta, "example_value": _ordinary(value)}
    return copy


def _ordinary(value: Any) -> Tensor:
    """A fake tensor of the shape of the fake ``value``."""
    with value.anchor.fake_mode:
        return torch.empty(value.shape, dtype=value.dtype, device=value.device)
