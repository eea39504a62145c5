"""A model with windows of text: what any plan loses on them, and what it takes.

A pass begins at the lowest layer that is quantized (``replay.py``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor

from xquant_fx.cache.allocate import Geometry, bind_all
from xquant_fx.cache.huggingface import XQuantCache
from xquant_fx.errors import ArgumentError, ConfigError
from xquant_fx.evaluate.replay import Noted
from xquant_fx.evaluate.simulate import Prefilled, check_attention, reference_logits, simulated_logits
from xquant_fx.evaluate.size import growth
from xquant_fx.kernels.schemes import SCHEMES
from xquant_fx.plan.config import XQuantConfig
from xquant_fx.plan.model_facts import ModelFacts
from xquant_fx.plan.plan import LayerPlan, Plan, make_plan, with_windows
from xquant_fx.plan.spec import KVSpec, Role

FULL = 16
#: What stores the codes that a pair shares, where the config's own schemes cannot.
SHARING_SCHEMES: dict[Role, str] = {"key": "per_channel", "value": "per_token"}


class Width(NamedTuple):
    """How one side of a layer is stored."""

    bits: float
    """Of a stored element, an average where widths are mixed; FULL: as it is."""
    shared: bool = False
    """Whether the layer's pair has the codes of its lower layer, by a scheme that shares."""

    def __str__(self) -> str:
        return f"{self.bits:g}{' shared' if self.shared else ''}"


#: The width of a side of a layer, counted over quantized ones.
Widths = Callable[[Role, int], Width]


class Probe:
    """A model with windows of text that were read in full precision.

    Raises:
        ArgumentError: the model's attention cannot be exchanged, or does what the simulation does not know.
        ConfigError: the windows are too short for anything to be quantized in them.
    """

    def __init__(self, model: Any, ids: Tensor, prompt: int, stride: int, base: XQuantConfig) -> None:
        self.model, self.base = model, base.replace(share_keys_from=None, share_values_from=None)
        longest = max(entry.residual_length for entry in make_plan(base.replace(k_bits=2, v_bits=2), 1).layers[0])
        if prompt <= longest + base.sink_tokens:
            raise ConfigError(
                f"residual_length and sink_tokens must leave something to quantize of a prompt of {prompt} tokens, got "
                f"{longest} and {base.sink_tokens}: give a config of smaller ones"
            )
        self.uniform: dict[tuple[Role, Width], Plan] = {}
        self.places, self.facts = _places(model, base), ModelFacts.of(model)
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

    def plan(self, widths: Widths) -> Plan:
        """The plan that gives ``widths(role, layer)`` to each quantized layer of this model."""
        layers = (
            LayerPlan(*(self._uniform(role, widths(role, n)).layers[n].of(role) for role in get_args(Role)))
            for n in range(self.layers)
        )
        return Plan(tuple(with_windows(layer, self.base) for layer in layers), self.facts)

    def alone(self, role: Role, widths: Mapping[int, Width]) -> Plan:
        """The plan that gives ``widths`` to one side of layers, by their number, and leaves all else as it is."""
        return self.plan(lambda r, layer: widths.get(layer, Width(FULL)) if r == role else Width(FULL))

    def losses(self, plan: Plan, first: int = 0) -> Tensor:
        """Mean KL in nats of each window, float64 [windows]; ``plan`` leaves quantized layers below ``first`` alone.

        Raises:
            ArgumentError: one is no number: the model overflows.
        """
        with torch.no_grad(), self.noted.from_layer(self.places[first]):
            logits, _ = simulated_logits(self.window, self.keep, plan, lean=True)
        # Window by window, for distributions over a vocabulary are large; in fp32, which is off by 1e-7 nats.
        kl = [_kl(p, q.float().log_softmax(-1)) for p, q in zip(self.log_p, logits, strict=True)]
        if not math.isfinite(sum(kl)):
            raise ArgumentError(
                f"the KL of a quantized cache must be a finite number of nats, got {sum(kl)} in {logits.dtype}"
            )
        return torch.tensor(kl, dtype=torch.float64)

    def loss(self, plan: Plan, first: int = 0) -> float:
        """Mean of :meth:`losses`."""
        return float(self.losses(plan, first).mean())

    def specs(self, plan: Plan) -> list[KVSpec]:
        """Specs of keys and values of all layers; codes that a pair cannot share after all are said to be its own."""
        buffers: list[tuple[int, Role, Geometry]] = [
            (layer, role, Geometry(self.shape(layer, role), torch.bfloat16))
            for layer in range(self.layers)
            for role in get_args(Role)
        ]
        return bind_all(plan, buffers)

    def cost(self, role: Role, widths: Mapping[int, Width]) -> int:
        """Bits that one side of layers grows by at ``widths``, from one long text to another."""
        specs = self.specs(self.alone(role, widths))
        costs = zip(specs, growth(specs), strict=True)
        return sum(cost for spec, cost in costs if spec.role == role and spec.layer in widths)

    def _uniform(self, role: Role, width: Width) -> Plan:
        """The plan that gives ``width`` to one side of all layers."""
        if (role, width) not in self.uniform:
            fields: dict[str, Any] = {f"{role[0]}_bits": width.bits}
            if width.shared:
                fields[f"share_{role}s_from"] = 0
                if not SCHEMES[self.base.scheme(role)].RANGE_CODES:
                    fields |= {f"{role[0]}_scheme": SHARING_SCHEMES[role], "eta_1bit": "auto", "eta_2bit": "auto"}
                    fields |= {"k_token_norms": None} if role == "key" else {}
            self.uniform[role, width] = make_plan(self.base.replace(**fields), self.layers)
        return self.uniform[role, width]

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
