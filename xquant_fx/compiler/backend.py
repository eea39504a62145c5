"""The backend: what happens to one Dynamo graph.

Everything is decided by one detection, on a clone of the graph. Then

1. no KV cache in it: Inductor compiles the graph as it is, as if we were not there;
2. ordinary KV buffers that can be quantized: the step runs uncompiled and takes them over
   (``takeover.py``). Likewise a cold prefill that allocates an XQuantCache (``cache/allocate.py``);
3. quantized buffers: the passes rewrite the clone and Inductor compiles that.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.fx import GraphModule

from xquant_fx.cache.allocate import quantized_empty
from xquant_fx.cache.growing import STORED_KV, GrowingKV
from xquant_fx.cache.kv_tensor import QuantizedKV
from xquant_fx.cache.left import leave
from xquant_fx.cache.prompt_attention import by_kernel
from xquant_fx.cache.prompt_keys import PromptKeys, PromptScores
from xquant_fx.cache.stacked import StackedKV
from xquant_fx.compiler.any_length import of_length
from xquant_fx.compiler.any_room import may_take_any_room
from xquant_fx.compiler.compiled_prompts import Stretches
from xquant_fx.compiler.detection import detect_graph
from xquant_fx.compiler.emptied_inputs import emptied_inputs
from xquant_fx.compiler.frozen import check_frozen
from xquant_fx.compiler.give_back_rows import rows_given_back
from xquant_fx.compiler.growing_takeover import GrowingTakeover
from xquant_fx.compiler.inductor import begin, compile_by_inductor, no_collection
from xquant_fx.compiler.inference_graph import inference_graph
from xquant_fx.compiler.known_steps import known_step
from xquant_fx.compiler.laid_out_graph import laid_out_graph
from xquant_fx.compiler.laid_out_growth import laid_out_growth
from xquant_fx.compiler.left_alone import report_buffers, report_left, report_uncompiled
from xquant_fx.compiler.options import Request, parse
from xquant_fx.compiler.planning import without_sharing
from xquant_fx.compiler.prompt_queries import PromptRun
from xquant_fx.compiler.quantized_graph import QuantizedGraph
from xquant_fx.compiler.returned_inputs import returned_inputs
from xquant_fx.compiler.row_slices import row_graph
from xquant_fx.compiler.self_check import self_check
from xquant_fx.compiler.stacked_graph import NOT_APART, Judge, LeftWholeError, no_judge, stacked_graph
from xquant_fx.compiler.takeover import Takeover
from xquant_fx.compiler.tracing_time import watch_tracing
from xquant_fx.compiler.trial import Asked, judged, lost
from xquant_fx.compiler.untraced import leave_prompts_untraced, was_called
from xquant_fx.compiler.watch import Watch, WatchStacks, WatchWrites, only_read
from xquant_fx.errors import CacheStateError, ConfigError, UnsupportedWriteError
from xquant_fx.kernels.cpu.at_hand import as_wanted
from xquant_fx.passes.any_length import FixedLengthError
from xquant_fx.passes.find_sites import buffer_name
from xquant_fx.passes.growth_copies import without_growth_copies
from xquant_fx.passes.records import Detection
from xquant_fx.plan.plan import make_plan

log = logging.getLogger(__name__)

#: Gives a function, or for a graph with a quantized cache None: it is to run as the program has it.
Compiler = Callable[..., Any]


def xquant_backend(
    gm: GraphModule, example_inputs: list[Any], *, mode: str | None = None, options: Mapping[str, Any] | None = None
) -> Callable[..., Any]:
    """A ``torch.compile`` backend that quantizes KV caches; registered as ``"xquant"``.

    Args:
        gm: Dynamo's graph. It is not changed.
        example_inputs: the graph's inputs.
        mode: one of Inductor's modes (``torch.compile(mode=...)``).
        options: any field of :class:`XQuantConfig`, or ``preset=NAME``, or ``config=XQuantConfig`` or a ``Plan``;
            ``strict=True`` to raise where a KV cache is found and not quantized; ``dump=FOLDER`` for the graph
            before and after each pass; ``disable=[NAME, ...]`` to leave passes out; ``self_check=True`` to compare
            each rewritten graph at 16 bits with the program's before it is used, and to refuse what differs;
            ``compile_prompts=True`` to trace prompts and chunks of more than 8 tokens, too, and compile what lies
            between their attentions, once for all lengths. Beside these ``mode=`` and what
            ``torch._inductor.list_options()`` names: ``torch.compile`` takes no mode then.

    Raises:
        ConfigError: an unknown or contradictory option, or one that differs from the config of the
            XQuantCache in use.
        NotRewrittenError: under ``strict``, a KV cache was left in full precision.
        UnsupportedWriteError: the graph writes to a quantized buffer in a way that is no append.
    """
    was_called.set()
    watch_tracing(xquant_backend)  # torch._dynamo.reset() forgets it
    with no_collection():
        begin(example_inputs)
        return compile_graph(gm, example_inputs, parse(mode, options), compile_by_inductor)


watch_tracing(xquant_backend)
leave_prompts_untraced(xquant_backend, lambda mode, options: Asked(parse(mode, options)))


def compile_graph(gm: GraphModule, inputs: list[Any], request: Request, compiler: Compiler) -> Callable[..., Any]:
    """Decide what becomes of a graph; ``compiler`` gets what is to be compiled."""
    check_frozen(gm, request)
    if (inside := inference_graph(gm)) is not None:
        with torch.no_grad():  # in inference mode no view of what Dynamo has made outside of it could be
            return inside.calling(compile_graph(inside.gm, inputs, request, compiler))
    if (own := returned_inputs(gm)) is not None:
        return own.calling(compile_graph(own.gm, inputs, request, compiler))
    if (empty := emptied_inputs(gm, inputs)) is not None:
        if (taken_back := lost(gm, inputs, "the graph empties it first")) is not None:
            return taken_back
        with empty.emptied(inputs):
            return empty.calling(compile_graph(empty.gm, inputs, request, compiler))
    gm = without_growth_copies(gm)
    if (stacks := stacked_graph(gm, inputs)) is None:
        if given := rows_given_back(gm, inputs, request):
            return given
        if whole := [each.origin for each in inputs if isinstance(each, StackedKV)]:
            report_uncompiled(whole, NOT_APART, request)
            return gm.forward
        return _compile(gm, inputs, request, compiler)

    def take(args: Sequence[Any]) -> Callable[..., Any]:
        return stacks.calling(_compile(stacks.gm, stacks.given(args), request, compiler, stacks.judge(args)))

    try:
        return take(inputs)
    except LeftWholeError as left:
        compiled = _compile(stacks.left_whole(gm, str(left)), inputs, request, compiler)
        return WatchStacks(compiled, take, tuple(stacks.stacks), request)


def _compile(
    gm: GraphModule, inputs: list[Any], request: Request, compiler: Compiler, judge: Judge = no_judge
) -> Callable[..., Any]:
    """As ``compile_graph``, of a graph without stacks; ``judge`` is told what is decided, and may raise."""
    if (usual := laid_out_graph(gm, inputs) or laid_out_growth(gm, inputs)) is not None:
        compiler = usual.or_program(compiler, gm, inputs)
        return usual.calling(_compile(usual.gm, usual.given(inputs), request, compiler, judge))
    if (one := row_graph(gm, inputs)) is not None:
        with contextlib.suppress(UnsupportedWriteError):  # else as any graph that does this to a batch
            return one.calling(_compile(one.gm, one.given(inputs, one.row), request, compiler))
    if (taken_back := judged(gm, inputs, Asked(request, compiler is compile_by_inductor))) is not None:
        return taken_back
    found = detect_graph(gm, inputs, request)
    judge(found, "")
    report_left(found.sites, request)
    _check_gradients(gm, inputs)
    by_inductor = compiler is compile_by_inductor
    stretches = Stretches(request, compiler, inputs) if request.compile_prompts else None
    if _allocates(gm):
        log.info("the graph allocates a quantized cache: this first step runs uncompiled")
        by_kernel(found.gm)
        return PromptRun(found, stretches)
    if found.ordinary:
        log.info("ordinary KV buffers: the next step runs uncompiled and quantizes what they hold")
        grows = [buffer.write.past is not None for buffer in found.ordinary]
        if all(grows):
            by_kernel(found.gm)
            return GrowingTakeover(found, by_inductor and may_take_any_room(found, request), stretches)
        refused = request.self_check and self_check(gm, found, inputs, request).refused
        judge(found, refused or "")
        if refused:
            return _refused(gm, found, inputs, refused, request, compiler)
        by_kernel(found.gm)
        return Takeover(found, request)
    if any(isinstance(t, PromptKeys | PromptScores) for t in inputs):
        log.info("a graph break lies between a cold prompt's keys and their attention, which runs uncompiled")
        return as_wanted(gm.forward)
    if not any(isinstance(t, STORED_KV) for t in inputs):
        compiled: Callable[..., Any] = compiler(gm, inputs, request, None)
        if only_read(found):
            compiled = WatchWrites(compiled, found, request)
        return Watch(compiled, gm, found, request) if found.left_for_now else compiled
    _check_config([t for t in inputs if isinstance(t, STORED_KV)], request)
    if (known := known_step(gm, found, inputs)) is not None:
        return known.calling(_compile(known.gm, known.given(inputs), request, compiler))
    try:
        return QuantizedGraph(gm, found, inputs, request, compiler, stretches, by_inductor).step()
    except FixedLengthError as error:
        log.info("this graph is compiled for the length of its caches: %s", error)
        fixed = of_length(gm)
        return fixed.calling(_compile(fixed.gm, fixed.given(inputs), request, compiler))


def _refused(
    gm: GraphModule, found: Detection, inputs: list[Any], reason: str, request: Request, compiler: Compiler
) -> Callable[..., Any]:
    """The graph as it is: its buffers are not taken over, since what would become of it is wrong."""
    buffers = [buffer for buffer in found.ordinary if buffer.index is not None]
    report_buffers([(buffer_name(buffer.node), reason) for buffer in buffers], request)
    for buffer in buffers:
        leave(inputs[buffer.index], reason)  # type: ignore[index]
    compiled: Callable[..., Any] = compiler(gm, inputs, request, None)
    return compiled


def _allocates(gm: GraphModule) -> bool:
    return any(node.target is quantized_empty for node in gm.graph.nodes)


def _check_gradients(gm: GraphModule, inputs: list[Any]) -> None:
    if torch.is_grad_enabled() and (_allocates(gm) or any(isinstance(t, STORED_KV) for t in inputs)):
        raise CacheStateError(
            "a quantized KV cache has no gradient; run the model under torch.no_grad() or torch.inference_mode()"
        )


def _check_config(buffers: list[QuantizedKV | GrowingKV], request: Request) -> None:
    if request.config is None:
        return
    for buffer in {id(b.live.group): b for b in buffers}.values():
        plan = buffer.live.group.plan
        meant = make_plan(request.config, len(plan.layers))
        was_ours = isinstance(buffer, GrowingKV) or buffer.live.group.taken_over
        alone = make_plan(without_sharing(request.config), len(plan.layers)) if was_ours else meant
        if plan not in (meant, alone):
            raise ConfigError(
                "the backend's options differ from the config of the XQuantCache in use, which decides; leave the "
                f"options out. The options mean\n{meant}\nthe cache has\n{plan}"
            )
