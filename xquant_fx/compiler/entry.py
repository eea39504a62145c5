"""What ``torch.compile(backend="xquant")`` imports: the backend, and a word at the end if nothing came of it.

``torch.compile(model, backend="xquant").generate()`` runs the model that was wrapped, and torch calls a backend only
with a graph. So that nothing was compiled shows nowhere before the process ends (an XQuantCache says so earlier, after
some uncompiled steps: ``CacheGroup.enter``). Who only looks (``explain``) imports ``backend.py``, not this.
"""

from __future__ import annotations

import atexit
import sys

from xquant_fx.compiler.backend import xquant_backend
from xquant_fx.compiler.untraced import was_called
from xquant_fx.warn_once import warn_once

__all__ = ["xquant_backend"]


@atexit.register
def tell_if_unused() -> None:
    """Warn if torch never had a graph for the backend, but not where the process failed before it could."""
    if not was_called.is_set() and getattr(sys, "last_value", None) is None:
        warn_once(
            "the backend xquant was asked for, and torch never had a graph for it: nothing was compiled, no KV cache "
            "quantized by it. torch.compile(model).generate() runs the model that was wrapped: write "
            'model.compile(backend="xquant"), then model.generate() (README, "Ways in")'
        )
