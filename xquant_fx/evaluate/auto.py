"""``auto_plan``: the widths of each layer's keys and values, chosen on a model for a budget of bits or of quality."""

from __future__ import annotations

import math
from typing import Any, get_args

import torch
from torch import Tensor
from tqdm import tqdm

from xquant_fx.cache.allocate import Geometry, bind_all
from xquant_fx.errors import ArgumentError, ConfigError
from xquant_fx.evaluate.allocation import Choice, Option, best_within, cheapest_within, pareto_choices
from xquant_fx.evaluate.auto_report import AutoReport, Group
from xquant_fx.evaluate.calibration import Windows, calibration_ids
from xquant_fx.evaluate.models import title
from xquant_fx.evaluate.sensitivity import Item, Probe, items_of, measured_losses
from xquant_fx.evaluate.size import growth, true_bits
from xquant_fx.plan.config import XQuantConfig
from xquant_fx.plan.plan import Plan
from xquant_fx.plan.spec import KVSpec, Role


def auto_plan(
    model: Any,
    *,
    bits: float | None = None,
    max_kl: float | None = None,
    text: str | Tensor | None = None,
    tokenizer: Any = None,
    config: XQuantConfig | None = None,
    verbose: bool = True,
) -> Plan:
    """The plan that :func:`auto_report` finds; its arguments and errors are the same.

    ``verbose`` shows a bar, then prints what was chosen, the KL predicted and the KL measured.
    """
    given: dict[str, Any] = dict(bits=bits, max_kl=max_kl, text=text, tokenizer=tokenizer, config=config)
    report = auto_report(model, **given, progress=verbose)
    if verbose:
        print(report)
    return report.plan


@torch.no_grad()
def auto_report(
    model: Any,
    *,
    bits: float | None = None,
    max_kl: float | None = None,
    text: str | Tensor | None = None,
    tokenizer: Any = None,
    config: XQuantConfig | None = None,
    progress: bool = False,
) -> AutoReport:
    """Measure what each group of layers loses at each width, choose widths by it, and measure the choice.

    The same model, text and arguments give the same plan. No layers share codes: that was never free where it was
    measured, and the default schemes cannot.

    Args:
        model: a Hugging Face model in eval mode; its full-attention layers are quantized.
        bits: most true bits per element, as reports count them (codes, scales and zero points): the plan of least KL.
        max_kl: largest mean KL in nats on the text: the plan of fewest true bits. Give this or ``bits``.
        text: what to measure on: a text; token ids, int64 [windows, T]; "sampled": what the model writes; None: a
            built-in text, prose and code. A text is read in 8 windows of up to 1,216 tokens.
        tokenizer: for a text; None: the one that lies where the model came from.
        config: all but bits and sharing: schemes, groups, residual window, sinks; default: ``XQuantConfig()``.
        progress: show a bar.

    Raises:
        ArgumentError: not one of ``bits`` and ``max_kl``; no plan meets it (the message says what is the least); or the
            text cannot be read.
        ConfigError: ``config`` leaves nothing to quantize in the windows, or the model has no full attention.
    """
    _check_goal(bits, max_kl)
    if config is not None and not isinstance(config, XQuantConfig):
        raise ArgumentError(f"config must be an XQuantConfig, whose bits are chosen anew, got {type(config).__name__}")
    windows = Windows.for_model(model.config)
    ids = calibration_ids(model, text, tokenizer, windows)
    prompt = ids.shape[1] - min(windows.tokens - windows.prompt, ids.shape[1] // 2)
    probe = Probe(model, ids, prompt, windows.stride, config or XQuantConfig())
    search = _Search(probe, progress)
    choice, measured = search.within(bits) if bits is not None else search.down_to(float(max_kl or 0))
    return search.report(choice, measured, f"{title(model)}: {len(ids)} window(s) of {ids.shape[1]:,} tokens")


def _check_goal(bits: float | None, max_kl: float | None) -> None:
    if (bits is None) == (max_kl is None):
        raise ArgumentError(f"a plan is chosen for bits or for max_kl, one of the two; got {bits!r} and {max_kl!r}")
    for name, value in (("bits", bits), ("max_kl", max_kl)):
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if value is not None and not (is_number and 0 < value < math.inf):
            raise ArgumentError(f"{name} must be a positive number, got {value!r}")


class _Search:
    """The choices that a model leaves, and what was measured of them."""

    def __init__(self, probe: Probe, progress: bool) -> None:
        self.probe, self.items = probe, items_of(probe.layers)
        losses = tqdm(measured_losses(probe, self.items), total=len(self.items), desc="layers", disable=not progress)
        options = [self._options(item, loss) for item, loss in losses]
        self.options = options
        self.front = pareto_choices(options)
        self.cost_of_bit = self.front[0].cost / true_bits(self._specs(self.plan(self.front[0])))
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
                f"max_kl must be at least {self.measured[best]:.6f} nats, the least that was found (at "
                f"{self.true_bits(best):.3f} true bits), got {max_kl!r}"
            )
        return self.front[high], self.measured[self.front[high]]

    def measure(self, choice: Choice) -> float:
        """Mean KL in nats of a choice."""
        self.measured[choice] = self.probe.loss(self.plan(choice))
        return self.measured[choice]

    def plan(self, choice: Choice) -> Plan:
        """The plan that a choice stands for."""
        bits = {
            (item.role, layer): options[pick].bits
            for item, options, pick in zip(self.items, self.options, choice.picks, strict=True)
            for layer in item.layers
        }
        return self.probe.plan(lambda role, layer: bits[role, layer])

    def true_bits(self, choice: Choice) -> float:
        """True bits per element of a choice."""
        return choice.cost / self.cost_of_bit

    def report(self, choice: Choice, measured: float, heading: str) -> AutoReport:
        """What was chosen, for people."""
        groups = [
            Group(item.role, item.first, item.last, options[pick].bits, options[pick].loss,
                  {option.bits: option.loss for option in options})
            for item, options, pick in zip(self.items, self.options, choice.picks, strict=True)
        ]  # fmt: skip
        return AutoReport(heading, self.plan(choice), self.true_bits(choice), choice.loss, measured, groups)

    def _options(self, item: Item, losses: dict[float, float]) -> list[Option]:
        if not losses:
            raise ConfigError(f"no width fills whole words for the {item.role}s of layers {item.first} to {item.last}")
        return [Option(bits, self._cost(item, bits), loss) for bits, loss in losses.items()]

    def _cost(self, item: Item, bits: float) -> int:
        """Bits that the item's buffers grow by, from one long text to another."""
        plan = self.probe.plan(lambda role, layer: bits if role == item.role else 16)
        specs = self._specs(plan)
        costs = zip(specs, growth(specs), strict=True)
        return sum(cost for spec, cost in costs if spec.role == item.role and spec.layer in item.layers)

    def _specs(self, plan: Plan) -> list[KVSpec]:
        roles: tuple[Role, ...] = get_args(Role)
        buffers = [
            (layer, role, Geometry(self.probe.shape(layer, role), torch.bfloat16))
            for layer in range(self.probe.layers)
            for role in roles
        ]
        return bind_all(plan, buffers)
