"""The backend: what happens to one Dynamo graph.

1. No KV cache in it: Inductor compiles it, as if we were not there.
2. Ordinary KV buffers that can be quantized: the step runs uncompiled and takes them over
   (``takeover.py``). Likewise a cold prefill that allocates an XQuantCache (``first_step.py``).
3. Quantized buffers: the passes rewrite a clone of the graph and Inductor compiles that.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.fx import GraphModule, Node

from xquant_fx.cache.allocate import quantized_empty
from xquant_fx.cache.kv_tensor import QuantizedKV
from xquant_fx.compiler.cache_key import cache_key_patch
from xquant_fx.compiler.dynamo_frames import is_partial
from xquant_fx.compiler.options import Request, parse
from xquant_fx.compiler.takeover import FirstStep
from xquant_fx.errors import CacheStateError, ConfigError, NotRewrittenError
from xquant_fx.passes.find_sites import find_sites
from xquant_fx.passes.graph import clone
from xquant_fx.passes.pipeline import run_passes
from xquant_fx.passes.records import SiteRecord
from xquant_fx.passes.state_inputs import StateInputs

log = logging.getLogger(__name__)
_warned: set[str] = set()

Compiler = Callable[..., Callable[..., Any]]


def xquant_backend(
    gm: GraphModule, example_inputs: list[Any], *, mode: str | None = None, options: Mapping[str, Any] | None = None
) -> Callable[..., Any]:
    """A ``torch.compile`` backend that quantizes KV caches; registered as ``"xquant"``.

    Args:
        gm: Dynamo's graph. It is not changed.
        example_inputs: the graph's inputs.
        mode: one of Inductor's modes (``torch.compile(mode=...)``).
        options: any field of :class:`XQuantConfig`, or ``preset=NAME``, or ``config=XQuantConfig``,
            and ``strict=True`` to raise where a KV cache is found and not quantized.

    Raises:
        ConfigError: an unknown or contradictory option, or one that differs from the config of the
            XQuantCache in use.
        NotRewrittenError: under ``strict``, a KV cache was left in full precision.
        UnsupportedWriteError: the graph writes to a quantized buffer in a way that is no append.
    """
    return compile_graph(gm, example_inputs, parse(mode, options), _inductor)


def compile_graph(gm: GraphModule, inputs: list[Any], request: Request, compiler: Compiler) -> Callable[..., Any]:
    """Decide what becomes of a graph; ``compiler`` gets what is to be compiled."""
    sites = judge(gm, inputs, request)
    report_left(sites, request)
    _check_gradients(gm, inputs)
    if _allocates(gm):
        log.info("the graph allocates a quantized cache: this first step runs uncompiled")
        return gm.forward
    ordinary = [s for s in sites if s.rewritable and not is_quantized(s)]
    if ordinary:
        log.info("ordinary KV buffers: the next step runs uncompiled and quantizes what they hold")
        return FirstStep(gm, ordinary, takeover_config(gm, request))
    quantized = [i for i, t in enumerate(inputs) if isinstance(t, QuantizedKV)]
    if not quantized:
        return compiler(gm, inputs, request, None)
    _check_config([inputs[i] for i in quantized], request)
    return _compile_quantized(gm, inputs, quantized, request, compiler)


def judge(gm: GraphModule, inputs: list[Any], request: Request) -> list[SiteRecord]:
    """Attention sites of ``gm``, with the reasons that come from the whole graph and its inputs added."""
    sites = find_sites(gm.graph)
    given = dict(zip((n for n in gm.graph.nodes if n.op == "placeholder"), inputs, strict=True))
    for site in sites:
        if site.rewritable and not is_quantized(site):
            site.reason = _why_not_graph(gm, request) or _why_not_storage(given, site)
    return sites


def _why_not_storage(given: dict[Node, Any], site: SiteRecord) -> str:
    """A buffer that another tensor shares memory with: that one would never see what is appended."""
    for what, source in (("keys", site.key), ("values", site.value)):
        buffer = given.get(source.root)
        if not isinstance(buffer, torch.Tensor):
            continue
        if buffer._is_view():
            return f"{what}: the buffer is a view of another tensor, which would not see what is appended"
        others = [t for t in given.values() if type(t) is torch.Tensor and t is not buffer]
        if any(t.untyped_storage()._cdata == buffer.untyped_storage()._cdata for t in others):
            return f"{what}: another input shares the buffer's memory and would not see what is appended"
    return ""


def takeover_config(gm: GraphModule, request: Request) -> Any:
    """The config for ordinary buffers: no sharing where only some layers can be seen."""
    config = request.effective
    if not is_partial(gm):
        return config
    alone = config.replace(share_keys_from=None, share_values_from=None)
    if alone != config and "graph break" not in _warned:
        _warned.add("graph break")
        log.warning("a graph break hides the other layers: no layer reads another's codes; an XQuantCache pairs them")
    return alone


def _why_not_graph(gm: GraphModule, request: Request) -> str:
    if torch.is_grad_enabled():
        return "gradients are enabled; run under torch.no_grad() or torch.inference_mode()"
    config = request.effective
    if is_partial(gm) and not (isinstance(config.k_bits, int) and isinstance(config.v_bits, int)):
        return "bits are given per layer and a graph break hides the number of layers; use an XQuantCache"
    return ""


def is_quantized(site: SiteRecord) -> bool:
    """Whether the site reads quantized buffers already (as against ordinary ones)."""
    roots = (site.key.root, site.value.root)
    return any(r.target is quantized_empty or isinstance(r.meta.get("example_value"), QuantizedKV) for r in roots)


def report_left(sites: list[SiteRecord], request: Request) -> None:
    """Log every site; warn once a reason, or raise under strict, where a KV cache is left alone."""
    for number, site in enumerate(sites):
        log.info("attention %d (%s, %s): %s", number, site.attention.how, site.label, site.reason or "quantized")
    left = [s for s in sites if s.has_cache and not s.rewritable and not s.deferred]
    if left and request.strict:
        lines = "\n".join(f"  {s.label}: {s.reason}" for s in left)
        raise NotRewrittenError(f"strict=True: {len(left)} KV cache(s) are not quantized:\n{lines}")
    for site in left:
        if site.reason not in _warned:
            _warned.add(site.reason)
            log.warning("KV cache %s stays in full precision: %s", site.label, site.reason)


def _allocates(gm: GraphModule) -> bool:
    return any(node.target is quantized_empty for node in gm.graph.nodes)


def _check_gradients(gm: GraphModule, inputs: list[Any]) -> None:
    if torch.is_grad_enabled() and (_allocates(gm) or any(isinstance(t, QuantizedKV) for t in inputs)):
        raise CacheStateError(
            "a quantized KV cache has no gradient; run the model under torch.no_grad() or torch.inference_mode()"
        )


def _check_config(buffers: list[QuantizedKV], request: Request) -> None:
    for buffer in buffers:
        config = buffer._live().group.config
        if request.config is not None and request.config != config:
            raise ConfigError(
                f"the backend's options differ from the config of the XQuantCache in use, which decides: "
                f"{request.config} against {config}; leave the options out"
            )


def _inductor(gm: GraphModule, inputs: list[Any], request: Request, settings: str | None) -> Callable[..., Any]:
    from torch._inductor import list_mode_options
    from torch._inductor.compile_fx import compile_fx

    import xquant_fx.kernels.lowerings  # noqa: F401  (registers them)

    patches = dict(list_mode_options(request.mode)) if request.mode not in (None, "default") else {}
    if settings is not None:
        patches.update(cache_key_patch(settings))
    return compile_fx(gm, inputs, config_patches=patches or None)


def _compile_quantized(
    gm: GraphModule, inputs: list[Any], quantized: list[int], request: Request, compiler: Compiler
) -> Callable[..., Any]:
    gm = clone(gm)
    settings = repr([inputs[i].spec for i in quantized])
    state = run_passes(gm, inputs)
    keep = [i for i in range(len(inputs)) if i not in set(quantized)]
    compiled = compiler(gm, [*(inputs[i] for i in keep), *state.tensors], request, settings)
    return CompiledStep(compiled, keep, quantized, state)


class CompiledStep:
    """Calls the compiled graph with the stored tensors of whatever cache is passed in."""

    def __init__(
        self, compiled: Callable[..., Any], keep: list[int], quantized: list[int], inputs: StateInputs
    ) -> None:
        self.compiled, self.keep, self.quantized, self.inputs = compiled, keep, quantized, inputs

    def __call__(self, *args: Any) -> Any:
        """One step; raises CacheStateError if its positions did not follow what is stored."""
        states = [args[i].state for i in self.quantized]
        # Kept with the cache: each thread may have its own, and a cache that is dropped must be free to go.
        known = states[0].group.collected.get(self)
        if known is None or known[0] != states:
            known = states[0].group.collected[self] = (states, self.inputs.collect(args))
        out = self.compiled(*[args[i] for i in self.keep], *known[1])
        for group in {id(s.group): s.group for s in states}.values():
            if self.inputs.step_tokens is not None:
                group.stepped(self.inputs.step_tokens)
            group.faults.check()
        return out
