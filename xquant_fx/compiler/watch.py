"""A graph that was compiled as it is, since the KV buffers of one call could not be taken over; others may be."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

from torch.fx import GraphModule
from torch.utils.weak import WeakIdKeyDictionary

from xquant_fx.cache.aliases import owner_of
from xquant_fx.compiler.left_alone import report_buffers, report_left
from xquant_fx.compiler.options import Request
from xquant_fx.compiler.stacked_graph import LeftWholeError
from xquant_fx.compiler.takeover import Takeover
from xquant_fx.passes.records import Detection


class Watch:
    """Calls the compiled graph while the buffers are those that were judged, and judges others when they come.

    The buffers that a graph is called with are one cache's for many steps, so that knowing them again must be cheap.
    """

    def __init__(
        self,
        compiled: Callable[..., Any],
        gm: GraphModule,
        found: Detection,
        request: Request,
        judge: Callable[[GraphModule, list[Any], Request], Detection],
    ) -> None:
        self.compiled, self.gm, self.request, self.judge = compiled, gm, request, judge
        self.watched = found.left_for_now
        self.last: list[weakref.ref[Any]] = []
        self.judged: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self.is_first = True

    def __call__(self, *args: Any) -> Any:
        """One step on a cache that stays in full precision, or the takeover of one that need not."""
        buffers = [owner_of(args[i]) for i in self.watched]
        if not self.last or any(ref() is not buffer for ref, buffer in zip(self.last, buffers, strict=True)):
            found = None if self._knows(buffers) else self.judge(self.gm, list(args), self.request)
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
