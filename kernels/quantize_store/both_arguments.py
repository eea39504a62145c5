"""What ``xquant::quantize_store_both`` takes: keys and values of one layer, at the same positions."""

from __future__ import annotations

import dataclasses
from typing import Any, get_type_hints

from xquant_fx.kernels.arguments import Arguments, Overload
from xquant_fx.kernels.quantize_store.arguments import StoreArguments

#: Tensors that both sides have in common, given once: an op must not get a tensor that it writes to twice.
COMMON = ("pos", "start", "fault")
#: Tensors of each side.
OF_SIDE = tuple(name for name in StoreArguments.tensor_names() if name not in COMMON)
SIDES = ("k", "v")


def _names() -> list[str]:
    return [field.name for field in dataclasses.fields(StoreArguments)]


def _fields() -> list[tuple[str, Any]]:
    hints = get_type_hints(StoreArguments, include_extras=True)
    return [(name, hints[name]) for name in COMMON] + [
        (f"{side}_{name}", hints[name]) for side in SIDES for name in _names() if name not in COMMON
    ]


_Fields: Any = dataclasses.make_dataclass("_Fields", _fields(), bases=(Arguments,), frozen=True, eq=False)


class BothArguments(_Fields):  # type: ignore[misc]
    """Arguments of the op and of its Triton kernel: those in COMMON, and those of each side with "k_" or "v_" before.

    The fields are those of ``StoreArguments``.
    """

    @property
    def sides(self) -> tuple[StoreArguments, StoreArguments]:
        """Arguments of ``quantize_store`` of keys, and of values."""
        given = vars(self)
        keys, values = (
            {name: given[name if name in COMMON else f"{side}_{name}"] for name in _names()} for side in SIDES
        )
        return StoreArguments(**keys), StoreArguments(**values)

    @classmethod
    def of_sides(cls, keys: Any, values: Any) -> BothArguments:
        """Those of ``quantize_store`` put together; in what is in COMMON they agree."""
        given = {name: getattr(keys, name) for name in COMMON}
        for side, a in zip(SIDES, (keys, values), strict=True):
            given.update({f"{side}_{name}": value for name, value in vars(a).items() if name not in COMMON})
        return cls(**given)

    @property
    def overload(self) -> str:
        """Name of the overload of the op, in BOTH, that these arguments are for."""
        fits = [getattr(self, f"{side}_fit") for side in SIDES]
        return "_".join(side for side, fit in zip(SIDES, fits, strict=True) if fit is not None)


#: Overload by which sides borrow their codes, which they only read: "", "k", "v" or "k_v".
BOTH = {
    "_".join(borrowing): Overload(read_only=frozenset(f"{side}_codes" for side in borrowing))
    for borrowing in ((), ("k",), ("v",), SIDES)
}
