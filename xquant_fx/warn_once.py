"""Warnings that are given once per process, however many graphs they are true of."""

from __future__ import annotations

import logging

log = logging.getLogger("xquant_fx")
_given: set[str] = set()


def warn_once(message: str, *, key: str | None = None) -> None:
    """Log ``message`` as a warning, unless one with this ``key`` (default: the message) was given before."""
    key = message if key is None else key
    if key not in _given:
        _given.add(key)
        log.warning(message)


def forget() -> None:
    """Give every warning once more."""
    _given.clear()
