"""From what ``torch.compile`` passes on (``mode``, ``options``) to a request the backend acts on."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from xquant_fx.compiler.inductor_options import Settings, checked, known
from xquant_fx.errors import ConfigError
from xquant_fx.passes.pipeline import MAY_BE_OFF
from xquant_fx.plan.config import XQuantConfig
from xquant_fx.plan.plan import Plan
from xquant_fx.plan.warnings import warn_of_cost

MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")


@dataclasses.dataclass(frozen=True)
class Request:
    """What the user asked for; ``config`` is None where the options say nothing about it."""

    config: XQuantConfig | Plan | None
    strict: bool
    mode: str | None
    dump: Path | None = None
    """Folder for the graphs before and after each pass."""
    disable: frozenset[str] = frozenset()
    """Names of passes that are left out."""
    self_check: bool = False
    """Whether each rewritten graph is compared with the program's at 16 bits first."""
    compile_prompts: bool = False
    """Whether prompts and long chunks are traced, and compiled between their attentions."""
    inductor: Settings = ()
    """Settings of Inductor's config, which it compiles under."""

    @property
    def effective(self) -> XQuantConfig | Plan:
        """The settings for buffers that bring none of their own."""
        return self.config if self.config is not None else XQuantConfig()


def parse(mode: str | None, options: Mapping[str, Any] | None) -> Request:
    """Validate ``mode`` and ``options``.

    ``torch.compile`` takes one of them: so the mode may be an option, too, as may what Inductor's config has.

    Raises:
        ConfigError: an unknown option or mode (the message lists the valid ones), or two options
            that contradict each other.
    """
    if options is not None and not isinstance(options, Mapping):
        raise ConfigError(f"options must be a dict, got {type(options).__name__}")
    given = dict(options or {})
    if "mode" in given:
        if mode is not None:
            raise ConfigError(f"mode was given twice: {mode!r} and, as an option, {given['mode']!r}")
        mode = given.pop("mode")
    if mode is not None and (not isinstance(mode, str) or mode not in MODES):
        raise ConfigError(f"mode must be one of {MODES}, got {mode!r}")
    fields = {f.name for f in dataclasses.fields(XQuantConfig)}
    valid = sorted(fields | {"preset", "config", "strict", "dump", "disable", "self_check", "compile_prompts", "mode"})
    inductor = _inductor(given, valid)
    strict, self_check, prompts = (_switch(given, name) for name in ("strict", "self_check", "compile_prompts"))
    dump, disable = _dump(given.pop("dump", None)), _disable(given.pop("disable", ()))
    config = _config(given)
    warn_of_cost(config)
    return Request(config, strict, mode, dump, disable, self_check, prompts, inductor)


def _inductor(given: dict[str, Any], valid: list[str]) -> Settings:
    """Takes what is not ``valid`` out of ``given``: all of it must be of Inductor."""
    others = [name for name in given if name not in valid]
    if not others:
        return ()
    if unknown := sorted(set(others) - known(others), key=str):
        plural = "s" * (len(unknown) > 1)
        raise ConfigError(
            f"unknown option{plural} {unknown}; valid options are {valid}, and those of torch._inductor.list_options()"
        )
    return checked([(name, given.pop(name)) for name in others])


def _switch(given: dict[str, Any], name: str) -> bool:
    value = given.pop(name, False)
    if not isinstance(value, bool):
        raise ConfigError(f"{name} must be True or False, got {value!r}")
    return value


def _dump(folder: Any) -> Path | None:
    if folder is not None and not isinstance(folder, str | Path):
        raise ConfigError(f"dump must be the path of a folder, got {folder!r}")
    return None if folder is None else Path(folder)


def _disable(names: Any) -> frozenset[str]:
    known = isinstance(names, list | tuple | set | frozenset) and all(name in MAY_BE_OFF for name in names)
    if not known:
        raise ConfigError(f"disable must be a list of passes that may be off, {list(MAY_BE_OFF)}, got {names!r}")
    return frozenset(names)


def _config(given: dict[str, Any]) -> XQuantConfig | Plan | None:
    preset, config = given.pop("preset", None), given.pop("config", None)
    if config is not None:
        if preset is not None or given:
            raise ConfigError(f"config= stands alone, got also {sorted([*given, *['preset'] * (preset is not None)])}")
        if not isinstance(config, XQuantConfig | Plan):
            raise ConfigError(f"config must be an XQuantConfig or a Plan, got {type(config).__name__}")
        return config
    if preset is None and not given:
        return None
    base = XQuantConfig.preset(preset) if preset is not None else XQuantConfig()
    return base.replace(**given)
