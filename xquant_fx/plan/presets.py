"""The presets: names for settings of :class:`XQuantConfig`. A new preset is a new row."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

#: Range codes as in KIVI and XQuant: one window of 128 tokens, no attention sinks.
_RANGE: dict[str, Any] = dict(k_scheme="per_channel", v_scheme="per_token", residual_length=128, sink_tokens=0)
_KIVI: dict[str, Any] = dict(_RANGE, eta_1bit=0.0, eta_2bit=0.0)
_PRESETS: dict[str, dict[str, Any]] = {
    "full": dict(k_bits=16, v_bits=16),
    "xquant-2.7": dict(k_bits=3, v_bits=2),
    "xquant-2.2": dict(),
    "xquant-1.7": dict(k_bits=2, v_bits=1),
    "xquant-1.4": dict(k_bits=1.5, v_bits=1),
    "kivi-4": dict(_KIVI, k_bits=4, v_bits=4),
    "kivi-2": dict(_KIVI, k_bits=2, v_bits=2),
    "asymkv-1.5": dict(_KIVI, k_bits=2, v_bits=1),
    "xquant": dict(_RANGE, k_bits=2, v_bits=1, share_values_from=0.5),
    "xquant-paper": dict(_RANGE, k_bits=2, v_bits=1, share_values_from=0.5, shared_fit="minmax"),
    "xquant-1bit": dict(_RANGE, k_bits=2, v_bits=2, share_keys_from=0, share_values_from=0),
}

#: Preset name to the fields that differ from the defaults; read-only.
PRESETS: Mapping[str, Mapping[str, Any]] = MappingProxyType({k: MappingProxyType(v) for k, v in _PRESETS.items()})

#: Mean KL divergence, in nats per token, of next tokens on SmolLM2-135M-Instruct, as docs/quality.md measures it.
MEASURED_KL: Mapping[str, float] = MappingProxyType(
    {
        "xquant-2.7": 0.006, "xquant-2.2": 0.011, "xquant-1.7": 0.028, "xquant-1.4": 0.035, "kivi-4": 0.006,
        "kivi-2": 0.39, "asymkv-1.5": 1.52, "xquant": 0.52, "xquant-paper": 1.05, "xquant-1bit": 1.32,
    }
)  # fmt: skip
#: A preset that costs more than this there warns when it is used.
TOLERABLE_KL = 0.1
