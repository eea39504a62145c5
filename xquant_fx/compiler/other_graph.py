"""A graph that is compiled in the place of the program's, from which it differs in its inputs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from torch.fx import GraphModule

from xquant_fx.cache.growing import STORED_KV


@dataclasses.dataclass(frozen=True)
class OtherGraph:
    """The graph; ``given`` says what it takes."""

    gm: GraphModule

    def given(self, args: Sequence[Any]) -> list[Any]:
        """``args`` of the program's graph as those of this one."""
        raise NotImplementedError

    def calling(self, compiled: Callable[..., Any]) -> Callable[..., Any]:
        """What is given the program's arguments and calls ``compiled``, which was made of this graph."""
        return lambda *args: compiled(*self.given(args))

    def or_program(self, compiler: Callable[..., Any], gm: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        """``compiler`` of this graph, or of the program's ``gm`` where that is better."""
        return compiler

    def unless_ordinary(
        self,
        compiler: Callable[..., Any],
        gm: GraphModule,
        inputs: Sequence[Any],
        of_program: Callable[[Callable[..., Any]], Callable[..., Any]],
    ) -> Callable[..., Any]:
        """``compiler``, which gets the program's own ``gm`` where nothing is quantized: then no tensor is moved, and
        none is given to it that Dynamo does not know. ``of_program`` makes of what comes of it what this graph does.
        """

        def compile_either(graph: GraphModule, given: list[Any], request: Any, settings: Any) -> Any:
            if settings is not None or graph is not self.gm or any(isinstance(x, STORED_KV) for x in given):
                return compiler(graph, given, request, settings)
            return of_program(compiler(gm, inputs, request, settings))

        return compile_either
