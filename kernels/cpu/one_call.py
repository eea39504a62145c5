"""All C++ kernels of a graph by one call: a function in C++ in the place of Inductor's Python wrapper.

A decode step of a small model is some hundred calls of a few microseconds each. Between them the wrapper makes and
checks tensors, in Python whose code and objects the weights have driven from the caches: a tenth of a step. Here it is
read (``wrapper_code.py``) and becomes one C++ function, which gets the tensors' addresses and calls the same kernels
in the same order, in one piece of scratch memory. Those that Inductor wrote stand in the same source
(``one_unit.py``). A wrapper that does more than that stays as it is.

Private torch APIs: what ``wrapper_code.py`` names; the wrapper's ``suffix``; that a kernel is the function ``kernel``
of a module of its own. Checked on torch 2.13.
"""

from __future__ import annotations

import ast
import contextlib
import ctypes
import functools
import inspect
import logging
import textwrap
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch

from xquant_fx.kernels.cpu.wrapper_code import KernelCall, NotReadError, Place, Size, WrapperCode, read_wrapper

log = logging.getLogger(__name__)

_wanted = ContextVar("one_call", default=True)

#: Python for a generated module, behind its imports.
IMPORT = "from xquant_fx.kernels.cpu.one_unit import UnitCompile as AsyncCompile"

#: Python for its end, behind its wrapper.
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
        wrapper.imports.writeline(IMPORT)


def joined(wrapper: Callable[..., Any], module: dict[str, Any]) -> Callable[..., Any]:
    """What is called in the place of ``wrapper``; compiled in the background until the first call."""
    from torch._dynamo.utils import dynamo_timed  # imports Dynamo

    with dynamo_timed("xquant_one_call"):
        finish, chosen = _begun(wrapper, module), list[Callable[..., Any]]()

    def call(*args: Any) -> Any:
        if not chosen:
            with dynamo_timed("xquant_one_call"):
                chosen.append(finish())
        return chosen[0](*args)

    return call


def _begun(wrapper: Callable[..., Any], module: dict[str, Any]) -> Callable[[], Callable[..., Any]]:
    """What gives the function to call, once it is needed."""
    from torch._dynamo.utils import counters  # imports Dynamo

    from xquant_fx.kernels.cpu import build  # brings in Inductor's compiler

    try:
        function = ast.parse(textwrap.dedent(inspect.getsource(wrapper))).body[0]
        assert isinstance(function, ast.FunctionDef)
        finish = _python(function, read_wrapper(function), module)
    except (NotReadError, OSError, AttributeError) as error:
        return functools.partial(_one_by_one, wrapper, module, str(error)[:200])

    def finished() -> Callable[..., Any]:
        try:
            made = finish()
        except (NotReadError, build.CompileError) as error:
            return _one_by_one(wrapper, module, str(error)[:200])
        counters["xquant"]["one_call"] += 1
        return made

    return finished


def _one_by_one(wrapper: Callable[..., Any], module: dict[str, Any], reason: str) -> Callable[..., Any]:
    from torch._dynamo.utils import counters  # imports Dynamo

    from xquant_fx.kernels.cpu import one_unit  # brings in Inductor's compiler

    log.info("the kernels of this graph are called one by one: %s", reason)
    counters["xquant"][f"kernels called one by one: {reason}"] += 1
    one_unit.compile_alone(module)
    return wrapper


def _python(function: ast.FunctionDef, code: WrapperCode, module: dict[str, Any]) -> Callable[[], Callable[..., Any]]:
    """Begins to compile the one call. What it returns gives the new wrapper, which allocates what is returned and the
    scratch memory, and makes the call."""
    from xquant_fx.kernels.cpu import build, one_unit  # bring in Inductor's compiler

    names = sorted({call.name for call in code.calls})
    here = {name: module[name] for name in names if isinstance(module[name], one_unit.UnitKernel)}
    elsewhere = [name for name in names if name not in here]
    outside = _outside(code)
    tensors = [*code.allocated, *outside]
    table, libraries = _addresses([module[name] for name in elsewhere])
    sizes = sorted({arg.argument for call in code.calls for arg in call.args if isinstance(arg, Size)})
    kernels = Kernels(elsewhere, {name: kernel.types for name, kernel in here.items()})
    types, text = source(code, kernels, tensors, sizes)
    text = one_unit.unit(list(here.values())) + text
    build.begin_kernel(types, text)
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

    def finish() -> Callable[..., Any]:
        for name in set(outside) - set(code.arguments):  # constants, which a module has only once it is loaded
            if not isinstance(module.get(name), torch.Tensor):
                raise NotReadError(f"{name}, which is no tensor")
        bound = {**module, "xquant_kernels": table, "xquant_libraries": libraries}
        bound["xquant_one_call"] = build.load(types, text)
        exec(compile("\n".join(lines), "<one call>", "exec"), bound)
        made: Callable[..., Any] = bound["call"]
        return made

    return finish


def _outside(code: WrapperCode) -> list[str]:
    """Arguments that kernels get, and constants of the module."""
    used = {arg.memory for call in code.calls for arg in call.args if isinstance(arg, Place)}
    used |= {place.memory for place in code.results if isinstance(place, Place)}
    return sorted(used - set(code.offsets) - set(code.allocated))


def _addresses(kernels: list[Any]) -> tuple[torch.Tensor, list[ctypes.CDLL]]:
    """Addresses of the C++ functions behind Python's, int64, and what keeps them loaded."""
    libraries = [ctypes.CDLL(kernel.__self__.__file__) for kernel in kernels]
    addresses = [ctypes.cast(library.kernel, ctypes.c_void_p).value for library in libraries]
    return torch.tensor([*addresses, 0], dtype=torch.int64), libraries  # an empty tensor would have no memory


class Kernels(NamedTuple):
    """Where the kernels are that one function calls."""

    elsewhere: list[str]
    """Names of those in libraries of their own, whose addresses it gets."""
    here: dict[str, tuple[str, ...]]
    """Those in the same source (``one_unit.unit``), in order, with the C++ types of their arguments."""


def source(code: WrapperCode, kernels: Kernels, tensors: list[str], sizes: list[str]) -> tuple[tuple[str, ...], str]:
    """(argument types, C++ source of ``kernel``): the kernels' addresses, scratch memory, ``tensors``, ``sizes``."""
    given = {memory: f"t{i}" for i, memory in enumerate(tensors)} | {size: f"n{i}" for i, size in enumerate(sizes)}
    types = ("const int64_t*", "uint8_t*", *("uint8_t*" for _ in tensors), *("int64_t" for _ in sizes))
    names = ("kernels", "scratch", *given.values())
    lines = [f"    {_cpp(call, kernels, code, given)}\n" for call in code.calls]
    signature = ", ".join(f"{kind} {name}" for kind, name in zip(types, names, strict=True))
    return types, f'#include <cstdint>\nextern "C" void kernel({signature}) {{\n{"".join(lines)}}}\n'


def _cpp(call: KernelCall, kernels: Kernels, code: WrapperCode, names: dict[str, str]) -> str:
    given = [_cpp_argument(arg, code, names) for arg in call.args]
    if call.name in kernels.here:
        cast = ", ".join(f"({kind})({arg})" for kind, arg in zip(kernels.here[call.name], given, strict=True))
        return f"unit_{[*kernels.here].index(call.name)}::kernel({cast});"
    kinds = ", ".join("void*" if isinstance(arg, Place) else "int64_t" for arg in call.args)
    return f"((void (*)({kinds}))kernels[{kernels.elsewhere.index(call.name)}])({', '.join(given)});"


def _cpp_argument(arg: Place | Size | int, code: WrapperCode, names: dict[str, str]) -> str:
    if isinstance(arg, int):
        return f"{arg}L"
    if isinstance(arg, Size):
        return names[arg.argument]
    if arg.memory in code.offsets:
        return f"scratch + {code.offsets[arg.memory] + arg.offset}"
    return f"{names[arg.memory]} + {arg.offset}"
