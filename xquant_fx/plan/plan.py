"""The plan of a cache: what each layer's keys and values are stored as, and why.

A plan is made once per cache, from a config and the number of layers. It knows nothing of batch, length or
shapes, so that it can be saved and given to any cache of the same model; ``bind`` joins one of its entries with
the shape of a buffer.

Layers are numbered 0, 1, 2 ... in layer order and paired (2i, 2i + 1), never shifted. A pair shares the codes of
a role when its upper layer is at or past ``share_*_from`` and both layers agree in bits, scheme, residual length and
geometry; otherwise each keeps its own codes, and the plan says why.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Iterator
from typing import Any, get_args

from xquant_fx.errors import ConfigError
from xquant_fx.kernels.schemes import SCHEMES
from xquant_fx.plan.buffer_plan import SHARED, BufferPlan
from xquant_fx.plan.config import EVEN_WINDOWS, KEY_WINDOWS, LONGEST, XQuantConfig
from xquant_fx.plan.model_facts import ModelFacts
from xquant_fx.plan.spec import Role


@dataclasses.dataclass(frozen=True)
class LayerPlan:
    """Keys and values of one layer."""

    key: BufferPlan
    value: BufferPlan

    def __iter__(self) -> Iterator[BufferPlan]:
        return iter((self.key, self.value))

    def of(self, role: str) -> BufferPlan:
        """The entry of ``role``, "key" or "value"."""
        return self.key if role == "key" else self.value


@dataclasses.dataclass(frozen=True)
class Plan:
    """What every quantized layer of a model stores; print it, compare it, save it, give it in the place of a config.

    Raises:
        ConfigError: an entry borrows from a layer that is not there or that differs from it.
    """

    layers: tuple[LayerPlan, ...]
    model: ModelFacts | None = None
    """What it was made for, where it was made for one model; it is refused for others."""

    def __deepcopy__(self, memo: object) -> Plan:
        """Itself, as it never changes."""
        return self

    def __post_init__(self) -> None:
        if not isinstance(self.layers, tuple) or not all(isinstance(layer, LayerPlan) for layer in self.layers):
            raise ConfigError(f"a plan's layers must be a tuple of LayerPlan, got {type(self.layers).__name__}")
        if not self.layers:
            raise ConfigError("a plan needs one layer at least, got none")
        for index, layer in enumerate(self.layers):
            for entry in layer:
                if not isinstance(entry, BufferPlan):
                    raise ConfigError(
                        f"layer {index}: keys and values must be a BufferPlan, got {type(entry).__name__}"
                    )
                self._check_partner(index, entry)

    def _check_partner(self, index: int, entry: BufferPlan) -> None:
        if entry.partner is None:
            return
        where = f"layer {index} {entry.role}s: "
        if index % 2 == 0 or entry.partner != index - 1:
            raise ConfigError(f"{where}only the upper layer of a pair may borrow, of the lower; got {entry.partner}")
        lower = self.layers[entry.partner].of(entry.role)
        agree = (lower.bits, lower.scheme) == (entry.bits, entry.scheme)
        if not agree or entry.bits == 16 or not SCHEMES[entry.scheme].RANGE_CODES:
            raise ConfigError(
                f"{where}layers that share codes must agree in bits below 16 and in a scheme that shares, "
                f"got {lower.scheme}, {lower.bits} and {entry.scheme}, {entry.bits}"
            )
        if lower.residual_length != entry.residual_length:  # scales are fitted to codes that must be there by then
            raise ConfigError(
                f"{where}layers that share codes must agree in residual_length, got {lower.residual_length} and "
                f"{entry.residual_length}"
            )

    @functools.lru_cache(maxsize=16)  # noqa: B019 - each new cache writes its own
    def to_json(self) -> str:
        """The plan as JSON; :meth:`from_json` reads it back."""
        layers = [{entry.role: entry.to_dict() for entry in layer} for layer in self.layers]
        model = {} if self.model is None else {"model": self.model.to_dict()}
        return json.dumps({"xquant_plan": 1, **model, "layers": layers}, indent=1)

    @classmethod
    @functools.lru_cache(maxsize=16)  # each new cache reads its own
    def from_json(cls, text: str) -> Plan:
        """The plan that :meth:`to_json` wrote.

        Raises:
            ConfigError: the text is no plan, or an entry of it breaks a rule.
        """
        try:
            data = json.loads(text)
            layers = data["layers"]
            version = data["xquant_plan"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ConfigError(f"this is no plan as Plan.to_json writes it: {error!r}") from error
        if version != 1:
            raise ConfigError(f"a plan of version {version!r} was written by another xquant_fx; this one reads 1")
        if not isinstance(layers, list):
            raise ConfigError(f"the layers of a plan must be a list, got {type(layers).__name__}")
        model = ModelFacts.from_dict(data["model"]) if data.get("model") is not None else None
        return cls(tuple(_layer_from(layer, i) for i, layer in enumerate(layers)), model)

    def check_model(self, model: Any) -> None:
        """Raise ConfigError where the plan says what it was made for, and the Hugging Face ``model`` is another.

        Given its config alone, shapes are compared; given the model, some of its weights, too.
        """
        if self.model is not None:
            self.model.check(model)

    def for_any_model(self) -> Plan:
        """The same plan, which no model of as many layers is refused by."""
        return dataclasses.replace(self, model=None)

    def __str__(self) -> str:
        from xquant_fx.tables import render

        columns = ["layer", "role", "scheme", "bits", "group", "norms", "eta", "window", "sinks", "codes of", "why"]
        rows = [
            [
                str(index), f"{e.role}s", e.scheme, str(e.bits), str(e.group_size or "head_dim"),
                "yes" if e.token_norms else "-", e.eta_text, str(e.residual_length), str(e.sink_tokens),
                "-" if e.partner is None else str(e.partner), e.reason,
            ]
            for index, layer in enumerate(self.layers)
            for e in layer
        ]  # fmt: skip
        return render("xquant plan", columns, rows)


def _layer_from(layer: Any, index: int) -> LayerPlan:
    fields = layer if isinstance(layer, dict) else {}
    return LayerPlan(*(BufferPlan.from_dict(fields.get(role), f"layer {index} {role}s") for role in get_args(Role)))


def make_plan(settings: XQuantConfig | Plan, num_layers: int) -> Plan:
    """The plan of a model with ``num_layers`` quantized layers; a plan is returned as it is.

    Raises:
        ConfigError: a plan, or bits given per layer, are for another number of layers.
    """
    if not isinstance(settings, XQuantConfig | Plan):
        raise ConfigError(f"settings must be an XQuantConfig or a Plan, got {type(settings).__name__}")
    if isinstance(num_layers, bool) or not isinstance(num_layers, int) or not 1 <= num_layers <= LONGEST:
        raise ConfigError(f"num_layers must be an integer of at least 1, got {num_layers!r}")
    if isinstance(settings, Plan):
        if len(settings.layers) != num_layers:
            raise ConfigError(f"the plan is for {len(settings.layers)} quantized layers, the model has {num_layers}")
        return settings
    return _made(settings, num_layers)


@functools.lru_cache(maxsize=16)  # for each new cache
def _made(settings: XQuantConfig, num_layers: int) -> Plan:
    layers: list[LayerPlan] = []
    for layer in range(num_layers):
        entries = (_entry(settings, role, layer, num_layers, layers) for role in get_args(Role))
        layers.append(with_windows(LayerPlan(*entries), settings))
    return Plan(tuple(layers))


def with_windows(layer: LayerPlan, config: XQuantConfig) -> LayerPlan:
    """``layer`` with the residual lengths that ``config`` gives it, or that its schemes and bits ask for."""
    given = {role: config.given_residual(role) for role in get_args(Role)}
    free = not any(given.values())
    usual = KEY_WINDOWS if free and _keys_want_more(layer, config.k_group_size) else EVEN_WINDOWS
    entries = (dataclasses.replace(e, residual_length=given[e.role] or usual[e.role]) for e in layer)
    return LayerPlan(*entries)


def _keys_want_more(layer: LayerPlan, k_group: int) -> bool:
    """Whether longer windows of keys pay, at the cost of those of values (docs/quality.md): not where values are the
    weaker side."""
    values = ("per_token_rotated", "per_token_folded")
    return (
        layer.key.scheme == "per_channel_ranked"
        and layer.value.scheme in values
        and layer.key.bits <= layer.value.bits < 16
        and KEY_WINDOWS["key"] % k_group == 0
    )


def _entry(config: XQuantConfig, role: Role, layer: int, num_layers: int, below: list[LayerPlan]) -> BufferPlan:
    bits = config.bits(role, layer, num_layers)
    entry = BufferPlan(
        role=role, scheme=config.scheme(role), bits=bits,
        group_size=config.k_group_size if role == "key" else config.v_group_size,
        residual_length=config.given_residual(role) or EVEN_WINDOWS[role], eta=config.eta(config.scheme(role), bits),
        sink_tokens=config.sink_tokens, rollback_tokens=config.rollback_tokens, scale_dtype=config.scales_of(role),
        token_norms=config.token_norms(role) and bits < 16, fit=config.shared_fit,
    )  # fmt: skip
    reason = _why_own(entry, config, layer, num_layers, below)
    if reason:
        return dataclasses.replace(entry, reason=reason)
    return dataclasses.replace(entry, partner=layer - 1, reason=SHARED)


def _why_own(entry: BufferPlan, config: XQuantConfig, layer: int, num_layers: int, below: list[LayerPlan]) -> str:
    if layer % 2 == 0:
        return "lower layer of its pair" if layer + 1 < num_layers else "the last layer has no partner"
    start = config.share_start(entry.role, num_layers)
    if layer < start:
        field = "share_keys_from" if entry.role == "key" else "share_values_from"
        return f"{field} starts sharing at layer {start}" if start < num_layers else "sharing is off"
    lower = below[layer - 1].of(entry.role)
    if 16 in (entry.bits, lower.bits):
        return "16-bit storage has no codes to share"
    if not SCHEMES[entry.scheme].RANGE_CODES:
        return f"codes stored {entry.scheme.replace('_', ' ')} cannot be shared"
    if entry.bits != lower.bits:
        return f"layers {layer - 1} and {layer} differ in bits: {lower.bits} and {entry.bits}"
    return ""
