"""What ``xquant::quantize_store`` takes; see ``KVSpec`` for the shapes of the stored tensors."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Annotated, Any, NamedTuple

from torch import Tensor

from xquant_fx.kernels.arguments import Arguments, Elements, Overload, Symbolic


class Quantized(NamedTuple):
    """The tensors that only storage below 16 bits has."""

    scale: Tensor
    ring: Tensor


class Ranks(NamedTuple):
    """The tensors that rank channels, which are noted once per sequence."""

    order: Tensor
    center: Tensor
    energy: Tensor


@dataclasses.dataclass(frozen=True, eq=False)
class StoreArguments(Arguments):
    """Arguments of the op, of its kernels ``append_cpu`` and ``triton_append``, and of their overloads."""

    x: Annotated[Tensor, Elements("T")]
    """New keys or values [B, H, q, D]."""
    pos: Annotated[Tensor, Elements("int64_t")]
    """int64 [q], consecutive positions; the first is the number of tokens stored so far. Or [B, q]: each row's own."""
    codes: Annotated[Tensor, Elements("int32_t", written=True)]
    """int32 words, or for 16 bits the tensor itself."""
    scale: Annotated[Tensor | None, Elements("S", written=True)]
    zero: Annotated[Tensor | None, Elements("S", written=True)]
    ring: Annotated[Tensor | None, Elements("T", written=True)]
    sink: Annotated[Tensor | None, Elements("T", written=True)]
    order: Annotated[Tensor | None, Elements("int32_t", written=True)]
    """int32 [B, H, D], the channel of each rank, where channels are ranked."""
    center: Annotated[Tensor | None, Elements("float", written=True)]
    """float32 [B, H, D], a constant per rank that is taken out of zero points."""
    energy: Annotated[Tensor | None, Elements("float")]
    """float32 [B, H, D], mean square of the queries of each channel, or zeros; read when channels are ranked."""
    norm: Annotated[Tensor | None, Elements("uint8_t", written=True)]
    """uint8 [B, tokens], what a token's keys of all heads were divided by, where they were."""
    start: Annotated[Tensor, Elements("int64_t")]
    """int64 [B], first token of each sequence that is not padding."""
    length: Annotated[Tensor, Elements("int64_t", written=True)]
    """int64 [2], tokens stored and the furthest token ever stored. Or [B, 2]: each row's own."""
    fault: Annotated[Tensor, Elements("int32_t", written=True)]
    """int32 [1], or [B] where rows have positions of their own, set to a ``Fault`` when positions do not follow."""
    scheme: str
    """Name of a scheme of ``kernels/schemes``."""
    bits: float
    """Bits per element, an average where widths are mixed."""
    group_size: int
    residual_length: int
    eta: float
    sink_tokens: int
    max_len: Symbolic
    """Tokens there is room for; a number that is known in a step only, where graphs are for caches of any length."""
    fit: str | None = None
    """None: the codes are this layer's own; else how scales are fitted to borrowed ones."""

    @property
    def quantized(self) -> Quantized:
        """What storage below 16 bits has, and 16 bits have not."""
        assert self.scale is not None and self.ring is not None
        return Quantized(self.scale, self.ring)

    @property
    def zero_points(self) -> Tensor:
        """Zero points, of schemes that have them."""
        assert self.zero is not None
        return self.zero

    @property
    def ranks(self) -> Ranks:
        """Ranks, of schemes that have them."""
        assert self.order is not None and self.center is not None and self.energy is not None
        return Ranks(self.order, self.center, self.energy)

    @property
    def overload(self) -> Overload:
        """The overload of the op that these arguments are for."""
        return OWN if self.fit is None else BORROWED

    def call(self, own: Callable[..., Any], borrowed: Callable[..., Any]) -> Any:
        """Call the overload that these arguments are for."""
        given = self._asdict()
        fit = given.pop("fit")
        return own(**given) if fit is None else borrowed(**given, fit=fit)


#: The layer has codes of its own.
OWN = Overload(omit=frozenset({"fit"}))
#: The layer fits scales to the codes of the one below, which it only reads.
BORROWED = Overload(required=frozenset({"fit"}), read_only=frozenset({"codes"}))
