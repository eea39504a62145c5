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
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.utils import dynamo_timed
from torch.fx import GraphModule, Node

from xquant_fx.cache.allocate import quantized_empty
from xquant_fx.cache.growing import STORED_KV, GrowingKV
from xquant_fx.cache.kv_tensor import QuantizedKV
from xquant_fx.cache.left import leave
from xquant_fx.cache.prompt_attention import by_kernel
from xquant_fx.cache.prompt_keys import PromptKeys, PromptScores
from xquant_fx.cache.stacked import StackedKV
from xquant_fx.compiler.any_length import AnyLengthStep, Padded, any_length, check_any_length, of_length, padded
from xquant_fx.compiler.any_room import ExactRooms, is_any_room, may_take_any_room, why_fixed
from xquant_fx.compiler.chunks import UncompiledChunk
from xquant_fx.compiler.compiled_step import CompiledStep
from xquant_fx.compiler.emptied_inputs import emptied_inputs
from xquant_fx.compiler.frozen import check_frozen
from xquant_fx.compiler.give_back import GiveBack, groups_of
from xquant_fx.compiler.give_back_rows import rows_given_back
from xquant_fx.compiler.growing_step import GrowingStep, has_room
from xquant_fx.compiler.growing_takeover import GrowingTakeover
from xquant_fx.compiler.inductor import begin, compile_by_inductor, no_collection
from xquant_fx.compiler.inference_graph import inference_graph
from xquant_fx.compiler.known_steps import known_step
from xquant_fx.compiler.laid_out_graph import laid_out_graph
from xquant_fx.compiler.laid_out_growth import laid_out_growth
from xquant_fx.compiler.left_alone import report_buffers, report_left, report_uncompiled, report_unfused
from xquant_fx.compiler.options import Request, parse
from xquant_fx.compiler.planning import plan_graph, warn_of_lengths, why_not_gradients, why_not_layers, without_sharing
from xquant_fx.compiler.prompt_queries import PromptRun
from xquant_fx.compiler.proof import Call
from xquant_fx.compiler.restarts import Restarts
from xquant_fx.compiler.returned_inputs import returned_inputs
from xquant_fx.compiler.row_slices import row_graph
from xquant_fx.compiler.self_check import self_check
from xquant_fx.compiler.short_windows import note_short_windows, why_not_sliding_window
from xquant_fx.compiler.sliding_step import SlidingStep, begin_to_slide, moved_windows
from xquant_fx.compiler.stacked_graph import NOT_APART, Judge, LeftWholeError, no_judge, stacked_graph
from xquant_fx.compiler.takeover import Takeover
from xquant_fx.compiler.tracing_time import watch_tracing
from xquant_fx.compiler.watch import Watch, WatchStacks, WatchWrites, only_read
from xquant_fx.errors import CacheStateError, ConfigError, UnsupportedWriteError
from xquant_fx.passes.any_length import FixedLengthError
from xquant_fx.passes.context import Context
from xquant_fx.passes.detect import detect
from xquant_fx.passes.facts import Facts
from xquant_fx.passes.find_sites import buffer_name
from xquant_fx.passes.graph import clone
from xquant_fx.passes.growth_copies import without_growth_copies
from xquant_fx.passes.pipeline import run_passes
from xquant_fx.passes.records import Detection, Refused
from xquant_fx.passes.trace import fake
from xquant_fx.plan.plan import make_plan

log = logging.getLogger(__name__)

#: Set once torch has come with a graph (``entry.py``).
graph_came = threading.Event()

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
            each rewritten graph at 16 bits with the program's before it is used, and to refuse what differs.

    Raises:
        ConfigError: an unknown or contradictory option, or one that differs from the config of the
            XQuantCache in use.
        NotRewrittenError: under ``strict``, a KV cache was left in full precision.
        UnsupportedWriteError: the graph writes to a quantized buffer in a way that is no append.
    """
    graph_came.set()
    watch_tracing(xquant_backend)  # torch._dynamo.reset() forgets it
    with no_collection():
        begin(example_inputs)
        return compile_graph(gm, example_inputs, parse(mode, options), compile_by_inductor)


watch_tracing(xquant_backend)


def compile_graph(gm: GraphModule, inputs: list[Any], request: Request, compiler: Compiler) -> Callable[..., Any]:
    """Decide what becomes of a graph; ``compiler`` gets what is to be compiled."""
    check_frozen(gm, request)
    if (inside := inference_graph(gm)) is not None:
        with torch.no_grad():  # in inference mode no view of what Dynamo has made outside of it could be
            return inside.calling(compile_graph(inside.gm, inputs, request, compiler))
    if (own := returned_inputs(gm)) is not None:
        return own.calling(compile_graph(own.gm, inputs, request, compiler))
    if (empty := emptied_inputs(gm, inputs)) is not None:
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
    found = detect_graph(gm, inputs, request)
    judge(found, "")
    report_left(found.sites, request)
    _check_gradients(gm, inputs)
    if _allocates(gm):
        log.info("the graph allocates a quantized cache: this first step runs uncompiled")
        by_kernel(found.gm)
        return PromptRun(found)
    if found.ordinary:
        log.info("ordinary KV buffers: the next step runs uncompiled and quantizes what they hold")
        grows = [buffer.write.past is not None for buffer in found.ordinary]
        if all(grows):
            by_kernel(found.gm)
            return GrowingTakeover(found, compiler is compile_by_inductor and may_take_any_room(found, request))
        refused = request.self_check and self_check(gm, found, inputs, request, detect_graph).refused
        judge(found, refused or "")
        if refused:
            return _refused(gm, found, inputs, refused, request, compiler)
        by_kernel(found.gm)
        return Takeover(found, request)
    if any(isinstance(t, PromptKeys | PromptScores) for t in inputs):
        log.info("a graph break lies between a cold prompt's keys and their attention, which runs uncompiled")
        return gm.forward
    quantized = [i for i, t in enumerate(inputs) if isinstance(t, STORED_KV)]
    if not quantized:
        compiled: Callable[..., Any] = compiler(gm, inputs, request, None)
        if only_read(found):
            compiled = WatchWrites(compiled, found, request)
        return Watch(compiled, gm, found, request, detect_graph) if found.left_for_now else compiled
    _check_config([inputs[i] for i in quantized], request)
    if (known := known_step(gm, found, inputs)) is not None:
        return known.calling(_compile(known.gm, known.given(inputs), request, compiler))
    try:
        return _compile_quantized(gm, found, inputs, quantized, request, compiler)
    except FixedLengthError as error:
        log.info("this graph is compiled for the length of its caches: %s", error)
        fixed = of_length(gm)
        return fixed.calling(_compile(fixed.gm, fixed.given(inputs), request, compiler))
    except UnsupportedWriteError as error:
        if not _were_ordinary(inputs):
            raise
        return GiveBack(gm.forward, quantized, str(error), request)


def detect_graph(
    gm: GraphModule, inputs: list[Any], request: Request, originals: Mapping[int, Tensor] | None = None
) -> Detection:
    """All that is decided about ``gm``, on a clone of it.

    ``originals`` are tensors whose copies are among the inputs, by the ids of the copies: who sees a buffer is asked
    of the original.
    """
    copy = clone(gm)
    given = dict(zip(copy.graph.find_nodes(op="placeholder"), inputs, strict=True))
    surroundings = why_not_gradients() or why_not_layers(gm, request)
    unfused = "the pass fuse_decode is switched off" if "fuse_decode" in request.disable else ""
    call = Call(copy, given, originals=originals)

    def refusal(node: Node, what: str, facts: Facts) -> Refused:
        lasting = surroundings or call.why_kept(node) or why_not_sliding_window(node, facts, request)
        return Refused(lasting) if lasting else Refused(call.refuse(node, what, facts), of_call=True)

    with dynamo_timed("xquant_detect"):  # for torch._dynamo.utils.compile_times()
        found = detect(copy, refusal, lambda graph, sites: plan_graph(graph, sites, request, call), unfused)
    return note_short_windows(found, request)


def _were_ordinary(inputs: list[Any]) -> bool:
    groups = groups_of(inputs)
    return bool(groups) and all(group.taken_over for group in groups)


def _given_up(
    gm: GraphModule, inputs: list[Any], quantized: list[int], reason: str, request: Request
) -> Callable[..., Any]:
    """What runs in the place of a rewritten graph that is wrong: the program's, op by op."""
    if _were_ordinary(inputs):
        return GiveBack(gm.forward, quantized, reason, request)
    report_uncompiled([inputs[i].origin for i in quantized], reason, request)
    forward: Callable[..., Any] = gm.forward
    return forward


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


def _may_be_whole(value: Tensor | None, shapes: Sequence[tuple[int, ...]]) -> bool:
    """Whether a result has the sizes of one of the ``shapes`` (H, N, D) of buffers, in any order, and maybe a batch."""
    if value is None or not all(isinstance(size, int) for size in value.shape):
        return False
    return any(not Counter(shape) - Counter(value.shape) for shape in shapes)


def _compile_quantized(
    gm: GraphModule, found: Detection, inputs: list[Any], quantized: list[int], request: Request, compiler: Compiler
) -> Callable[..., Any]:
    if beginning := begin_to_slide(gm, found, inputs, request):
        log.info("sliding windows are full: the next step runs uncompiled, and they are stored as such from then on")
        return beginning
    settings = repr([list(found.specs.values()), sorted(request.disable)])
    longer = any_length(gm, inputs, request, settings, compiler is compile_by_inductor)
    if longer is None:
        warn_of_lengths([inputs[i].spec for i in quantized if type(inputs[i]) is QuantizedKV])
    else:
        found = detect_graph(longer.gm, inputs, request)
    context, any_room = Context(found, inputs), is_any_room(inputs)
    if any_room and (request.self_check or compiler is not compile_by_inductor):
        return ExactRooms(gm.forward, "it is compared with the program, or another compiler is used")
    if not has_room(context):
        log.info("a cache that grows has no room for this step, which runs uncompiled")
        return gm.forward
    written = frozenset(context.placeholders.get(write.buffer, -1) for write in found.writes) & set(quantized)
    if request.self_check:
        found, refused = self_check(gm, found, inputs, request, detect_graph)
        if refused:
            return _given_up(gm, inputs, quantized, refused, request)
        report_unfused(found.sites, request)
        context = Context(found, inputs)
    moved = moved_windows(context)
    restarts = Restarts(gm, found, request, detect_graph)  # which reads the graph as it is before the passes
    with dynamo_timed("xquant_passes"):
        run_passes(found.gm, context, request.disable, request.dump)
    fixed = why_fixed(found.gm.graph, context) if any_room or longer else ""
    if any_room and fixed:
        return ExactRooms(gm.forward, fixed)
    if longer:
        check_any_length(found.gm.graph, fixed)
    shapes = [tuple(inputs[i].shape[1:]) for i in quantized if isinstance(inputs[i], QuantizedKV)]
    results: Any = found.gm.graph.output_node().args[0]
    whole = [i for i, node in enumerate(results) if _may_be_whole(fake(node), shapes)]
    keep = [i for i in range(len(inputs)) if i not in set(quantized)]
    masks = {place: longer.masks[i] for place, i in enumerate(keep) if i in longer.masks} if longer else {}
    examples = [*padded([inputs[i] for i in keep], masks), *context.state.example_inputs]
    compiled = compiler(found.gm, examples, request, settings)
    context.state.tensors.clear()  # or the graph would keep the cache that it was compiled with
    if compiled is None:
        log.info("a chunk of a number of tokens that varies: such steps run uncompiled")
        return UncompiledChunk(restarts, by_kernel(clone(gm)).forward)
    of_masks = Padded(compiled, masks) if masks else compiled
    step: Any = CompiledStep(of_masks, keep, written, context.state, restarts, whole)
    if moved:
        step = SlidingStep(step, gm.forward, moved)
    elif context.grown:
        step = GrowingStep(step, gm.forward, context.grown)
    return AnyLengthStep(step, compiled, gm.forward, settings) if longer else step
