"""The presets: names for settings of :class:`XQuantConfig`. A new preset is a new row."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

_PLAIN: dict[str, Any] = dict(share_keys_from=None, share_values_from=None, eta_1bit=0.0, eta_2bit=0.0)
_PRESETS: dict[str, dict[str, Any]] = {
    "full": dict(_PLAIN, k_bits=16, v_bits=16),
    "kivi-4": dict(_PLAIN, k_bits=4, v_bits=4),
    "kivi-2": dict(_PLAIN, k_bits=2, v_bits=2),
    "asymkv-1.5": dict(_PLAIN, k_bits=2, v_bits=1),
    "xquant-paper": dict(shared_fit="minmax"),
    "xquant": dict(),
    "xquant-1bit": dict(k_bits=2, v_bits=2, share_keys_from=0, share_values_from=0),
}

#: Preset name to the fields that differ from the defaults; read-only.
PRESETS: Mapping[str, Mapping[str, Any]] = MappingProxyType({k: MappingProxyType(v) for k, v in _PRESETS.items()})
