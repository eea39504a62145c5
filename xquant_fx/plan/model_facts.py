"""Which model a plan was made for, as far as a model's config tells: a plan may carry it and is refused elsewhere."""

from __future__ import annotations

import dataclasses
from typing import Any

from xquant_fx.errors import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """Facts of an architecture; None where a config does not say.

    Two models of one architecture, a model and its fine-tuned version, are not told apart.
    """

    model_type: str | None
    """The architecture's name in transformers."""
    layers: int | None
    """All layers of the decoder, not only those that are quantized."""
    hidden_size: int | None
    attention_heads: int | None
    kv_heads: int | None
    head_dim: int | None
    vocab_size: int | None

    @classmethod
    def of(cls, config: Any) -> ModelFacts:
        """Facts of a Hugging Face config; of one with several parts, those of its text decoder."""
        decoder = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
        heads = getattr(decoder, "num_attention_heads", None)
        hidden = getattr(decoder, "hidden_size", None)
        derived = hidden // heads if isinstance(heads, int) and heads and isinstance(hidden, int) else None
        return cls(
            model_type=getattr(decoder, "model_type", None), layers=getattr(decoder, "num_hidden_layers", None),
            hidden_size=hidden, attention_heads=heads,
            kv_heads=getattr(decoder, "num_key_value_heads", None) or heads,
            head_dim=getattr(decoder, "head_dim", None) or derived, vocab_size=getattr(decoder, "vocab_size", None),
        )  # fmt: skip

    @classmethod
    def from_dict(cls, fields: Any) -> ModelFacts:
        """The facts that ``dataclasses.asdict`` wrote.

        Raises:
            ConfigError: a field is missing or unknown.
        """
        names = {field.name for field in dataclasses.fields(cls)}
        if not isinstance(fields, dict) or set(fields) != names:
            found = sorted(fields) if isinstance(fields, dict) else fields
            raise ConfigError(f"the model of a plan must have the fields {sorted(names)}, got {found}")
        return cls(**fields)

    def check(self, config: Any) -> None:
        """Raise ConfigError unless ``config`` is of a model with these facts; the message lists what differs."""
        other = ModelFacts.of(config)
        names = [field.name for field in dataclasses.fields(self)]
        pairs = [(name, getattr(self, name), getattr(other, name)) for name in names]
        apart = [f"{name} {ours!r}, got {theirs!r}" for name, ours, theirs in pairs if ours != theirs]
        if apart:
            raise ConfigError(f"the plan was made for another model: it needs {'; '.join(apart)}")
