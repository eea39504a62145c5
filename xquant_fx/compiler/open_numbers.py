"""Numbers that Dynamo leaves open, such as the length of a cache that grows: which they are, and what is known of them.

Private torch APIs: ``SymNode.expr``, ``ShapeEnv.guards``, ``replacements``, ``replace`` and ``var_to_range``. Checked
on torch 2.13.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from sympy import Symbol  # type: ignore[import-untyped]
from torch.fx import Node


def is_number(node: Node) -> bool:
    """Whether ``node`` is a number that differs from step to step."""
    return isinstance(node.meta.get("example_value"), torch.SymInt)


def number_of(node: Node) -> Any:
    """Such a number in the symbols that Dynamo has for numbers by now: numbers that are one are one expression."""
    return node.meta["example_value"].node.expr


def known_of(env: Any, names: Mapping[Any, Symbol]) -> list[str]:
    """What Dynamo knows of the symbols in ``names``, by these, but for how large they are: ranges, what it guards on.

    Of what it guards on about several symbols, those that have no name keep their own.
    """
    ranges = [f"{name}: {env.var_to_range[symbol]}" for symbol, name in names.items()]
    asked = {env.replace(guard.expr) for guard in env.guards}
    return ranges + sorted(str(each.xreplace(names)) for each in asked if each.free_symbols & names.keys())


def asked(inputs: Iterable[Any]) -> list[tuple[int, int]]:
    """How much Dynamo guards on about the numbers among ``inputs``."""
    envs = (each.node.shape_env for each in inputs if isinstance(each, torch.SymInt))
    return [(len(env.guards), len(env.replacements)) for env in envs]
