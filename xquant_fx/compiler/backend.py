"""The backend: what happens to one Dynamo graph.

Everything is decided by one detection, on a clone of the graph. Then

1. no KV cache in it: Inductor compiles the graph as it is, as if we were not there;
2. ordinary KV buffers that can be quantized: the step runs uncompiled and takes them over
   (``takeover.py``). Likewise a cold prefill that allocates an XQuantCache (``cache/allocate.py``);
3. quantized buffers: the passes rewrite the clone and Inductor compiles that.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from xquant_fx.cache.allocate import quantized_empty
from xquant_fx.cache.growing import STORED_KV, GrowingKV
from xquant_fx.cache.kv_tensor import QuantizedKV
from xquant_fx.cache.storage import is_view, share_storage
from xquant_fx.compiler.cache_key import cache_key_patch
from xquant_fx.compiler.compiled_step import CompiledStep
from xquant_fx.compiler.growing_step import GrowingStep, has_room
from xquant_fx.compiler.growing_takeover import GrowingTakeover
from xquant_fx.compiler.options import Request, parse
from xquant_fx.compiler.planning import plan_graph, why_not_gradients, why_not_layers
from xquant_fx.compiler.prompt_queries import PromptRun
from xquant_fx.compiler.takeover import Takeover
from xquant_fx.errors import CacheStateError, ConfigError, NotRewrittenError
from xquant_fx.passes.context import Context
from xquant_fx.passes.detect import detect
from xquant_fx.passes.graph import clone
from xquant_fx.passes.pipeline import run_passes
from xquant_fx.passes.records import Detection, Site
from xquant_fx.plan.plan import make_plan
from xquant_fx.warn_once import warn_once

log = logging.getLogger(__name__)

Compiler = Callable[..., Callable[..., Any]]


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
            before and after each pass; ``disable=[NAME, ...]`` to leave passes out.

    Raises:
        ConfigError: an unknown or contradictory option, or one that differs from the config of the
            XQuantCache in use.
        NotRewrittenError: under ``strict``, a KV cache was left in full precision.
        UnsupportedWriteError: the graph writes to a quantized buffer in a way that is no append.
    """
    return compile_graph(gm, example_inputs, parse(mode, options), _inductor)


def compile_graph(gm: GraphModule, inputs: list[Any], request: Request, compiler: Compiler) -> Callable[..., Any]:
    """Decide what becomes of a graph; ``compiler`` gets what is to be compiled."""
    found = detect_graph(gm, inputs, request)
    report_left(found.sites, request)
    _check_gradients(gm, inputs)
    if _allocates(gm):
        log.info("the graph allocates a quantized cache: this first step runs uncompiled")
        return PromptRun(found)
    if found.ordinary:
        log.info("ordinary KV buffers: the next step runs uncompiled and quantizes what they hold")
        grows = [buffer.write.past is not None for buffer in found.ordinary]
        return GrowingTakeover(found) if all(grows) else Takeover(found)
    quantized = [i for i, t in enumerate(inputs) if isinstance(t, STORED_KV)]
    if not quantized:
        return compiler(gm, inputs, request, None)
    _check_config([inputs[i] for i in quantized], request)
    return _compile_quantized(gm, found, inputs, quantized, request, compiler)


def detect_graph(gm: GraphModule, inputs: list[Any], request: Request) -> Detection:
    """All that is decided about ``gm``, on a clone of it."""
    copy = clone(gm)
    given = dict(zip((n for n in copy.graph.nodes if n.op == "placeholder"), inputs, strict=True))
    surroundings = why_not_gradients() or why_not_layers(gm, request)
    unfused = "the pass fuse_decode is switched off" if "fuse_decode" in request.disable else ""
    return detect(
        copy,
        refusal=lambda node, what: surroundings or _why_not_storage(given, node, what),
        planner=lambda graph, sites: plan_graph(graph, sites, request),
        unfused=unfused,
    )


def _why_not_storage(given: dict[Node, Any], node: Node, what: str) -> str:
    """A buffer that another tensor shares memory with: that one would never see what is appended."""
    buffer = given.get(node)
    if not isinstance(buffer, Tensor):
        return ""
    if is_view(buffer):
        return f"{what}: the buffer is a view of another tensor, which would not see what is appended"
    others = [t for t in given.values() if type(t) is Tensor and t is not buffer]
    if any(share_storage(t, buffer) for t in others):
        return f"{what}: another input shares the buffer's memory and would not see what is appended"
    return ""


def report_left(sites: tuple[Site, ...], request: Request) -> None:
    """Log every site; warn once per reason, or raise under strict, where a KV cache is left alone."""
    for number, site in enumerate(sites):
        kind, name = site.attention.kind, site.buffer_name
        log.info("attention %d (%s, %s): %s", number, kind, name, site.reason or "quantized")
        if site.rewritable and site.dequantized:
            log.info("attention %d (%s) reads dequantized keys and values: %s", number, name, site.dequantized)
    left = [site for site in sites if site.stays_ordinary]
    if left and request.strict:
        lines = "\n".join(f"  {s.buffer_name}: {s.reason}" for s in left)
        raise NotRewrittenError(f"strict=True: {len(left)} KV cache(s) are not quantized:\n{lines}")
    for site in left:
        warn_once(f"KV cache {site.buffer_name} stays in full precision: {site.reason}", key=site.reason)


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
    for plan in {id(b.live.group): b.live.group.plan for b in buffers}.values():
        meant = make_plan(request.config, len(plan.layers))
        if meant != plan:
            raise ConfigError(
                "the backend's options differ from the config of the XQuantCache in use, which decides; leave the "
                f"options out. The options mean\n{meant}\nthe cache has\n{plan}"
            )


def _inductor(gm: GraphModule, inputs: list[Any], request: Request, settings: str | None) -> Callable[..., Any]:
    from torch._inductor import list_mode_options
    from torch._inductor.compile_fx import compile_fx

    import xquant_fx.kernels.lowerings  # noqa: F401  (registers them)

    patches = dict(list_mode_options(request.mode)) if request.mode not in (None, "default") else {}
    if settings is not None:
        patches.update(cache_key_patch(settings))
    compiled: Any = compile_fx(gm, inputs, config_patches=patches or None)
    return compiled


def _compile_quantized(
    gm: GraphModule, found: Detection, inputs: list[Any], quantized: list[int], request: Request, compiler: Compiler
) -> Callable[..., Any]:
    settings = repr([[inputs[i].spec for i in quantized], sorted(request.disable)])
    uncompiled = clone(gm)
    if not has_room(found, inputs):
        log.info("a cache that grows has no room for this step, which runs uncompiled")
        return uncompiled
    context = Context(found, inputs)
    run_passes(found.gm, context, request.disable, request.dump)
    keep = [i for i in range(len(inputs)) if i not in set(quantized)]
    compiled = compiler(found.gm, [*(inputs[i] for i in keep), *context.state.example_inputs], request, settings)
    step = CompiledStep(compiled, keep, quantized, context.state)
    return GrowingStep(step, uncompiled, context.grown) if context.grown else step
