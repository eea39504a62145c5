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

import ast
import contextlib
import functools
import inspect
import logging
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch

from xquant_fx.kernels.cpu.any_room import rooms
from xquant_fx.kernels.cpu.in_turn import InTurn, Turn
from xquant_fx.kernels.cpu.kept_call import KeptCall, bound, may_be_kept
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
        function = _parsed(wrapper)
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
        read.read_all(_parsed(generated.wrapper))
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


def _parsed(wrapper: Callable[..., Any]) -> ast.FunctionDef:
    function = ast.parse(textwrap.dedent(inspect.getsource(wrapper))).body[0]
    assert isinstance(function, ast.FunctionDef)
    return function


class AtFirstCall:
    """Calls what is compiled in the background until then; where that cannot be, what ``otherwise`` makes.

    That may take inputs of any room (``any_room.py``), too, if it calls ``wrapper`` and nothing else.
    """

    def __init__(
        self,
        begin: Callable[[], Callable[[], Callable[..., Any]]],
        otherwise: Callable[[], Callable[..., Any]],
        wrapper: Callable[..., Any] | None = None,
    ) -> None:
        from torch._dynamo.utils import dynamo_timed  # imports Dynamo

        with dynamo_timed("xquant_one_call"):
            self.finish = _begun(begin)
        self.otherwise, self.wrapper, self.rooms = otherwise, wrapper, rooms()
        self.chosen: Callable[..., Any] | None = None
        self.takes_any_room = False
        if self.rooms is not None:
            self.rooms.calls.append(self.is_open)

    def __get__(self, runner: Any, owner: Any = None) -> Callable[..., Any]:
        """Where it is a method in the place of another, as a class of generated code has one."""
        return self if runner is None else functools.partial(self, runner)

    def is_open(self) -> bool:
        """Whether it takes inputs of any room; waits for the compiler."""
        if self.chosen is None:
            self._choose()
        return self.takes_any_room

    def __call__(self, *args: Any) -> Any:
        """Make the call."""
        return (self.chosen or self._choose())(*args)

    def _choose(self) -> Callable[..., Any]:
        from torch._dynamo.utils import counters, dynamo_timed  # imports Dynamo

        from xquant_fx.kernels.cpu import build  # brings in Inductor's compiler

        with dynamo_timed("xquant_one_call"):
            try:
                made = self.finish()
                self.takes_any_room = True  # before it is ``chosen``: another thread may ask
                counters["xquant"]["one_call"] += 1
            except (NotReadError, build.CompileError) as error:
                made = _told(self.otherwise, str(error)[:200])
                if self.rooms is not None and self.wrapper is not None:
                    with contextlib.suppress(OSError):  # no source
                        self.takes_any_room = self.rooms.are_ours(_parsed(self.wrapper))
            self.chosen = made
        return made


def _begun(begin: Callable[[], Callable[[], Callable[..., Any]]]) -> Callable[[], Callable[..., Any]]:
    """What gives the function to call, once it is needed, or says why there is none."""
    try:
        return begin()
    except (NotReadError, OSError, AttributeError) as error:
        return functools.partial(_refuse, str(error))


def _refuse(reason: str) -> Callable[..., Any]:
    raise NotReadError(reason)


def _told(otherwise: Callable[[], Callable[..., Any]], reason: str) -> Callable[..., Any]:
    from torch._dynamo.utils import counters  # imports Dynamo

    log.info("the kernels of this graph are called one by one: %s", reason)
    counters["xquant"][f"kernels called one by one: {reason}"] += 1
    return otherwise()


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
    text = one_unit.unit(list(here.values())) + text
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
