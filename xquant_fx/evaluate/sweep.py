"""Sweeps: which settings come from one setting and values for some of its fields."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from xquant_fx.errors import ConfigError
from xquant_fx.evaluate.settings import Setting
from xquant_fx.plan.config import XQuantConfig

#: Field of ``XQuantConfig`` to the values that it takes in a sweep.
Grid = Mapping[str, Sequence[Any]]
FIELDS = tuple(field.name for field in dataclasses.fields(XQuantConfig))


class Swept(NamedTuple):
    """What a sweep asks for."""

    settings: list[Setting]
    """The base first, then every combination that is a valid config, each config once."""
    refused: dict[str, str]
    """Name of each combination that breaks a rule of ``XQuantConfig``, to the rule."""


def sweep(base: Setting, *grids: Grid) -> Swept:
    """The settings of a sweep: all combinations of the fields of a grid, grid after grid.

    So one grid of two fields is their product, and two grids of one field each vary one field at a time.

    Args:
        base: what all other fields are taken from; a config, not a plan.
        grids: field to values.

    Raises:
        ConfigError: no such field, no values, or a base that has no fields.
    """
    if not isinstance(base.config, XQuantConfig):
        raise ConfigError(f"a sweep changes fields of a config, and {base.name!r} is a {type(base.config).__name__}")
    swept = Swept([base], {})
    for name, changes in _combinations(base.name, grids):
        try:
            config = base.config.replace(**changes)
        except ConfigError as error:
            swept.refused[name] = str(error)
            continue
        if all(config != each.config for each in swept.settings):
            swept.settings.append(Setting(name, config))
    return swept


def _combinations(base: str, grids: Sequence[Grid]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, changed fields), in the order in which fields and values are given."""
    for grid in grids:
        for field, values in grid.items():
            if field not in FIELDS or not values:
                raise ConfigError(f"a sweep gives values to fields of XQuantConfig, {FIELDS}; got {field!r}={values!r}")
        for values in itertools.product(*grid.values()):
            changes = dict(zip(grid, values, strict=True))
            yield " ".join([base, *(f"{field}={_written(v)}" for field, v in changes.items())]), changes


def _written(value: Any) -> str:
    return ":".join(map(str, value)) if isinstance(value, tuple | list) else str(value).removeprefix("torch.")


def parse_grid(words: Sequence[str]) -> dict[str, list[Any]]:
    """A grid from words such as ``residual_length=64,128``, ``v_group_size=none,32`` and ``k_bits=2:2:1:1,2``.

    A value is a number, none, a name, or numbers joined by colons: one per layer.

    Raises:
        ConfigError: a word is not of that form, or a field comes twice.
    """
    grid: dict[str, list[Any]] = {}
    for word in words:
        field, equals, values = word.partition("=")
        if not equals or not values or field in grid:
            raise ConfigError(f"a sweep is written FIELD=VALUE,VALUE,... with each field once, got {word!r}")
        grid[field] = [_value(field, value) for value in values.split(",")]
    return grid


def _value(field: str, text: str) -> Any:
    if ":" in text:
        return tuple(_value(field, part) for part in text.split(":"))
    if text.lower() == "none":
        return None
    if field == "scale_dtype":
        return getattr(torch, text, text)
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text
