"""Which cases of a list run in ``make test``, and which in ``make test-all`` only."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import pytest


def fast_but(cases: Iterable[Any], slow: Collection[Any]) -> list[Any]:
    """Parameters ``cases``, those in ``slow`` marked so."""
    return [pytest.param(case, marks=pytest.mark.slow if case in slow else ()) for case in cases]


def every_other(*axes: Sequence[Any], slow: Collection[Any] = ()) -> list[Any]:
    """One value of each axis, in all combinations: every other one is slow, and all with a value in ``slow``.

    Of three axes, with two neighbours each that are not in ``slow``, any two values of two axes meet in a fast case.
    """
    cases = []
    for places in itertools.product(*(range(len(axis)) for axis in axes)):
        case = tuple(axis[place] for axis, place in zip(axes, places, strict=True))
        is_slow = sum(places) % 2 or any(value in slow for value in case)
        cases.append(pytest.param(*case, marks=pytest.mark.slow if is_slow else ()))
    return cases
