"""What becomes of a graph with quantized buffers among its inputs: the passes rewrite a clone of it, which is compiled.

Where that cannot be, the graph runs as the program has it, on dequantized values or on buffers that are given back.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch._dynamo.utils import dynamo_timed
from torch.fx import GraphModule

from xquant_fx.cache.growing import STORED_KV
from xquant_fx.cache.kv_tensor import QuantizedKV
from xquant_fx.cache.prompt_attention import by_kernel
from xquant_fx.compiler.any_length import AnyLengthStep, Padded, any_length, check_any_length, padded
from xquant_fx.compiler.any_room import ExactRooms, is_any_room, why_fixed
from xquant_fx.compiler.chunks import UncompiledChunk
from xquant_fx.compiler.compiled_prompts import Stretches
from xquant_fx.compiler.compiled_step import CompiledStep
from xquant_fx.compiler.detection import detect_graph
from xquant_fx.compiler.give_back import GiveBack, groups_of
from xquant_fx.compiler.growing_step import GrowingStep, has_room
from xquant_fx.compiler.left_alone import report_uncompiled, report_unfused
from xquant_fx.compiler.options import Request
from xquant_fx.compiler.planning import warn_of_lengths
from xquant_fx.compiler.restarts import Restarts
from xquant_fx.compiler.self_check import self_check
from xquant_fx.compiler.sliding_step import SlidingStep, begin_to_slide, moved_windows
from xquant_fx.errors import UnsupportedWriteError
from xquant_fx.kernels.cpu.at_hand import as_wanted
from xquant_fx.passes.any_length import Wide
from xquant_fx.passes.context import Context
from xquant_fx.passes.graph import clone
from xquant_fx.passes.pipeline import run_passes
from xquant_fx.passes.records import Detection
from xquant_fx.passes.trace import fake

log = logging.getLogger(__name__)

Step = Callable[..., Any]


class QuantizedGraph:
    """A graph on its way to a compiled step.

    Args:
        gm: Dynamo's graph. It is not changed.
        found: what was detected, whose clone of the graph is rewritten.
        inputs: those of this call.
        request: what is asked for.
        stretches: how what lies between attentions of a chunk is compiled; None: it is not.
        compiler: what compiles; its result None means that the graph is to run as the program has it.
        by_inductor: whether that is Inductor, which alone makes graphs that serve caches of several lengths.
    """

    def __init__(
        self,
        gm: GraphModule,
        found: Detection,
        inputs: list[Any],
        request: Request,
        compiler: Callable[..., Any],
        stretches: Stretches | None,
        by_inductor: bool,
    ) -> None:
        self.gm, self.found, self.inputs, self.request, self.compiler = gm, found, inputs, request, compiler
        self.by_inductor, self.stretches = by_inductor, stretches
        self.quantized = [i for i, value in enumerate(inputs) if isinstance(value, STORED_KV)]
        self.settings = repr([list(found.specs.values()), sorted(request.disable)])
        self.any_room = is_any_room(inputs)
        self.program: Step = as_wanted(gm.forward)
        """The program's graph, op by op."""
        self.context = Context(found, inputs)
        self.longer: Wide | None = None
        """The graph as one of caches of any length."""

    def step(self) -> Step:
        """What is called in the place of the graph.

        Raises:
            FixedLengthError: it has to be made one of the length at hand.
            UnsupportedWriteError: it writes to the buffer of a cache in a way that is no append.
        """
        if beginning := begin_to_slide(self.gm, self.found, self.inputs, self.request):
            log.info("windows are full: the next step runs uncompiled, and they are stored as sliding from then on")
            return beginning
        try:
            self._open_length()
            return self._uncompiled() or self._rewritten()
        except UnsupportedWriteError as error:
            if not self._were_ordinary():
                raise
            return GiveBack(self.program, self.quantized, str(error), self.request)

    def _open_length(self) -> None:
        """Make the graph one of caches of any length, where Dynamo left it open."""
        self.longer = any_length(self.gm, self.inputs, self.request, self.settings, self.by_inductor)
        if self.longer is None:
            buffers = [self.inputs[i] for i in self.quantized]
            warn_of_lengths([buffer.spec for buffer in buffers if type(buffer) is QuantizedKV])
            return
        self.found = detect_graph(self.longer.gm, self.inputs, self.request)
        self.context = Context(self.found, self.inputs)

    def _uncompiled(self) -> Step | None:
        """What runs a step of caches that grow where it cannot be compiled, or not yet."""
        if self.any_room and (self.request.self_check or not self.by_inductor):
            return ExactRooms(self.program, "it is compared with the program, or another compiler is used")
        if not has_room(self.context):
            log.info("a cache that grows has no room for this step, which runs uncompiled")
            return self.program
        return None

    def _rewritten(self) -> Step:
        if refused := self._checked():
            return self._given_up(refused)
        moved = moved_windows(self.context)
        restarts = Restarts(self.gm, self.found, self.request)  # which reads the graph as it is before the passes
        with dynamo_timed("xquant_passes"):
            run_passes(self.found.gm, self.context, self.request.disable, self.request.dump)
        if (reason := self._why_fixed()) and self.any_room:
            return ExactRooms(self.program, reason)
        if self.longer:
            check_any_length(self.found.gm.graph, reason)
        return self._compiled(restarts, moved)

    def _checked(self) -> str:
        """Why the rewrite must not be used: what ``self_check`` found, where it is asked for."""
        if not self.request.self_check:
            return ""
        self.found, refused = self_check(self.gm, self.found, self.inputs, self.request)
        if not refused:
            report_unfused(self.found.sites, self.request)
            self.context = Context(self.found, self.inputs)
        return refused

    def _why_fixed(self) -> str:
        return why_fixed(self.found.gm.graph, self.context) if self.any_room or self.longer else ""

    def _compiled(self, restarts: Restarts, moved: Any) -> Step:
        """The step of the graph as the passes left it."""
        state, keep = self.context.state, [i for i in range(len(self.inputs)) if i not in set(self.quantized)]
        masks = self.longer.masks if self.longer else {}
        masks = {place: masks[i] for place, i in enumerate(keep) if i in masks}
        examples = [*padded([self.inputs[i] for i in keep], masks), *state.example_inputs]
        written, whole = self._written(), self._whole()
        compiled = self.compiler(self.found.gm, examples, self.request, self.settings)
        state.tensors.clear()  # or the graph would keep the cache that it was compiled with
        if compiled is None:
            log.info("a chunk of a number of tokens that varies: such steps run uncompiled")
            return UncompiledChunk(restarts, as_wanted(self._chunk().forward))
        of_masks = Padded(compiled, masks) if masks else compiled
        step: Any = CompiledStep(of_masks, keep, written, state, restarts, whole)
        if moved:
            step = SlidingStep(step, self.program, moved)
        elif self.context.grown:
            step = GrowingStep(step, self.program, self.context.grown)
        return AnyLengthStep(step, compiled, self.program, self.settings) if self.longer else step

    def _chunk(self) -> GraphModule:
        """The program's graph as one that runs op by op."""
        if self.stretches is None:
            return by_kernel(clone(self.gm))
        found = detect_graph(self.gm, self.inputs, self.request)  # of which no pass has made anything
        self.stretches.compile(by_kernel(found.gm), found)
        return found.gm

    def _written(self) -> frozenset[int]:
        """Quantized inputs that the graph appends to."""
        places = (self.context.placeholders.get(write.buffer, -1) for write in self.found.writes)
        return frozenset(places) & set(self.quantized)

    def _whole(self) -> list[int]:
        """Results of the rewritten graph that may be all of a buffer."""
        buffers = [self.inputs[i] for i in self.quantized]
        shapes = [tuple(buffer.shape[1:]) for buffer in buffers if isinstance(buffer, QuantizedKV)]
        results: Any = self.found.gm.graph.output_node().args[0]
        return [i for i, node in enumerate(results) if _may_be_whole(fake(node), shapes)]

    def _given_up(self, reason: str) -> Step:
        """What runs in the place of a rewritten graph that is wrong: the program's, op by op."""
        if self._were_ordinary():
            return GiveBack(self.program, self.quantized, reason, self.request)
        report_uncompiled([self.inputs[i].origin for i in self.quantized], reason, self.request)
        return self.program

    def _were_ordinary(self) -> bool:
        groups = groups_of(self.inputs)
        return bool(groups) and all(group.taken_over for group in groups)


def _may_be_whole(value: Tensor | None, shapes: Sequence[tuple[int, ...]]) -> bool:
    """Whether a result has the sizes of one of the ``shapes`` (H, N, D) of buffers, in any order, and maybe a batch."""
    if value is None or not all(isinstance(size, int) for size in value.shape):
        return False
    return any(not Counter(shape) - Counter(value.shape) for shape in shapes)
