"""The choices that a model leaves: what each takes and loses, which is best for a budget, and what it is as a plan."""

from __future__ import annotations

from collections.abc import Iterable

from tqdm import tqdm

from xquant_fx.errors import ArgumentError
from xquant_fx.evaluate.allocation import Choice, Option, best_within, cheapest_within, pareto_choices
from xquant_fx.evaluate.auto_report import AutoReport, Group
from xquant_fx.evaluate.probe import FULL, Probe, Width
from xquant_fx.evaluate.sensitivity import Losses, all_losses, groups_passes
from xquant_fx.evaluate.sharing import Block, SharingTrial, blocks_of, layers_of, shared_widths, try_sharing
from xquant_fx.plan.plan import Plan
from xquant_fx.plan.spec import Role, why_not_fused


class Search:
    """The choices that a model leaves, and what was measured of them."""

    def __init__(self, probe: Probe, sharing: bool, show: bool) -> None:
        self.probe = probe
        with tqdm(desc="passes", total=groups_passes(probe), disable=not show) as bar:
            self.blocks = blocks_of(all_losses(probe, bar.update))
            tried = self.blocks if sharing else []
            bar.total = bar.n + len(tried)
            trials = []
            for block in tried:
                trials.append(try_sharing(probe, block))
                bar.update()
        self.trials = [trial for trial in trials if trial is not None]
        free = {(trial.role, trial.first): trial for trial in self.trials if trial.is_free}
        self.options = [self._options(block, free.get(_place(block))) for block in self.blocks]
        self.front = [choice for choice in pareto_choices(self.options) if self._quantizes(choice)]
        full = (probe.cost(b[0].item.role, dict.fromkeys(layers_of(b), Width(FULL))) for b in self.blocks)
        self.cost_of_bit = sum(full) / FULL
        self.measured: dict[Choice, float] = {}

    def within(self, bits: float) -> tuple[Choice, float]:
        """(the choice of least loss within so many true bits, its KL as measured)."""
        choice = best_within(self.front, bits * self.cost_of_bit * (1 + 1e-12))  # rounding is no overspending
        if choice is None:
            raise ArgumentError(
                f"bits must be at least {self.true_bits(self.front[0]):.4f} true bits for this model and config, "
                f"got {bits!r}"
            )
        return choice, self.measure(choice)

    def down_to(self, max_kl: float) -> tuple[Choice, float]:
        """(the choice of fewest bits with a measured KL of at most ``max_kl``, its KL).

        A bisection over the Pareto front, which begins where the prediction says.
        """
        low, high, ratio = -1, len(self.front), 1.0  # too much KL at low, little enough at high
        while high - low > 1:
            guess = cheapest_within(self.front, max_kl / ratio) or self.front[-1]
            index = self.front.index(guess) if len(self.measured) < 3 else (low + high) // 2
            index = min(max(index, low + 1), high - 1)
            kl = self.measure(self.front[index])
            low, high = (low, index) if kl <= max_kl else (index, high)
            ratio = max(kl, 1e-12) / max(self.front[index].loss, 1e-12)
        if high == len(self.front):
            best = min(self.measured, key=lambda choice: self.measured[choice])
            raise ArgumentError(
                f"max_kl must be at least {self.measured[best]:.6f} nats, the least that was found with anything "
                f"quantized (at {self.true_bits(best):.3f} true bits), got {max_kl!r}"
            )
        return self.front[high], self.measured[self.front[high]]

    def measure(self, choice: Choice) -> float:
        """Mean KL in nats of a choice."""
        self.measured[choice] = self.probe.loss(self.plan(choice))
        return self.measured[choice]

    def plan(self, choice: Choice) -> Plan:
        """The plan that a choice stands for."""
        chosen = self._widths(choice)
        return self.probe.plan(lambda role, layer: chosen[role, layer])

    def true_bits(self, choice: Choice) -> float:
        """True bits per element of a choice."""
        return choice.cost / self.cost_of_bit

    def report(self, choice: Choice, measured: float, heading: str) -> AutoReport:
        """What was chosen, for people."""
        widths, plan = self._widths(choice), self.plan(choice)
        groups: list[Group] = []
        for block, options, pick in zip(self.blocks, self.options, choice.picks, strict=True):
            (role, first), last = _place(block), layers_of(block)[-1]
            chosen = [widths[role, each.item.first] for each in block]
            if any(width.shared for width in options[pick].what.values()):
                groups.append(Group(role, first, last, chosen[0].bits, options[pick].loss, {}, shared=True))
                continue
            groups += [
                Group(role, each.item.first, each.item.last, width.bits, each.means[width.bits], each.means)
                for each, width in zip(block, chosen, strict=True)
            ]
        return AutoReport(
            heading, plan, self.true_bits(choice), choice.loss, measured, groups, self.trials, self._unfused(plan)
        )

    def _options(self, block: Block, free: SharingTrial | None) -> list[Option]:
        """All ways of least loss for their cost that the layers of ``block`` may be stored in."""
        items = [self._own(each) for each in block]
        options = [
            Option(_joined(ways[pick].what for ways, pick in zip(items, choice.picks, strict=True)), *choice[:2])
            for choice in pareto_choices(items)
        ]
        if free is not None:
            widths = shared_widths(block)
            options.append(Option(widths, self.probe.cost(free.role, widths), free.kl or 0.0))
        return options

    def _own(self, losses: Losses) -> list[Option]:
        item = losses.item
        ways = [(dict.fromkeys(item.layers, Width(bits)), kl) for bits, kl in losses.means.items()]
        return [Option(widths, self.probe.cost(item.role, widths), kl) for widths, kl in ways]

    def _widths(self, choice: Choice) -> dict[tuple[Role, int], Width]:
        return {
            (block[0].item.role, layer): width
            for block, options, pick in zip(self.blocks, self.options, choice.picks, strict=True)
            for layer, width in options[pick].what.items()
        }

    def _quantizes(self, choice: Choice) -> bool:
        """Whether anything is: a plan that leaves all as it is would be none."""
        return any(width.bits < FULL for width in self._widths(choice).values())

    def _unfused(self, plan: Plan) -> dict[int, str]:
        """Layers whose keys and values are read dequantized, as no kernel reads them, and why."""
        specs = self.probe.specs(plan)
        pairs = zip(specs[::2], specs[1::2], strict=True)
        reasons = {k.layer: why_not_fused(k, v) for k, v in pairs if k.quantized or v.quantized}
        return {layer: reason for layer, reason in reasons.items() if reason}


def _place(block: Block) -> tuple[Role, int]:
    return block[0].item.role, block[0].item.first


def _joined(ways: Iterable[dict[int, Width]]) -> dict[int, Width]:
    return {layer: width for way in ways for layer, width in way.items()}
