"""Steps that run uncompiled on a CPU: by kernels, once they are many.

All that a step reads is dequantized for plain torch (``benchmarks/uncompiled.py``). The kernels of compiled steps need
some seconds of the compiler, once per format and machine. So a sequence's first steps are plain torch, and what no
kernel takes stays that. Attention: ``step_attention.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from xquant_fx import ops
from xquant_fx.cache.group import CacheGroup
from xquant_fx.kernels.cpu.at_hand import has_failed, note_failure
from xquant_fx.kernels.layout import STEP_TOKENS
from xquant_fx.kernels.quantize_store.arguments import StoreArguments
from xquant_fx.tracing import is_transformed, shown

#: From this short step in a row on that a sequence takes uncompiled, kernels are built and run.
WARM = 16

Made = TypeVar("Made")


def is_warm(group: CacheGroup) -> bool:
    """Whether the short step that this cache is in is for kernels."""
    if group.short_steps < WARM or group.start.device.type != "cpu" or has_failed():
        return False
    from xquant_fx.kernels.cpu import build  # brings in Inductor

    return build.has_compiler()


def built(run: Callable[[], Made]) -> Made | None:
    """What ``run`` gives; None where its kernel cannot be built, which is told once and not tried again."""
    from xquant_fx.kernels.cpu.build import CompileError

    try:
        return run()
    except CompileError as error:
        note_failure(error)
        return None


def append(group: CacheGroup, a: StoreArguments) -> bool:
    """Append a step's tokens by the kernel; False: nothing was done."""
    if a.bits == 16 or a.x.shape[2] > STEP_TOKENS or not is_warm(group) or is_transformed(a.x, a.pos):
        return False
    with shown("xquant::append_cpu"):
        built(lambda: ops.append_uncompiled(a))
    return not has_failed()
