"""Steps that run uncompiled on a CPU: by kernels, once they are many.

Plain torch dequantizes all that a step reads: at 1,024 tokens of a small model it takes five times as long as full
precision. The kernels of compiled steps need some seconds of the compiler, once per format and machine. So the first
WARM steps in a row of a sequence are plain torch, and what no kernel takes stays that. Attention:
``step_attention.py``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TypeVar

from xquant_fx import ops
from xquant_fx.cache.group import CacheGroup
from xquant_fx.kernels.layout import STEP_TOKENS
from xquant_fx.kernels.quantize_store.arguments import StoreArguments
from xquant_fx.tracing import is_watched
from xquant_fx.warn_once import warn_once

#: Uncompiled steps in a row, since a sequence began, after which kernels are built.
WARM = 16

Made = TypeVar("Made")
_failed: list[bool] = []


@functools.cache
def _has_compiler() -> bool:
    from xquant_fx.kernels.cpu import build  # brings in Inductor

    return build.has_compiler()


def is_warm(group: CacheGroup) -> bool:
    """Whether the next short step of this cache is for kernels."""
    return group.uncompiled >= WARM and group.start.device.type == "cpu" and not _failed and _has_compiler()


def built(run: Callable[[], Made]) -> Made | None:
    """What ``run`` gives; None where its kernel cannot be built, which is told once and not tried again."""
    from xquant_fx.kernels.cpu.build import CompileError

    try:
        return run()
    except CompileError as error:
        _failed.append(True)
        warn_once(
            f"uncompiled steps of quantized caches stay slow, as the C++ compiler fails: {error}", key="uncompiled"
        )
        return None


def append(group: CacheGroup, a: StoreArguments) -> bool:
    """Append a step's tokens by the kernel; False: nothing was done."""
    if a.bits == 16 or a.x.shape[2] > STEP_TOKENS or not is_warm(group) or is_watched(a.x, a.pos):
        return False
    return built(lambda: ops.append_uncompiled(a)) is True
