"""``options={"self_check": True}``: a rewritten graph must compute what the program's graph computes.

Before a rewritten graph is used the first time, the same records rewrite a second clone, whose caches store 16 bits.
Both graphs run op by op on the inputs of the call at hand, on copies: nothing of the user's is changed. Each attention
is compared on its own (the rewritten run goes on with the program's result), then the results, the caches and whatever
else was written to. A difference beyond rounding is a fault of the rewrite, never of quantization. First the fused op
of the attentions that differ is given up, then the graph.

Kernels are not part of this (both runs are plain torch), nor are rotations folded into weights. Nor is the first step
of a cache that grows, which runs as it stands.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch.fx import GraphModule, Interpreter, Node
from torch.utils._pytree import tree_leaves

from xquant_fx.cache.kv_tensor import QuantizedKV
from xquant_fx.cache.ragged import Row
from xquant_fx.cache.sliding import SlidingKV, with_room_to_slide
from xquant_fx.compiler.detection import detect_graph
from xquant_fx.compiler.differences import Difference, beyond_rounding
from xquant_fx.compiler.full_precision import Rebuilt, contents_of, full, held_of
from xquant_fx.compiler.left_alone import CHECKED
from xquant_fx.compiler.options import Request
from xquant_fx.errors import UnsupportedWriteError
from xquant_fx.passes import pipeline
from xquant_fx.passes.context import Context
from xquant_fx.passes.find_writes import is_opaque
from xquant_fx.passes.records import Detection, Site
from xquant_fx.passes.trace import value_of
from xquant_fx.passes.vocabulary import op_name
from xquant_fx.warn_once import warn_once

log = logging.getLogger(__name__)


class Verdict(NamedTuple):
    """What a self-check found."""

    detection: Detection
    """As it was given, but that attentions whose fused op differs read dequantized values, with the reason."""
    refused: str = ""
    """Why the whole rewrite must not be used; "" if it may."""

    @property
    def explained(self) -> Detection:
        """What is done, for ``explain``: where the rewrite is refused, all sites stay as the program has them."""
        sites = self.detection.sites
        if self.refused:
            sites = tuple(dataclasses.replace(s, reason=self.refused) if s.rewritable else s for s in sites)
        return dataclasses.replace(self.detection, sites=sites)


def self_check(
    gm: GraphModule,
    found: Detection,
    inputs: list[Any],
    request: Request,
    originals: Mapping[int, Tensor] | None = None,
) -> Verdict:
    """Compare what ``found`` makes of ``gm`` with ``gm`` on ``inputs``, quantized buffers or ordinary ones.

    ``originals`` are those of copies among the inputs, as ``detect_graph`` takes them.

    What cannot be compared is said once, as a warning, and used.
    """
    counted = dict(counters["xquant"])  # the graph is not looked at once more for the user
    try:
        verdict = _checked(found, _Check(gm, inputs, request, originals))
    except _CannotCheckError as error:
        warn_once(f"self_check: a graph could not be checked: {error}")
        verdict = Verdict(found)
    counters["xquant"].clear()
    counters["xquant"].update(counted)
    counters["xquant"]["self_check"] += 1
    counters["xquant"]["self_check refused"] += bool(verdict.refused) or verdict.detection is not found
    return verdict


class _CannotCheckError(Exception):
    pass


def _checked(found: Detection, check: _Check) -> Verdict:
    wrong = check.differences(found.sites)
    unfused = [i for i in wrong if i is not None and found.sites[i].form is not None]
    if unfused:
        reasons = {i: f"{CHECKED}{wrong[i]}" for i in unfused}
        found = dataclasses.replace(found, sites=_unfused(found.sites, reasons))
        wrong = check.differences(found.sites)
    if not wrong:
        return Verdict(found)
    place, difference = next(iter(wrong.items()))
    where = "the graph's results" if place is None else f"attention {place} ({found.sites[place].buffer_name})"
    return Verdict(found, f"{CHECKED}{where}: {difference}")


def _unfused(sites: tuple[Site, ...], reasons: Mapping[int, str]) -> tuple[Site, ...]:
    changed = {i: dataclasses.replace(sites[i], form=None, dequantized=reason) for i, reason in reasons.items()}
    return tuple(changed.get(i, site) for i, site in enumerate(sites))


class _Check:
    """Comparisons of one graph on one set of inputs."""

    def __init__(
        self, gm: GraphModule, inputs: list[Any], request: Request, originals: Mapping[int, Tensor] | None
    ) -> None:
        self.gm, self.inputs, self.request, self.originals = gm, inputs, request, originals
        if any(is_opaque(node) or "c10d" in str(node.target) for node in gm.graph.nodes):
            raise _CannotCheckError("it runs graphs of its own, or communicates with other processes")
        if any("vmap" in op_name(node) for node in gm.graph.nodes):  # whose tensors nobody may keep
            raise _CannotCheckError("it runs inside torch.vmap")

    def differences(self, sites: tuple[Site, ...]) -> dict[int | None, Difference]:
        """By the numbers of ``sites``, None for all else: how the rewritten graph differs beyond rounding."""
        again = self._judged_again(sites)
        context, inputs = self._context(again)
        watched = {_output(site): i for i, site in enumerate(again.sites) if _is_rewritten(site)}
        try:
            given = inputs.plain()
            results = _run(self.gm, given)
            right = _Watched(again.gm, watched)
            _run(right, inputs.plain())
        except Exception as error:
            raise _CannotCheckError(f"it does not run op by op: {type(error).__name__}: {error}") from error
        context.inputs, self.stored = inputs.stored(), frozenset(inputs.contents)
        ours, mine = self._rewritten(again, context, watched, right.seen)
        if inputs.fault:
            raise _CannotCheckError("the positions of its first step do not follow what is stored")
        pairs = {i: (ours.seen.get(i), right.seen[i]) for i in sorted(right.seen)}
        found: dict[int | None, Difference] = {}
        for i, (mine_at, theirs) in pairs.items():
            if difference := beyond_rounding("its result", mine_at, theirs):
                found[i] = difference
        if not found and (difference := self._rest(again, context, mine, (results, given))):
            found[None] = difference
        return found

    def _judged_again(self, sites: tuple[Site, ...]) -> Detection:
        """The detection once more, on a clone of its own, with the decisions of ``sites``."""
        again = detect_graph(self.gm, self.inputs, self.request, self.originals)
        if len(again.sites) != len(sites):
            raise _CannotCheckError("it is judged in another way the second time")
        reasons = {i: site.dequantized for i, site in enumerate(sites) if site.form is None and again.sites[i].form}
        ordinary = {buffer.node for buffer in again.ordinary if buffer.index is not None}
        judged = (
            dataclasses.replace(site, is_quantized=True) if set(site.buffers) & ordinary else site
            for site in _unfused(again.sites, reasons)
        )
        specs = {node: full(spec) for node, spec in again.specs.items()}
        return dataclasses.replace(again, sites=tuple(judged), specs=specs)

    def _context(self, again: Detection) -> tuple[Context, Rebuilt]:
        """The context of the passes; the graph's fake inputs become stand-ins where they are to be stored."""
        context = Context(again, [])
        sliding = {b.index for b in again.ordinary if b.index is not None and b.write.moves}
        for buffer in again.ordinary:
            if buffer.index is not None:
                spec, anchor = again.specs[buffer.node], value_of(buffer.node)
                stand_in = QuantizedKV(spec, anchor)
                if buffer.index in sliding:
                    again.specs[buffer.node] = spec = with_room_to_slide(spec)
                    stand_in = SlidingKV(spec, anchor, width=anchor.shape[2])
                buffer.node.meta["example_value"] = stand_in
        ordinary = {b.index: (again.specs[b.node], b.group) for b in again.ordinary if b.index is not None}
        written = [context.placeholders[node] for node in again.written]
        written += [context.placeholders[w.buffer] for w in again.writes if w.buffer in context.placeholders]
        return context, Rebuilt(self.inputs, written, ordinary, sliding)

    def _rewritten(
        self, again: Detection, context: Context, watched: Mapping[Node, int], forced: Mapping[int, Tensor]
    ) -> tuple[_Watched, list[Any]]:
        """A run of the rewritten graph whose attentions give what ``forced`` says, and its results."""
        stored = context.inputs
        try:
            for each in pipeline.PASSES:
                if each.name not in self.request.disable:
                    pipeline.run_pass(each, again.gm, context)
        except UnsupportedWriteError as error:  # which the graph itself is going to meet, and is told of then
            raise _CannotCheckError(str(error)) from error
        keep = [value for i, value in enumerate(stored) if i not in self.stored]
        lengths = [stored[i].shape[2] for i, _ in context.state.lengths]  # type: ignore[attr-defined]
        run = _Watched(again.gm, {context.fused.get(node, node): i for node, i in watched.items()}, forced)
        try:
            return run, _run(run, [*keep, *context.state.tensors, *lengths])
        except Exception as error:
            raise _CannotCheckError(f"rewritten it does not run: {type(error).__name__}: {error}") from error

    def _rest(
        self, again: Detection, context: Context, mine: list[Any], theirs: tuple[list[Any], list[Any]]
    ) -> Difference | None:
        """Results, caches and other inputs that were written to, after both runs."""
        results, given = theirs
        grown = {place: each.index for each in context.grown for place in each.outputs}
        ours = list(mine)
        for place in sorted(grown):
            ours.insert(place, contents_of(context.inputs[grown[place]], results[place].shape[2]))
        pairs = [(f"result {i}", a, b) for i, (a, b) in enumerate(zip(ours, results, strict=True))]
        for i in {context.placeholders[node] for node in again.written}:
            value: Any = context.inputs[i]
            stored, wanted = value, given[i]
            if isinstance(value, QuantizedKV):
                stored = contents_of(value, wanted.shape[2])
                wanted = held_of(value, wanted) if _may_go_back(self.inputs[i], value) else wanted
            pairs.append((f"input {i}", stored, wanted))
        return next((found for pair in pairs if (found := beyond_rounding(*pair))), None)


def _may_go_back(before: Any, after: QuantizedKV) -> bool:
    """Whether tokens that a step leaves behind it are none any more: it has written before them."""
    state = getattr(before, "state", None)
    if after.spec.ragged or isinstance(state, Row):
        return True
    return state is not None and after.live.length < state.length


def _is_rewritten(site: Site) -> bool:
    return site.is_quantized and site.rewritable and site.attention.is_recognised


def _output(site: Site) -> Node:
    return site.attention.value_reader if site.form is None else site.form.output


class _Watched(Interpreter):
    """Runs a graph and keeps what ``watched`` nodes give, by number; ``forced`` takes its place in what follows."""

    def __init__(self, gm: GraphModule, watched: Mapping[Node, int], forced: Mapping[int, Tensor] | None = None):
        super().__init__(gm)
        self.watched, self.forced = watched, forced or {}
        self.seen: dict[int, Tensor] = {}

    def run_node(self, n: Node) -> Any:
        """The value of ``n``."""
        value = super().run_node(n)
        if n not in self.watched:
            return value
        place = self.watched[n]
        self.seen[place] = value.clone()
        return self.forced[place].clone() if place in self.forced else value

    def __call__(self, *args: Any) -> Any:
        """The graph's results."""
        return self.run(*args)


def _run(function: Callable[..., Any], args: list[Any]) -> list[Any]:
    """Results of one run with the same random numbers each time."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        return tree_leaves(function(*args))
