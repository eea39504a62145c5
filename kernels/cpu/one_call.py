"""All C++ kernels of a graph by one call: a function in C++ in the place of Inductor's Python wrapper.

A decode step of a small model is some hundred calls of a few microseconds each. Between them the wrapper makes and
checks tensors, in Python whose code and objects the weights have driven from the caches: a tenth of a step. Here it is
read (``wrapper_code.py``) and becomes one C++ function, which gets the tensors' addresses and calls the same kernels
in the same order, in one piece of scratch memory (``one_call_source.py``). Those that Inductor wrote stand in the same
source (``one_unit.py``). A wrapper that does more than that stays as it is.

Private torch APIs: what ``wrapper_code.py`` names; the wrapper's ``suffix``; that a kernel is the function ``kernel``
of a module of its own. Checked on torch 2.11 and 2.13.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch

from xquant_fx.kernels.cpu.any_room import rooms
from xquant_fx.kernels.cpu.at_first_call import AtFirstCall, parsed
from xquant_fx.kernels.cpu.in_turn import InTurn, Turn
from xquant_fx.kernels.cpu.kept_call import KeptCall, bound, for_this_machine, may_be_kept
from xquant_fx.kernels.cpu.one_call_source import Kernels, source
from xquant_fx.kernels.cpu.wrapper_chain import Link, Result, chained, kernel_name
from xquant_fx.kernels.cpu.wrapper_code import NotReadError, Place, Reader, Size, WrapperCode, read_wrapper

log = logging.getLogger(__name__)

Keep = Callable[[KeptCall], None]

_wanted = ContextVar("one_call", default=True)
_collecting: ContextVar[list[Generated] | None] = ContextVar("collecting", default=None)

#: Python for a generated module, behind its imports.
IMPORT = "from xquant_fx.kernels.cpu.one_unit import UnitCompile as AsyncCompile"

#: Python for its end, behind its wrapper.
HOOK = """
import xquant_fx.kernels.cpu.one_call
if "Runner" in globals():
    Runner.call = xquant_fx.kernels.cpu.one_call.joined(Runner.call, globals(), {itemsizes})
else:
    call = xquant_fx.kernels.cpu.one_call.joined(call, globals(), {itemsizes})
"""


@contextlib.contextmanager
def switched(on: bool) -> Iterator[None]:
    """Whether wrappers that are generated inside become one call."""
    before = _wanted.set(on)
    try:
        yield
    finally:
        _wanted.reset(before)


def add_hook(wrapper: Any, itemsizes: Mapping[str, int]) -> None:
    """Let the module that ``wrapper`` generates join its calls, once, where that is switched on.

    ``itemsizes`` are bytes of an element of each tensor that it is given, by its name there.
    """
    if not _wanted.get():
        return
    suffix = getattr(wrapper, "suffix", None)  # a torch without one calls kernels one by one
    if suffix is None:
        log.info("the kernels of this graph are called one by one: this torch's wrapper has no suffix")
    elif ".one_call.joined(" not in suffix.getvalue():
        suffix.splice(HOOK.format(itemsizes=dict(itemsizes)))
        wrapper.imports.writeline(IMPORT)


class Generated(NamedTuple):
    """A wrapper that Inductor generated."""

    wrapper: Callable[..., Any]
    module: dict[str, Any]
    """The globals of its module."""
    itemsizes: Mapping[str, int] | None = None
    """Bytes of an element of its arguments, by name."""


@contextlib.contextmanager
def collected() -> Iterator[list[Generated]]:
    """The wrappers that are generated inside, which stay as they are: for ``joined_chain``."""
    found = list[Generated]()
    before = _collecting.set(found)
    try:
        yield found
    finally:
        _collecting.reset(before)


def joined(
    wrapper: Callable[..., Any], module: dict[str, Any], itemsizes: Mapping[str, int] | None = None
) -> Callable[..., Any]:
    """What is called in the place of ``wrapper``; compiled in the background until the first call.

    ``itemsizes`` are bytes of an element of its arguments, by name.
    """
    collecting = _collecting.get()
    if collecting is not None:
        collecting.append(Generated(wrapper, module, itemsizes))
        return wrapper

    def begin() -> Callable[[], Callable[..., Any]]:
        function = parsed(wrapper)
        parameters = ", ".join(arg.arg for arg in function.args.args)
        return _python(parameters, read_wrapper(function, itemsizes), module)

    return AtFirstCall(begin, functools.partial(_one_by_one, wrapper, module), wrapper)


class Chain(NamedTuple):
    """Generated wrappers and how they are called one after the other."""

    generated: Sequence[Generated]
    read: Sequence[Reader]
    """What each wrapper does."""
    links: Sequence[Link]
    arguments: Sequence[str]
    results: Sequence[Result]


def read_generated(generated: Generated) -> Reader:
    """What a wrapper does; raises NotReadError."""
    read = Reader(generated.itemsizes)
    try:
        read.read_all(parsed(generated.wrapper))
    except (OSError, AttributeError) as error:  # no source
        raise NotReadError(str(error)[:200]) from error
    return read


def joined_chain(chain: Chain, keep: Keep | None = None) -> Callable[[list[Any]], tuple[Any, ...]]:
    """What does the calls of ``chain``, given a list of its arguments, and gives a tuple of its results.

    ``keep`` gets what is needed to make the same call another time.
    """

    def begin() -> Callable[[], Callable[..., Any]]:
        code = chained(chain.read, chain.links, chain.arguments, chain.results)
        module = dict(chain.generated[0].module)
        for number, generated in enumerate(chain.generated):
            names = [name for name in generated.module if name.startswith("cpp_")]
            module.update({kernel_name(number, name): generated.module[name] for name in names})
        return _python("args", code, module, keep)

    return AtFirstCall(begin, functools.partial(_in_turn, chain))


def _one_by_one(wrapper: Callable[..., Any], module: dict[str, Any]) -> Callable[..., Any]:
    from xquant_fx.kernels.cpu import one_unit  # brings in Inductor's compiler

    one_unit.compile_alone(module)
    return wrapper


def _in_turn(chain: Chain) -> Callable[..., Any]:
    """Calls each of the generated wrappers."""
    from xquant_fx.kernels.cpu import one_unit  # brings in Inductor's compiler

    for generated in chain.generated:
        one_unit.compile_alone(generated.module)

    def turn(link: Link) -> Turn:
        wrapper = chain.generated[link.wrapper].module["call"]
        return Turn(lambda *args: wrapper([*args]), link.given, link.returned, [None] * len(link.returned))

    run = InTurn(chain.arguments, [*map(turn, chain.links)], chain.results)
    return lambda args: run(*args)


def _python(
    parameters: str, code: WrapperCode, module: dict[str, Any], keep: Keep | None = None
) -> Callable[[], Callable[..., Any]]:
    """Begins to compile the one call. What it returns gives the new wrapper, which allocates what is returned and the
    scratch memory, and makes the call."""
    from xquant_fx.kernels.cpu import build, one_unit  # bring in Inductor's compiler

    if (of_graph := rooms()) is not None:
        of_graph.check(code)
    names = sorted({call.name for call in code.calls})
    here = {name: module[name] for name in names if isinstance(module[name], one_unit.UnitKernel)}
    elsewhere = [name for name in names if name not in here]
    outside = _outside(code)
    tensors = [*code.allocated, *outside]
    sizes = sorted({arg.python for call in code.calls for arg in call.args if isinstance(arg, Size)})
    kernels = Kernels(elsewhere, {name: kernel.types for name, kernel in here.items()})
    types, text = source(code, kernels, tensors, sizes)
    text = for_this_machine() + one_unit.unit(list(here.values())) + text
    build.begin_kernel(types, text)
    results = ", ".join("None" if place is None else place.python for place in code.results)
    lines = [
        f"def call({parameters}):",
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
        function, files = build.load(types, text), [_file(one_unit.loaded(module[name])) for name in elsewhere]
        made = bound(lines, function, files, module)
        if keep is not None and set(outside) <= set(code.arguments) and may_be_kept(made):
            keep(KeptCall(lines, _file(function), files))
        return made

    return finish


def _outside(code: WrapperCode) -> list[str]:
    """Arguments that kernels get, and constants of the module."""
    used = {arg.memory for call in code.calls for arg in call.args if isinstance(arg, Place)}
    used |= {place.memory for place in code.results if isinstance(place, Place)}
    return sorted(used - set(code.offsets) - set(code.allocated))


def _file(kernel: Any) -> str:
    """The library of a C++ function that is called from Python."""
    return str(kernel.__self__.__file__)
