"""Which buffers of a graph belong to one cache: layers that share codes must be of one.

Two caches may meet in one graph: a target and a draft model, an encoder and a decoder, two branches. Nothing in the ops
tells them apart. What does: where the program keeps the buffers, and the position that each is appended at.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable

#: A number in the source of a buffer, such as ``layers[3]`` or ``_modules['3']``.
_NUMBER = re.compile(r"(?<=\[)'?\d+'?(?=\])")


def stack_of(key: str, value: str) -> str:
    """The stack that a layer with buffers ``key`` and ``value`` is of: their source with the layer's number left open.

    ``cache.layers[3].keys`` and ``cache.layers[3].values`` are of ``cache.layers[*].keys``. Buffers without a number
    are a cache by themselves: nothing says that they belong to others.
    """
    same = itertools.takewhile(lambda letters: letters[0] == letters[1], zip(key, value, strict=False))
    numbers = list(_NUMBER.finditer("".join(letter for letter, _ in same))) or list(_NUMBER.finditer(key))
    if not numbers:
        return key
    return f"{key[: numbers[-1].start()]}*{key[numbers[-1].end() :]}"


def numbered(keys: Iterable[object]) -> list[int]:
    """0, 1, 2 ... for the distinct ``keys``, in the order in which they come."""
    known: dict[object, int] = {}
    return [known.setdefault(key, len(known)) for key in keys]
