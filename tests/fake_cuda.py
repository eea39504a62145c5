"""Make Inductor generate Triton for CUDA where there is no GPU, also on a CPU-only build of torch.

    with fake_cuda():
        code = generated_code(function, lambda: (torch.zeros(8, device="cuda"),))

Everything up to the generated source is torch's own: Dynamo, AOTAutograd, Inductor's passes, scheduler
and code generation. Tensors are fake, compilation stops when the source is there, and nothing runs on
a device. Needs the ``triton`` package and Linux. What cannot be seen this way: numbers, speed, choices
that autotuning makes, and which fused SDPA kernel a CUDA build would take (here it is the plain math).

Private names replaced for the time of the ``with`` block, and nothing else (checked on torch 2.11 with
Triton 3.6, torch 2.13 with Triton 3.9 and torch 2.14 with Triton 3.8; a CUDA build without a card will do):

    c10::impl::device_guard_impl_registry   in libc10.so: the guard of CUDA, missing in a CPU build; the
                                            guard of the meta device, which does nothing, stands in
    torch._dynamo.device_interface          CudaInterface.is_available, .is_bf16_supported,
                                            .get_compute_capability, .get_device_properties (of its
                                            Worker too)
    torch.cuda.get_device_properties        one imaginary Hopper card. ``torch.cuda.is_available()``
                                            stays False, so nothing tries to initialise CUDA
    triton.runtime.driver._active           a driver that can only say which card it would compile for
    torch._inductor.config                  compile_threads=1 (no worker processes); no
                                            joint_graph_constant_folding, which runs ops on the device,
                                            and no shape_padding, which takes times there
    functools caches                        of torch.utils._triton, torch._inductor.utils and
                                            DeviceProperties.create: emptied before and after

``generated_code`` also uses ``GraphLowering.save_output_code``, the hook of torch's own
``run_and_get_code``, and switches off the caches of compiled graphs.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

CAPABILITY = (9, 0)
CARD = SimpleNamespace(
    name="imaginary Hopper", major=CAPABILITY[0], minor=CAPABILITY[1], warp_size=32, multi_processor_count=132,
    regs_per_multiprocessor=65536, max_threads_per_multi_processor=2048, max_threads_per_block=1024,
    shared_memory_per_block_optin=232448, shared_memory_per_multiprocessor=233472, total_memory=80 * 2**30,
)  # fmt: skip


class _Stop(BaseException):
    """Ends a compilation; no Exception, so that no handler on the way turns it into another one."""


def generated_code(
    function: Callable[..., Any], make_args: Callable[[], tuple[Any, ...]], *, backend: Any = "xquant",
    mode: str | None = None, options: dict[str, Any] | None = None,
) -> str:  # fmt: skip
    """Source that Inductor generates for the first graph of ``function(*make_args())``.

    ``make_args`` runs under a FakeTensorMode, so it can make models and caches on any device.
    Outside ``fake_cuda`` it serves for the CPU.
    """
    from torch._functorch import config as functorch_config
    from torch._inductor import config as inductor_config
    from torch._inductor.graph import GraphLowering

    found: list[str] = []

    def stop(code: str) -> None:
        found.append(code)
        raise _Stop

    torch._dynamo.reset()
    no_caches = inductor_config.patch(fx_graph_cache=False), functorch_config.patch(enable_autograd_cache=False)
    with FakeTensorMode(), torch.no_grad(), contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(GraphLowering, "save_output_code", stop))
        for patch in no_caches:
            stack.enter_context(patch)
        args = make_args()
        stack.enter_context(contextlib.suppress(_Stop))
        torch.compile(function, backend=backend, mode=mode, options=options, dynamic=False)(*args)
    torch._dynamo.reset()
    if not found:
        raise AssertionError("nothing was compiled")
    return found[0]


@contextlib.contextmanager
def fake_cuda(card: SimpleNamespace = CARD) -> Iterator[None]:
    """Pretend, to the compiler only, that there is a CUDA card of CAPABILITY."""
    from torch._dynamo.device_interface import CudaInterface
    from torch._inductor import config as inductor_config
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    importlib.import_module("torch._inductor.compile_fx")  # before the patches: it looks at the devices once
    target = GPUTarget("cuda", 10 * CAPABILITY[0] + CAPABILITY[1], 32)
    properties = staticmethod(lambda device=None: card)
    with contextlib.ExitStack() as stack:
        stack.enter_context(_device_guard())
        for owner, name, value in (
            (CudaInterface, "is_available", staticmethod(lambda: True)),
            (CudaInterface, "get_device_properties", properties),
            (CudaInterface, "is_bf16_supported", staticmethod(lambda including_emulation=True: True)),
            (CudaInterface.Worker, "get_device_properties", properties),
            (CudaInterface, "get_compute_capability", staticmethod(lambda device=None: target.arch)),
            (torch.cuda, "get_device_properties", properties),
            (driver, "_active", SimpleNamespace(get_current_target=lambda: target)),
        ):
            stack.enter_context(mock.patch.object(owner, name, value))
        settings = dict(compile_threads=1, joint_graph_constant_folding=False, shape_padding=False)
        stack.enter_context(inductor_config.patch(settings))
        _forget_devices()
        stack.callback(_forget_devices)
        yield


@contextlib.contextmanager
def _device_guard() -> Iterator[None]:
    """Give c10 a guard for CUDA, which indexing and the like ask for even with fake tensors."""
    if torch.cuda._is_compiled():  # FakeTensorMode installs one by itself
        yield
        return
    libc10 = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    cuda, meta = 1, 14  # c10/core/DeviceType.h
    registry = (ctypes.c_void_p * (meta + 1)).in_dll(libc10, "_ZN3c104impl26device_guard_impl_registryE")
    before, registry[cuda] = registry[cuda], registry[meta]
    try:
        yield
    finally:
        registry[cuda] = before


def _forget_devices() -> None:
    """Empty the caches of functions that look at the devices."""
    from torch._inductor.runtime.hints import DeviceProperties

    DeviceProperties.create.__func__.cache_clear()
    for name in ("torch.utils._triton", "torch._inductor.utils"):
        for value in list(vars(importlib.import_module(name)).values()):
            if hasattr(value, "cache_clear"):
                value.cache_clear()
