"""A graph that is compiled in the place of the program's, from which it differs in its inputs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from torch.fx import GraphModule


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
