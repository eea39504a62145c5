"""Rotated copies of a model's weights, one for each weight and way, made when it is first asked for and after changes.

A copy belongs to its weight: all graphs and caches share it, and it goes with the weight and the graphs that took it.
It is made anew once the weight is another tensor, lies elsewhere or was written to, as torch counts writes
(``_version``; writes through ``.data``, as adapters are merged, are not counted by torch, and seen by new graphs only).
"""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from xquant_fx.kernels.rotation import fold_into_columns, fold_into_rows
from xquant_fx.warn_once import warn_once


class Fold(NamedTuple):
    """Along what a weight is rotated."""

    rows: bool
    """Rows of a weight and elements of a bias, whose layer gives rotated heads; else columns: it takes them."""
    dim: int
    """Channels of a head."""


class Copy(NamedTuple):
    """A rotated copy, and the state of the weight that it was made of."""

    version: int
    address: int
    tensor: Tensor


_copies = WeakTensorKeyDictionary()


def version_of(weight: Tensor) -> int:
    """How often ``weight`` was written to; -1 of inference tensors, of which torch does not count that."""
    return -1 if weight.is_inference() else weight._version


def copy_of(weight: Tensor, fold: Fold, compare: bool = False) -> Copy:
    """The rotated copy of ``weight`` as it is now; ``compare``: whatever torch says of it."""
    copies: dict[Fold, Copy] = _copies.setdefault(weight, {})
    known, version = copies.get(fold), version_of(weight)
    if version < 0:
        warn_once(
            "rotated weights of a model that was made in inference mode are made anew at each step: torch does not "
            "count what is written to its weights; make or load it outside torch.inference_mode()"
        )
    changed = known is None or known[:2] != (version, weight.data_ptr()) or version < 0
    if changed or compare:
        with torch.no_grad(), torch.inference_mode(False):
            rotate = fold_into_rows if fold.rows else fold_into_columns
            made = Copy(version, weight.data_ptr(), rotate(weight.detach(), fold.dim))
        if changed or known is None or not torch.equal(made.tensor, known.tensor):
            known = copies[fold] = made
    assert known is not None
    return known


def folded_weight(weight: Tensor, fold: Fold) -> Tensor:
    """The rotated copy itself."""
    return copy_of(weight, fold).tensor


class FoldedInputs:
    """The rotated weights that one graph takes, found again quickly while the weights stay as they are."""

    def __init__(self, places: list[tuple[int, Fold]]) -> None:
        self.places = places
        self.found: list[tuple[weakref.ref[Tensor], Copy]] = []

    def of(self, args: tuple[Any, ...]) -> list[Tensor]:
        """Those of the weights among ``args``."""
        weights = [args[index] for index, _ in self.places]
        if not self.found or not all(map(_is_current, weights, self.found)):
            ways = (fold for _, fold in self.places)
            new = not self.found  # Dynamo compiles anew where an adapter was merged
            self.found = [(weakref.ref(w), copy_of(w, fold, new)) for w, fold in zip(weights, ways, strict=True)]
        return [copy.tensor for _, copy in self.found]


def _is_current(weight: Tensor, found: tuple[weakref.ref[Tensor], Copy]) -> bool:
    """Whether a copy is of ``weight`` as it is."""
    known, copy = found
    return known() is weight and copy.version == version_of(weight) >= 0 and copy.address == weight.data_ptr()
