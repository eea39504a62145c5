"""The texts of frames that Dynamo puts into the stack trace of each node, made once a trace: most are those before."""

from __future__ import annotations

import itertools
import traceback
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

#: So many equal frames in a row Python shows as they are, of more it says how many there were.
_SHOWN = 3

FrameKey = tuple[Any, ...]


class _Frames(list[traceback.FrameSummary]):
    """``traceback.StackSummary`` of frames, in which those that are equal are formatted once."""

    def __init__(self, frames: list[traceback.FrameSummary], texts: dict[FrameKey, list[str]]) -> None:
        super().__init__(frames)
        self.texts = texts

    def format(self, **settings: Any) -> list[str]:
        """As ``StackSummary.format``."""
        keys = [_key(frame) for frame in self]
        in_a_row = (len(list(equal)) for _, equal in itertools.groupby(keys, key=lambda key: key[:3]))
        if settings or max(in_a_row, default=0) > _SHOWN:
            return traceback.StackSummary.from_list(self).format(**settings)
        for key, frame in zip(keys, self, strict=True):
            if key not in self.texts:
                self.texts[key] = traceback.StackSummary.from_list([frame]).format()
        return [line for key in keys for line in self.texts[key]]


def _key(frame: traceback.FrameSummary) -> FrameKey:
    """What the text of a frame is made of, beside the source file; Python 3.10 knows no columns."""
    columns = (getattr(frame, name, None) for name in ("end_lineno", "colno", "end_colno"))
    return (frame.filename, frame.lineno, frame.name, *columns)


def traceback_of_one_trace() -> SimpleNamespace:
    """The module ``traceback``, whose texts of frames are kept as long as it is: source files may change."""
    texts: dict[FrameKey, list[str]] = {}
    from_list: Callable[[Any], _Frames] = lambda frames: _Frames(frames, texts)  # noqa: E731
    return SimpleNamespace(**{**vars(traceback), "StackSummary": SimpleNamespace(from_list=from_list)})
