"""What is measured: a name for a config or a plan."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from xquant_fx.errors import ConfigError
from xquant_fx.plan.config import XQuantConfig
from xquant_fx.plan.plan import Plan


class Setting(NamedTuple):
    """One row of a comparison."""

    name: str
    config: XQuantConfig | Plan

    @classmethod
    def of_preset(cls, name: str) -> Setting:
        """The preset called ``name``; raises ConfigError where there is none."""
        return cls(name, XQuantConfig.preset(name))

    @classmethod
    def of_file(cls, path: str | Path) -> Setting:
        """What ``XQuantConfig.to_json`` or ``Plan.to_json`` wrote to a file, under the file's name.

        Raises:
            ConfigError: the file holds neither.
        """
        path = Path(path)
        try:
            fields = json.loads(path.read_text())
            is_plan = "xquant_plan" in fields
            config = Plan.from_json(path.read_text()) if is_plan else XQuantConfig.from_json(path.read_text())
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError, ConfigError) as error:
            raise ConfigError(f"{path} must be what XQuantConfig.to_json or Plan.to_json writes: {error}") from error
        return cls(path.stem, config)

    def check_model(self, model: Any) -> None:
        """Raise ConfigError where this is a plan for another model than ``model``."""
        if isinstance(self.config, Plan):
            self.config.check_model(model)


def check_names(settings: list[Setting]) -> None:
    """Raise ConfigError unless there is a setting and no two of one name, which stand for rows of one table."""
    names = [setting.name for setting in settings]
    if not names or len(set(names)) < len(names):
        raise ConfigError(f"settings must be one or more, each with a name of its own, got {names}")


def check_settings(settings: list[Setting], model: Any) -> None:
    """The same, and no plan for another model than ``model``."""
    check_names(settings)
    for setting in settings:
        setting.check_model(model)
