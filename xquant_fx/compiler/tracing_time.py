"""What happens beside Dynamo while it traces for this backend.

No garbage is looked for: a full collection looks at all objects of a process, 0.3 s with transformers loaded, and
tracing 30 layers set two off. That of the trace itself is collected once it is over. And what Inductor asks the
compiler first, and what its caches hash of torch and Triton, 0.5 s once a process, is asked and read on another
processor, where no step is kept that could do without (``kept_steps.py``). What Dynamo works out many times over is
worked out once (``tracing_shortcuts.py``). Compilations by other backends are left alone.

Relied on: ``torch._dynamo.callback``, which ``torch._dynamo.reset()`` empties, the local variable ``compiler_fn`` of
``convert_frame._compile``, ``_torchdynamo_orig_backend``, ``kwargs`` of what ``torch.compile`` makes of a backend, and
from torch 2.13 on ``prefetch`` of the two hashes.
Checked on torch 2.11 and 2.13.
"""

from __future__ import annotations

import contextlib
import gc
import sys
from collections.abc import Callable, Mapping
from types import FrameType
from typing import Any

import torch
from torch._dynamo.callback import callback_handler

from xquant_fx.compiler.kept_steps import are_expected
from xquant_fx.compiler.tracing_shortcuts import shortcuts

Backend = Callable[..., Any]

_backends: list[Backend] = []
#: Not empty while the collector is off because of us.
_switched_off: list[bool] = []
_shortcuts = contextlib.ExitStack()


def watch_tracing(backend: Backend) -> None:
    """From now on, do so whenever Dynamo begins to trace for ``backend``."""
    if backend not in _backends:
        _backends.append(backend)
    if _begin not in callback_handler.start_callbacks:
        callback_handler.register_start_callback(_begin)
        callback_handler.register_end_callback(_end)


def _begin(_: Any) -> None:
    if innermost(_compiler()) not in _backends:
        return
    if gc.isenabled():
        _switched_off.append(True)  # first: Ctrl-C may strike between the two
        gc.disable()
    if not are_expected():
        if not torch.cuda.is_available():  # so that kernels will be a CPU's
            from xquant_fx.kernels.cpu.build import begin_probes  # brings in Inductor's compiler

            begin_probes()
        begin_hashes()
    _shortcuts.close()  # of a trace in which torch._dynamo.reset() was called, which never ended for us
    _shortcuts.enter_context(shortcuts())


def _end(_: Any) -> None:
    _shortcuts.close()
    if _switched_off:
        _switched_off.clear()
        try:
            _collect_new()
        finally:
            gc.enable()


def _collect_new() -> None:
    """Collect the garbage among what is new, and let the rest grow old at once, as nearly all of it is going to stay.

    Left to itself the collector would look at it twice more, and at all else with it: 0.4 s. What is young elsewhere
    in the process grows old with it, and is looked at by the next full collection.
    """
    gc.collect(0)
    if not gc.get_freeze_count():  # what somebody froze must stay so
        gc.freeze()
        gc.unfreeze()


def _compiler() -> Any:
    """What Dynamo is going to give the graph to; None if it does not say."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "_compile" and "compiler_fn" in frame.f_locals:
            return frame.f_locals["compiler_fn"]
        frame = frame.f_back
    return None


def innermost(compiler: Any) -> Any:
    """The backend that Dynamo's wrappers around ``compiler`` call."""
    compiler = _unwrapped(compiler)
    return getattr(compiler, "compiler_fn", compiler)  # that of a backend with options


def settings_of(compiler: Any) -> Mapping[str, Any]:
    """The ``mode`` and ``options`` of ``torch.compile`` for that backend, where they are given."""
    return getattr(_unwrapped(compiler), "kwargs", {})


def _unwrapped(compiler: Any) -> Any:
    while hasattr(compiler, "_torchdynamo_orig_backend"):
        compiler = compiler._torchdynamo_orig_backend
    return compiler


def begin_hashes() -> list[str]:
    """Hash torch's and Triton's files in the background, once; returns which of the two can be."""
    found = {name: hashed for name, hashed in _hashes().items() if hasattr(hashed, "prefetch")}
    for hashed in found.values():
        hashed.prefetch()
    return list(found)


def wait_for_hashes() -> None:
    """Before Inductor is imported: to hash Triton's packages, the thread imports them."""
    for hashed in _hashes().values():
        hashed()


def _hashes() -> dict[str, Any]:
    from torch._inductor import codecache

    return {name: getattr(codecache, name) for name in ("triton_key", "torch_key") if hasattr(codecache, name)}
