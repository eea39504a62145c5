"""``AutoReport``: what was chosen for a model, what it was expected to lose, and what it does lose."""

from __future__ import annotations

import dataclasses
from typing import Any

from xquant_fx.evaluate.sharing import SharingTrial
from xquant_fx.plan.plan import Plan
from xquant_fx.plan.spec import Role
from xquant_fx.tables import render


def layers_text(first: int, last: int) -> str:
    """Layers for people."""
    return str(first) if first == last else f"{first} to {last}"


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
    """Each width that was to be had, with what it adds; empty where codes are shared."""
    shared: bool = False
    """Whether the upper layer of each pair reads the codes of the lower one."""

    @property
    def layers(self) -> str:
        """Its layers, for people."""
        return layers_text(self.first, self.last)


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
    sharing: list[SharingTrial]
    """What sharing codes between layers loses, chosen or not."""
    unfused: dict[int, str]
    """Layers that are read dequantized, as no kernel reads both their sides, and why."""

    def to_dict(self) -> dict[str, Any]:
        """All numbers but the plan, as JSON can hold them."""
        return {
            "title": self.title, "true_bits": self.true_bits, "predicted_kl": self.predicted_kl,
            "measured_kl": self.measured_kl, "groups": [dataclasses.asdict(group) for group in self.groups],
            "sharing": [dataclasses.asdict(trial) for trial in self.sharing], "unfused": self.unfused,
        }  # fmt: skip

    def __str__(self) -> str:
        columns = ["layers", "side", "bits", "KL they add"]
        groups = sorted(self.groups, key=lambda group: (group.first, group.role))
        rows = [[g.layers, f"{g.role}s", f"{g.bits:g}{' shared' * g.shared}", f"{g.kl:.5f}"] for g in groups]
        chosen = render("", columns, rows, self._summary())
        return "\n".join(
            [f"xquant plan for {self.title}", chosen, *([self._sharing()] if self.sharing else []), *self._slow()]
        )

    def _sharing(self) -> str:
        columns = ["layers", "side", "shared: bits", "true bits", "KL they add", "own: bits", "true bits",
                   "KL they add", "free"]  # fmt: skip
        rows = [
            [
                layers_text(t.first, t.last), f"{t.role}s", f"{t.bits:g}", f"{t.true_bits:.3f}",
                t.reason if t.kl is None else f"{t.kl:.5f}", f"{t.own_bits:g}", f"{t.own_true_bits:.3f}",
                f"{t.own_kl:.5f} ± {t.noise:.5f}", "yes" if t.is_free else "no",
            ]
            for t in self.sharing
        ]  # fmt: skip
        note = "± is the standard error of the difference; what is not free is not chosen"
        return "if the layers of each pair shared codes\n" + render("", columns, rows, note)

    def _slow(self) -> list[str]:
        by_reason: dict[str, list[str]] = {}
        for layer, reason in self.unfused.items():
            by_reason.setdefault(reason, []).append(str(layer))
        return [f"layer(s) {', '.join(on)} are read dequantized, slower: {why}" for why, on in by_reason.items()]

    def _summary(self) -> str:
        off = self.measured_kl / self.predicted_kl - 1 if self.predicted_kl > 0 else 0.0
        return (
            f"{self.true_bits:.3f} true bits per element; KL predicted {self.predicted_kl:.4f}, measured "
            f"{self.measured_kl:.4f} nats on this text: {abs(off):.0%} {'more' if off > 0 else 'less'} than predicted"
        )
