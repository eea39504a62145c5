"""A graph that was compiled as it is, since the KV buffers of one call could not be taken over; others may be."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.fx import GraphModule
from torch.utils.weak import WeakIdKeyDictionary

from xquant_fx.cache.aliases import owner_of
from xquant_fx.compiler.detection import detect_graph
from xquant_fx.compiler.left_alone import report_buffers, report_left
from xquant_fx.compiler.options import Request
from xquant_fx.compiler.stacked_graph import LeftWholeError
from xquant_fx.compiler.takeover import Takeover
from xquant_fx.passes.continued import may_be_past
from xquant_fx.passes.find_sites import buffer_name
from xquant_fx.passes.records import Detection

#: Times that a buffer of the encoder's may be written between two steps: a prompt's first one, and what empties it.
MAY_BE_BEGUN = 1
WRITTEN_BETWEEN = (
    "keys or values are read in this graph and written between its steps, where no compiled code sees it (by out=, or "
    "behind a graph break); write to the buffer in the compiled step: buffer[:, :, positions] = x"
)


class Watch:
    """Calls the compiled graph while the buffers are those that were judged, and judges others when they come.

    The buffers that a graph is called with are one cache's for many steps, so that knowing them again must be cheap.
    """

    def __init__(self, compiled: Callable[..., Any], gm: GraphModule, found: Detection, request: Request) -> None:
        self.compiled, self.gm, self.request = compiled, gm, request
        self.watched = found.left_for_now
        self.last: list[weakref.ref[Any]] = []
        self.judged: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self.is_first = True

    def __call__(self, *args: Any) -> Any:
        """One step on a cache that stays in full precision, or the takeover of one that need not."""
        buffers = [owner_of(args[i]) for i in self.watched]
        if not self.last or any(ref() is not buffer for ref, buffer in zip(self.last, buffers, strict=True)):
            found = None if self._knows(buffers) else detect_graph(self.gm, list(args), self.request)
            if found is not None:
                report_left(found.sites, self.request)
            if found is not None and found.ordinary:
                return Takeover(found, self.request)(*args)
            self.judged.update((buffer, True) for buffer in buffers)
            self.last = [weakref.ref(buffer) for buffer in buffers]
        return self.compiled(*args)

    def _knows(self, buffers: list[Any]) -> bool:
        was_first, self.is_first = self.is_first, False  # they were judged when the graph was compiled
        return was_first or all(buffer in self.judged for buffer in buffers)


class WatchWrites:
    """Calls the compiled graph, which reads buffers that it does not write, and tells of those that others write.

    What is written between all steps is no cross attention's: a cache that is appended to by uncompiled code (``out=``,
    behind a graph break). Inference tensors do not count their writes and are not told of.
    """

    def __init__(self, compiled: Callable[..., Any], found: Detection, request: Request) -> None:
        self.compiled, self.read, self.request = compiled, only_read(found), request
        self.last: list[tuple[int, int]] = []
        """Of each buffer: where its memory lies, how often it had been written to."""
        self.written = 0

    def __call__(self, *args: Any) -> Any:
        """One step."""
        if self.read:
            self._look([args[i] for i, _ in self.read])
        return self.compiled(*args)

    def _look(self, buffers: list[Any]) -> None:
        now = [_writes_to(buffer) for buffer in buffers]
        pairs = list(zip(self.last, now, strict=False))
        changed = [i for i, (old, new) in enumerate(pairs) if old[0] == new[0] and old[1] < new[1]]
        self.last, self.written = now, self.written + 1 if changed else 0
        if self.written > MAY_BE_BEGUN:
            report_buffers([(self.read[i][1], WRITTEN_BETWEEN) for i in changed], self.request)
            self.read = []


def _writes_to(buffer: Any) -> tuple[int, int]:
    if type(buffer) is not Tensor or buffer.is_inference():
        return 0, 0
    return buffer.untyped_storage().data_ptr(), buffer._version


def only_read(found: Detection) -> list[tuple[int, str]]:
    """(number of the argument, name) of inputs with the dimensions of keys and values that are read and not written."""
    inputs = found.gm.graph.find_nodes(op="placeholder")
    roots = [node for site in found.sites if not site.has_cache for node in site.buffers]
    read = dict.fromkeys(node for node in roots if may_be_past(node) and node not in found.written)
    return [(inputs.index(node), buffer_name(node)) for node in read]


class WatchStacks:
    """Likewise of tensors that hold several buffers: ``take`` gives what takes those of one call over, if it can."""

    def __init__(
        self,
        compiled: Callable[..., Any],
        take: Callable[[Sequence[Any]], Callable[..., Any]],
        watched: tuple[int, ...],
        request: Request,
    ) -> None:
        self.compiled, self.take, self.watched, self.request = compiled, take, watched, request
        self.judged: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self.is_first = True

    def __call__(self, *args: Any) -> Any:
        """One step on stacks that stay in full precision, or the takeover of ones that need not."""
        stacks = [args[i] for i in self.watched]
        was_first, self.is_first = self.is_first, False  # they were judged when the graph was compiled
        if not was_first and not all(stack in self.judged for stack in stacks):
            try:
                return self.take(args)(*args)
            except LeftWholeError as left:
                report_buffers([("of several parts", str(left))], self.request)
        self.judged.update((stack, True) for stack in stacks)
        return self.compiled(*args)
