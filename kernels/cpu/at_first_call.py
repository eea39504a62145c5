"""A C++ function that is compiled in the background until it is called first, or what is called in its place."""

from __future__ import annotations

import ast
import contextlib
import functools
import inspect
import logging
import textwrap
from collections.abc import Callable
from typing import Any

from xquant_fx.kernels.cpu.any_room import rooms
from xquant_fx.kernels.cpu.wrapper_code import NotReadError

log = logging.getLogger(__name__)


def parsed(wrapper: Callable[..., Any]) -> ast.FunctionDef:
    """The source of a wrapper that Inductor generated; raises OSError where there is none."""
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
                        self.takes_any_room = self.rooms.are_ours(parsed(self.wrapper))
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
