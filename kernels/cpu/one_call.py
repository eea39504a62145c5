"""All C++ kernels of a graph by one call: a function in C++ in the place of Inductor's Python wrapper.

A decode step of a small model is some hundred calls of a few microseconds each. Between them the wrapper makes and
checks tensors, in Python whose code and objects the weights have driven from the caches: a tenth of a step. Here it is
read (``wrapper_code.py``) and becomes one C++ function, which gets the tensors' addresses and calls the same kernels
in the same order, in one piece of scratch memory. A wrapper that does more than that stays as it is.

Private torch APIs: what ``wrapper_code.py`` names; the wrapper's ``suffix``; that a kernel is the function ``kernel``
of a module of its own. Checked on torch 2.13.
"""

from __future__ import annotations

import ast
import contextlib
import ctypes
import inspect
import logging
import textwrap
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import torch

from xquant_fx.kernels.cpu.wrapper_code import KernelCall, NotReadError, Place, Size, WrapperCode, read_wrapper

log = logging.getLogger(__name__)

_wanted = ContextVar("one_call", default=True)

#: Python for the end of a generated module, behind its wrapper.
HOOK = """
import xquant_fx.kernels.cpu.one_call
if "Runner" in globals():
    Runner.call = xquant_fx.kernels.cpu.one_call.joined(Runner.call, globals())
else:
    call = xquant_fx.kernels.cpu.one_call.joined(call, globals())
"""


@contextlib.contextmanager
def switched(on: bool) -> Iterator[None]:
    """Whether wrappers that are generated inside become one call."""
    before = _wanted.set(on)
    try:
        yield
    finally:
        _wanted.reset(before)


def add_hook(wrapper: Any) -> None:
    """Let the module that ``wrapper`` generates join its calls, once, where that is switched on."""
    if not _wanted.get():
        return
    suffix = getattr(wrapper, "suffix", None)  # a torch without one calls kernels one by one
    if suffix is None:
        log.info("the kernels of this graph are called one by one: this torch's wrapper has no suffix")
    elif HOOK.strip() not in suffix.getvalue():
        suffix.splice(HOOK)


def joined(wrapper: Callable[..., Any], module: dict[str, Any]) -> Callable[..., Any]:
    """``wrapper`` until its first call, which decides what its next ones do."""
    chosen: list[Callable[..., Any]] = []

    def call(*args: Any) -> Any:
        if not chosen:
            chosen.append(_one_call(wrapper, module))
        return chosen[0](*args)

    return call


def _one_call(wrapper: Callable[..., Any], module: dict[str, Any]) -> Callable[..., Any]:
    from torch._dynamo.utils import counters  # imports Dynamo

    try:
        function = ast.parse(textwrap.dedent(inspect.getsource(wrapper))).body[0]
        assert isinstance(function, ast.FunctionDef)
        code = read_wrapper(function)
        made = _python(function, code, module)
    except (NotReadError, OSError, AttributeError) as reason:
        log.info("the kernels of this graph are called one by one: %s", reason)
        counters["xquant"][f"kernels called one by one: {reason}"] += 1
        return wrapper
    counters["xquant"]["one_call"] += 1
    return made


def _python(function: ast.FunctionDef, code: WrapperCode, module: dict[str, Any]) -> Callable[..., Any]:
    """The new wrapper: allocates what is returned and the scratch memory, and makes the one call."""
    from xquant_fx.kernels.cpu import build  # brings in Inductor's compiler

    kernels = sorted({call.name for call in code.calls})
    tensors = [*code.allocated, *_outside(code, module)]
    table, libraries = _addresses([module[name] for name in kernels])
    sizes = sorted({arg.argument for call in code.calls for arg in call.args if isinstance(arg, Size)})
    one_call = build.load(*source(code, kernels, tensors, sizes))
    results = ", ".join("None" if place is None else place.python for place in code.results)
    lines = [
        f"def call({', '.join(arg.arg for arg in function.args.args)}):",
        f"    {', '.join(code.arguments)}, = args",
        "    args.clear()",
        *(f"    {memory} = {python}" for memory, python in code.allocated.items()),
        f"    scratch = empty_strided_cpu(({code.scratch},), (1,), torch.uint8)",
        f"    xquant_one_call({', '.join(['xquant_kernels', 'scratch', *tensors, *sizes])})",
        f"    return ({results},)" if results else "    return ()",
    ]
    names = {**module, "xquant_one_call": one_call, "xquant_kernels": table, "xquant_libraries": libraries}
    exec(compile("\n".join(lines), "<one call>", "exec"), names)
    made: Callable[..., Any] = names["call"]
    return made


def _outside(code: WrapperCode, module: dict[str, Any]) -> list[str]:
    """Arguments that kernels get, and constants of the module."""
    used = {arg.memory for call in code.calls for arg in call.args if isinstance(arg, Place)}
    used |= {place.memory for place in code.results if isinstance(place, Place)}
    found = sorted(used - set(code.offsets) - set(code.allocated))
    for name in set(found) - set(code.arguments):
        if not isinstance(module.get(name), torch.Tensor):
            raise NotReadError(f"{name}, which is no tensor")
    return found


def _addresses(kernels: list[Any]) -> tuple[torch.Tensor, list[ctypes.CDLL]]:
    """Addresses of the C++ functions behind Python's, int64, and what keeps them loaded."""
    libraries = [ctypes.CDLL(kernel.__self__.__file__) for kernel in kernels]
    addresses = [ctypes.cast(library.kernel, ctypes.c_void_p).value for library in libraries]
    return torch.tensor(addresses, dtype=torch.int64), libraries


def source(code: WrapperCode, kernels: list[str], tensors: list[str], sizes: list[str]) -> tuple[tuple[str, ...], str]:
    """(argument types, C++ source of ``kernel``): the kernels' addresses, scratch memory, ``tensors``, ``sizes``."""
    given = {memory: f"t{i}" for i, memory in enumerate(tensors)} | {size: f"n{i}" for i, size in enumerate(sizes)}
    types = ("const int64_t*", "uint8_t*", *("uint8_t*" for _ in tensors), *("int64_t" for _ in sizes))
    names = ("kernels", "scratch", *given.values())
    lines = [f"    {_cpp(call, kernels.index(call.name), code, given)}\n" for call in code.calls]
    signature = ", ".join(f"{kind} {name}" for kind, name in zip(types, names, strict=True))
    return types, f'#include <cstdint>\nextern "C" void kernel({signature}) {{\n{"".join(lines)}}}\n'


def _cpp(call: KernelCall, kernel: int, code: WrapperCode, names: dict[str, str]) -> str:
    kinds = ", ".join("void*" if isinstance(arg, Place) else "int64_t" for arg in call.args)
    given = ", ".join(_cpp_argument(arg, code, names) for arg in call.args)
    return f"((void (*)({kinds}))kernels[{kernel}])({given});"


def _cpp_argument(arg: Place | Size | int, code: WrapperCode, names: dict[str, str]) -> str:
    if isinstance(arg, int):
        return f"{arg}L"
    if isinstance(arg, Size):
        return names[arg.argument]
    if arg.memory in code.offsets:
        return f"scratch + {code.offsets[arg.memory] + arg.offset}"
    return f"{names[arg.memory]} + {arg.offset}"
