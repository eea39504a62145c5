"""Which cases of a list run in ``make test``, and which in ``make test-all`` only."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def fast_but(cases: Iterable[Any], slow: Collection[Any]) -> list[Any]:
    """Parameters ``cases``, those in ``slow`` marked so."""
    return [pytest.param(case, marks=pytest.mark.slow if case in slow else ()) for case in cases]
