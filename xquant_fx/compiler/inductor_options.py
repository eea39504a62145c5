"""Settings of Inductor among the options of ``torch.compile``, which takes them as its own backend does.

Relied on: ``torch._inductor.list_options``, and that Inductor's config is a module that knows the type of each setting.
Checked on torch 2.11 and 2.13.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterable
from typing import Any, get_origin

from xquant_fx.errors import ConfigError

Settings = tuple[tuple[str, Any], ...]


def known(names: Iterable[str]) -> set[str]:
    """Those of ``names`` that Inductor's config has, with "-" or "_"."""
    from torch._inductor import list_options

    of_inductor = set(list_options())
    return {name for name in names if isinstance(name, str) and name.replace("-", "_") in of_inductor}


def checked(given: Collection[tuple[str, Any]]) -> Settings:
    """``given`` names that are ``known``, and their values, as Inductor's config spells them.

    Raises:
        ConfigError: a value is of another type than the setting.
    """
    from torch._inductor import config

    settings = tuple((name.replace("-", "_"), value) for name, value in given)
    for name, value in settings:
        kind: Any = config.get_type(name)  # type: ignore[attr-defined]
        if get_origin(kind) is None and isinstance(kind, type) and not isinstance(value, kind):
            raise ConfigError(f"{name}, an option of Inductor, must be of type {kind.__name__}, got {value!r}")
    return settings


def in_force(settings: Settings) -> contextlib.AbstractContextManager[Any]:
    """Inside, Inductor's config has ``settings``."""
    if not settings:
        return contextlib.nullcontext()
    from torch._inductor import config

    return config.patch(dict(settings))  # type: ignore[attr-defined,no-any-return]
