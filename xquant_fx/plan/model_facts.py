"""Which model a plan was made for: a plan may carry it and is refused elsewhere.

The shape is compared wherever a model's config is at hand, the weights where the model itself is.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import nn

from xquant_fx.errors import ConfigError
from xquant_fx.plan.model_weights import Sample, sample_of, why_another
from xquant_fx.warn_once import warn_once

#: What to do about a refusal.
WAY_OUT = 'make a plan for this one, or take the plan for any: plan.for_any_model(), or delete "model" from its file'


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """Facts of a model; None where its config does not say."""

    model_type: str | None
    """The architecture's name in transformers."""
    layers: int | None
    """All layers of the decoder, not only those that are quantized."""
    hidden_size: int | None
    attention_heads: int | None
    kv_heads: int | None
    head_dim: int | None
    vocab_size: int | None
    weights: Sample | None = None
    """Some of its weights (``model_weights.py``); None: they are not compared."""

    @classmethod
    def of(cls, model: Any) -> ModelFacts:
        """Facts of a Hugging Face model, or of a config alone; of one with several parts, those of its text decoder."""
        is_model = isinstance(model, nn.Module)
        config = model.config if is_model else model
        decoder = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
        heads = getattr(decoder, "num_attention_heads", None)
        hidden = getattr(decoder, "hidden_size", None)
        derived = hidden // heads if isinstance(heads, int) and heads and isinstance(hidden, int) else None
        return cls(
            model_type=getattr(decoder, "model_type", None), layers=getattr(decoder, "num_hidden_layers", None),
            hidden_size=hidden, attention_heads=heads,
            kv_heads=getattr(decoder, "num_key_value_heads", None) or heads,
            head_dim=getattr(decoder, "head_dim", None) or derived, vocab_size=getattr(decoder, "vocab_size", None),
            weights=sample_of(model) if is_model else None,
        )  # fmt: skip

    @classmethod
    def from_dict(cls, fields: Any) -> ModelFacts:
        """The facts that :meth:`to_dict` wrote.

        Raises:
            ConfigError: a field is missing or unknown.
        """
        names = {field.name for field in dataclasses.fields(cls)}
        given = {"weights": None, **fields} if isinstance(fields, dict) else {}
        if set(given) != names:
            found = sorted(fields) if isinstance(fields, dict) else fields
            raise ConfigError(f"the model of a plan must have the fields {sorted(names)}, got {found}")
        weights = given["weights"]
        return cls(**{**given, "weights": None if weights is None else _sample_from(weights)})

    def to_dict(self) -> dict[str, Any]:
        """The fields, as JSON can hold them."""
        weights = None if self.weights is None else {name: list(values) for name, values in self.weights}
        return {**dataclasses.asdict(self), "weights": weights}

    def check(self, model: Any) -> None:
        """Raise ConfigError unless ``model``, a Hugging Face model or its config alone, is the one with these facts.

        The message says what differs. A config says nothing of weights; weights that are not in memory are passed over
        with a warning.
        """
        other = ModelFacts.of(model)
        names = [field.name for field in dataclasses.fields(self) if field.name != "weights"]
        pairs = [(name, getattr(self, name), getattr(other, name)) for name in names]
        apart = [f"{name} {ours!r}, got {theirs!r}" for name, ours, theirs in pairs if ours != theirs]
        if apart:
            raise ConfigError(f"the plan was made for another model: it needs {'; '.join(apart)}; {WAY_OUT}")
        if self.weights is None or not isinstance(model, nn.Module):
            return
        if other.weights is None:
            warn_once("a plan's weights are not compared with the model's, which are not in memory")
            return
        reason = why_another(self.weights, other.weights)
        if reason:
            raise ConfigError(f"the plan was made for another model than this: {reason}; {WAY_OUT}")


def _sample_from(fields: Any) -> Sample:
    """Weights as :meth:`ModelFacts.to_dict` writes them."""
    lists = fields.values() if isinstance(fields, dict) and fields else [None]
    if not all(isinstance(each, list) and all(isinstance(x, int | float) for x in each) for each in lists):
        raise ConfigError(f"weights of the model of a plan must be lists of numbers by name, got {fields!r}")
    return tuple((str(name), tuple(map(float, values))) for name, values in fields.items())
