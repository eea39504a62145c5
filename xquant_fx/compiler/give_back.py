"""Buffers that were taken over and turn out to be used otherwise become ordinary ones again.

A sliding window is appended to like any cache until it is full; then it is rolled. A rotating buffer starts over at
position 0. What such a buffer holds by then is dequantized, and from there on it stays in full precision: nothing is
wrong, and nothing is quantized twice. An XQuantCache is never given back: its owner asked for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from xquant_fx.cache.convert import dequantize_in_place
from xquant_fx.cache.group import CacheGroup
from xquant_fx.cache.kv_tensor import QuantizedKV
from xquant_fx.cache.left import leave
from xquant_fx.compiler.dynamo_frames import forget_compiled_frame
from xquant_fx.compiler.left_alone import report_buffers
from xquant_fx.compiler.options import Request
from xquant_fx.errors import UnsupportedWriteError


class GiveBack:
    """Stands in for a graph that does with taken-over buffers what cannot be done with quantized ones."""

    def __init__(self, graph: Callable[..., Any], quantized: Sequence[int], reason: str, request: Request) -> None:
        self.graph, self.quantized, self.reason, self.request = graph, quantized, reason, request

    def __call__(self, *args: Any) -> Any:
        """Give the buffers back and run the step as it stands; Dynamo traces the next one anew.

        Raises:
            UnsupportedWriteError: one of them is a view, which would still be a quantized one; nothing is changed.
        """
        for i in self.quantized:
            _refuse_view(args[i], self.reason)
        give_back(groups_of(args[i] for i in self.quantized), self.reason, self.request)
        forget_compiled_frame()
        return self.graph(*args)


def groups_of(buffers: Iterable[Any]) -> list[CacheGroup]:
    """The caches that the quantized ones of ``buffers`` belong to, each once."""
    groups = (buffer.live.group for buffer in buffers if isinstance(buffer, QuantizedKV))
    return list({id(group): group for group in groups}.values())


def give_back(groups: Sequence[CacheGroup], reason: str, request: Request) -> None:
    """Make all buffers of caches that were taken over ordinary ones again, and say so.

    Raises:
        NotRewrittenError: under ``strict``; nothing is changed.
    """
    reason = f"{reason}; what was stored was dequantized"
    buffers = [buffer for group in groups for ref in group.taken_over if isinstance(buffer := ref(), QuantizedKV)]
    report_buffers([(buffer.origin, reason) for buffer in buffers], request)
    states = [buffer.live for buffer in buffers]
    for buffer in buffers:
        dequantize_in_place(buffer)
        leave(buffer, reason)
    for state in states:  # not before: upper layers have their codes from lower ones
        state.forsake()


def _refuse_view(buffer: Any, why: str) -> None:
    if isinstance(buffer, QuantizedKV) and all(ref() is not buffer for ref in buffer.live.group.taken_over):
        raise UnsupportedWriteError(
            f"{why}; the buffer would be given back to full precision, but a view of it was passed to compiled code, "
            "which is not the program's own: pass the buffer itself; nothing was written"
        )
