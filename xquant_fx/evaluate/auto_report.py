"""``AutoReport``: what was chosen for a model, what it was expected to lose, and what it does lose."""

from __future__ import annotations

import dataclasses
from typing import Any

from xquant_fx.plan.plan import Plan
from xquant_fx.plan.spec import Role
from xquant_fx.tables import render


@dataclasses.dataclass(frozen=True)
class Group:
    """One side of neighbouring layers, which have one width."""

    role: Role
    first: int
    """Lowest layer, counted over quantized ones."""
    last: int
    """Highest, included."""
    bits: float
    """What was chosen."""
    kl: float
    """What it adds to the predicted KL, in nats."""
    options: dict[float, float]
    """Each width that was to be had, with what it adds."""

    @property
    def layers(self) -> str:
        """Its layers, for people."""
        return str(self.first) if self.first == self.last else f"{self.first} to {self.last}"


@dataclasses.dataclass(frozen=True)
class AutoReport:
    """A plan that was chosen by measuring; print it for a table."""

    title: str
    """Model and text, for people."""
    plan: Plan
    true_bits: float
    """Codes, scales and zero points per element, keys and values together."""
    predicted_kl: float
    """Sum over groups and sides of what each loses alone: mean KL in nats."""
    measured_kl: float
    """Mean KL in nats of the plan, on the same text."""
    groups: list[Group]

    def to_dict(self) -> dict[str, Any]:
        """All numbers but the plan, as JSON can hold them."""
        return {
            "title": self.title, "true_bits": self.true_bits, "predicted_kl": self.predicted_kl,
            "measured_kl": self.measured_kl, "groups": [dataclasses.asdict(group) for group in self.groups],
        }  # fmt: skip

    def __str__(self) -> str:
        columns = ["layers", "keys, bits", "KL they add", "values, bits", "KL they add"]
        keys, values = ([g for g in self.groups if g.role == role] for role in ("key", "value"))
        rows = [
            [k.layers, f"{k.bits:g}", f"{k.kl:.5f}", f"{v.bits:g}", f"{v.kl:.5f}"]
            for k, v in zip(keys, values, strict=True)
        ]
        return render(f"xquant plan for {self.title}", columns, rows, self._summary())

    def _summary(self) -> str:
        off = self.measured_kl / self.predicted_kl - 1 if self.predicted_kl > 0 else 0.0
        return (
            f"{self.true_bits:.3f} true bits per element; KL predicted {self.predicted_kl:.4f}, measured "
            f"{self.measured_kl:.4f} nats on this text: {abs(off):.0%} {'more' if off > 0 else 'less'} than predicted"
        )
