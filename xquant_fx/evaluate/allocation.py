"""Which option each item gets: all choices of least loss for their cost, found exactly.

An item is a side of some layers; its options say how they are stored. Losses add up over items, as costs do, and costs
are whole numbers, so few sums of costs differ and dynamic programming over them is exact and quick.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple


class Option(NamedTuple):
    """One way to store an item."""

    what: Any
    """Whatever it stands for."""
    cost: int
    """Of all elements of the item, in any unit that all items share."""
    loss: float
    """What it adds to the loss, at least 0."""


class Choice(NamedTuple):
    """One option for each item."""

    cost: int
    loss: float
    picks: tuple[int, ...]
    """Index of each item's option, in the order of the items."""


def pareto_choices(items: Sequence[Sequence[Option]]) -> list[Choice]:
    """The choices that no other one equals or beats in both cost and loss, by rising cost and falling loss.

    Of choices that are equal in both the one with the lowest indices is taken, so that the same numbers give the same
    choice. Items without an option leave no choice: an empty list.
    """
    front = [Choice(0, 0.0, ())]
    for options in items:
        grown = [
            Choice(choice.cost + option.cost, choice.loss + option.loss, (*choice.picks, index))
            for choice in front
            for index, option in enumerate(options)
        ]
        front = _undominated(grown)
    return front


def cheapest_within(front: Sequence[Choice], loss: float) -> Choice | None:
    """The cheapest choice of a Pareto front whose loss is at most ``loss``; None: there is none."""
    return next((choice for choice in front if choice.loss <= loss), None)


def best_within(front: Sequence[Choice], cost: float) -> Choice | None:
    """The choice of least loss of a Pareto front that costs at most ``cost``; None: all cost more."""
    return next((choice for choice in reversed(front) if choice.cost <= cost), None)


def _undominated(choices: list[Choice]) -> list[Choice]:
    front: list[Choice] = []
    for choice in sorted(choices):
        if not front or choice.loss < front[-1].loss:
            front.append(choice)
    return front
