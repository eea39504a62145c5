"""What each group of layers, and each side of it, costs in quality at each width, everything else in full precision.

Small errors of independent sources add up in KL, so these losses, summed over groups and sides, predict that of a whole
plan. A pass begins at the group that is quantized (``replay.py``). Only some widths are measured; between and beyond
them the logarithm of the loss follows that of a quantizer's distortion (``kernels/widths.py``).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any, get_args

import torch
from torch import Tensor

from xquant_fx.cache.huggingface import XQuantCache
from xquant_fx.errors import ArgumentError, ConfigError
from xquant_fx.evaluate.replay import Noted
from xquant_fx.evaluate.simulate import Prefilled, check_attention, reference_logits, simulated_logits
from xquant_fx.kernels.packing import WORD_BITS
from xquant_fx.kernels.schemes import SCHEMES
from xquant_fx.kernels.widths import DISTORTION
from xquant_fx.plan.config import XQuantConfig
from xquant_fx.plan.model_facts import ModelFacts
from xquant_fx.plan.plan import Plan, make_plan
from xquant_fx.plan.spec import Role

#: Most groups of layers: 10 groups of 3 for a model of 30.
GROUPS = 10
#: Widths that an allocation may use, where a scheme and head_dim allow them.
WIDTHS = (1, 1.5, 2, 2.5, 3, 4)
#: Of those the ones that are measured; the others are derived.
MEASURED: dict[Role, tuple[float, ...]] = {"key": (1, 2, 3), "value": (1, 2)}
#: No loss is taken for less, in nats: what rounding makes.
LEAST = 1e-9

FULL = 16


@dataclasses.dataclass(frozen=True)
class Item:
    """One side of some neighbouring layers, which get one width."""

    role: Role
    first: int
    """Number of the lowest layer, over quantized ones."""
    last: int
    """Of the highest, included."""

    @property
    def layers(self) -> range:
        """Numbers of the layers."""
        return range(self.first, self.last + 1)


def items_of(layers: int) -> list[Item]:
    """Both sides of ``GROUPS`` groups of equal size, as near as that goes, lowest layers first."""
    count = min(GROUPS, layers)
    edges = [layers * i // count for i in range(count + 1)]
    groups = [(edges[i], edges[i + 1] - 1) for i in range(count)]
    return [Item(role, *group) for group in groups for role in get_args(Role)]


def widths_of(role: Role, scheme: str, dim: int) -> tuple[float, ...]:
    """Widths of ``WIDTHS`` that ``scheme`` stores at head_dim ``dim`` without padding in its words."""
    allowed = [bits for bits in WIDTHS if bits in SCHEMES[scheme].BITS]
    return tuple(b for b in allowed if role == "value" or scheme != "per_channel_ranked" or b * dim % WORD_BITS == 0)


def distortion(bits: float) -> float:
    """Mean squared error of a quantizer of ``bits`` bits on a unit Gaussian; between whole bits by its logarithm."""
    low = math.floor(bits)
    return math.exp(_line(bits, low, math.log(DISTORTION[low]), low + 1, math.log(DISTORTION[low + 1])))


def filled_in(measured: dict[float, float], widths: tuple[float, ...]) -> dict[float, float]:
    """Loss of each of ``widths``, falling, from those that were ``measured`` (one at least)."""
    known = sorted(measured)
    found: dict[float, float] = {}
    least = math.inf
    for bits in sorted(widths):
        below = [b for b in known if b <= bits] or known[:1]
        above = [b for b in known if b >= bits] or known[-1:]
        least = min(least, _between(bits, below[-1], above[0], measured))
        found[bits] = least
    return found


def _between(bits: float, low: float, high: float, measured: dict[float, float]) -> float:
    if low == high:
        return measured[low] * distortion(bits) / distortion(low)
    a, b = (math.log(max(measured[each], LEAST)) for each in (low, high))
    x, x0, x1 = (math.log(distortion(each)) for each in (bits, low, high))
    return math.exp(_line(x, x0, a, x1, b))


def _line(x: float, x0: float, y0: float, x1: float, y1: float) -> float:
    return y0 + (y1 - y0) * (x - x0) / (x1 - x0)


class Probe:
    """A model with windows of text that were read in full precision: the KL of any plan, and of one item alone.

    Raises:
        ArgumentError: the model's attention cannot be exchanged, or does what the simulation does not know.
        ConfigError: the windows are too short for anything to be quantized in them.
    """

    def __init__(self, model: Any, ids: Tensor, prompt: int, stride: int, base: XQuantConfig) -> None:
        self.model, self.base = model, base.replace(share_keys_from=None, share_values_from=None)
        if prompt <= base.residual_length + base.sink_tokens:
            raise ConfigError(
                f"residual_length and sink_tokens must leave something to quantize of a prompt of {prompt} tokens, got "
                f"{base.residual_length} and {base.sink_tokens}: give a config of smaller ones"
            )
        self.places = _places(model, base)
        self.window = Prefilled.of(model, ids, prompt)
        self.keep = torch.arange(prompt, ids.shape[1] - 1, stride, device=ids.device)
        self.noted = Noted(model)
        with self.noted.noting():
            full = reference_logits(self.window, self.keep)
        self._check(full)
        self.log_p = full.float().log_softmax(-1)

    @property
    def layers(self) -> int:
        """Number of quantized layers."""
        return len(self.places)

    def shape(self, layer: int, role: Role) -> tuple[int, ...]:
        """[1, H, 1, D] of the keys or values of a quantized layer."""
        stored = self.window.cache.layers[self.places[layer]]
        x = stored.keys if role == "key" else stored.values
        return (1, x.shape[1], 1, x.shape[3])

    def plan(self, bits: Callable[[Role, int], float]) -> Plan:
        """The plan that gives ``bits(role, layer)`` to each quantized layer of this model."""
        keys, values = (tuple(bits(role, layer) for layer in range(self.layers)) for role in get_args(Role))
        plan = make_plan(self.base.replace(k_bits=keys, v_bits=values), self.layers)
        return dataclasses.replace(plan, model=ModelFacts.of(self.model.config))

    def loss(self, plan: Plan, first: int = 0) -> float:
        """Mean KL in nats, over all windows, of ``plan``, which leaves quantized layers below ``first`` as they are.

        Raises:
            ArgumentError: it is no number: the model overflows.
        """
        with torch.no_grad(), self.noted.from_layer(self.places[first]):
            logits, _ = simulated_logits(self.window, self.keep, plan, lean=True)
        kl = self._kl(logits)
        if not math.isfinite(kl):
            raise ArgumentError(
                f"the KL of a quantized cache must be a finite number of nats, got {kl} in {logits.dtype}"
            )
        return kl

    def item_loss(self, item: Item, bits: float) -> float:
        """Mean KL in nats with ``item`` at ``bits`` and all else in full precision."""
        chosen = self.plan(lambda role, layer: bits if role == item.role and layer in item.layers else FULL)
        return self.loss(chosen, item.first)

    def item_widths(self, item: Item) -> tuple[float, ...]:
        """Widths that ``item`` may have, rising."""
        every = (widths_of(item.role, self.base.scheme(item.role), self.shape(n, item.role)[3]) for n in item.layers)
        return tuple(sorted(set.intersection(*map(set, every))))

    def _kl(self, logits: Tensor) -> float:
        # Window by window, for distributions over a vocabulary are large; in fp32, which is off by 1e-7 nats.
        each = (_kl(p, q.float().log_softmax(-1)) for p, q in zip(self.log_p, logits, strict=True))
        return sum(each) / len(logits)

    def _check(self, full: Tensor) -> None:
        check_attention(self.window, self.keep[:32], full[:, :32])
        with self.noted.from_layer(len(self.noted.layers)):
            again = reference_logits(self.window, self.keep)
        if not torch.equal(again, full):
            self.noted.forget()


def _kl(log_p: Tensor, log_q: Tensor) -> float:
    """Mean KL in nats over positions of log probabilities [n, V]."""
    difference = torch.where(log_p == -torch.inf, 0.0, log_p.exp() * (log_p - log_q))
    return difference.sum(-1, dtype=torch.float64).mean().item()


def _places(model: Any, base: XQuantConfig) -> list[int]:
    """Index among all layers of each one that is quantized."""
    cache = XQuantCache(model.config, max_cache_len=1, config=base.replace(k_bits=FULL, v_bits=FULL))
    if not cache.quantized_layers:
        raise ConfigError(f"a plan needs a layer of full attention, and {type(model).__name__} has none")
    return [cache.layers.index(layer) for layer in cache.quantized_layers]


def measured_losses(probe: Probe, items: list[Item]) -> Iterator[tuple[Item, dict[float, float]]]:
    """Each of ``items`` with the loss of each width that it may have, one item after the other."""
    for item in items:
        widths = probe.item_widths(item)
        chosen = [b for b in MEASURED[item.role] if b in widths] or list(widths[:1])
        yield item, filled_in({bits: probe.item_loss(item, bits) for bits in chosen}, widths)
