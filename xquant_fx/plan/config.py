"""What to quantize and how: :class:`XQuantConfig`; ``presets.py`` has its presets."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any, Literal

import torch

from xquant_fx.errors import ConfigError
from xquant_fx.kernels.packing import BITS
from xquant_fx.plan.presets import PRESETS

SHARED_FITS = ("least_squares", "minmax")
SCALE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)

Bits = int | tuple[int, ...]
ShareFrom = int | float | None


def plain_fields(settings: Any) -> dict[str, Any]:
    """The fields of a dataclass of settings as JSON can hold them: a dtype by its name."""
    fields = {field.name: getattr(settings, field.name) for field in dataclasses.fields(settings)}
    return {k: str(v).removeprefix("torch.") if isinstance(v, torch.dtype) else v for k, v in fields.items()}


@dataclasses.dataclass(frozen=True, kw_only=True)
class XQuantConfig:
    """Settings of a quantized KV cache. The defaults are the preset ``xquant``.

    Raises:
        ConfigError: a field breaks the rule stated beside it.
    """

    k_bits: Bits = 2
    """Bits of a stored key element: 1, 2, 4, 8 or 16 (16: unquantized); one number, or one per layer."""
    v_bits: Bits = 1
    """Bits of a stored value element, as ``k_bits``."""
    share_keys_from: ShareFrom = None
    """First layer whose pair shares key codes: an index (int), a fraction of the depth (float), None."""
    share_values_from: ShareFrom = 0.5
    """First layer whose pair shares value codes, as ``share_keys_from``."""
    shared_fit: Literal["least_squares", "minmax"] = "least_squares"
    """How the upper layer of a pair gets its scales and zero points for the codes it borrows."""
    k_group_size: int = 128
    """Tokens that share one key scale (keys are quantized per channel)."""
    v_group_size: int | None = None
    """Channels that share one value scale (values are quantized per token); None: head_dim."""
    residual_length: int = 128
    """Latest tokens kept in full precision, R of XQuant; a multiple of ``k_group_size``."""
    eta_1bit: float = 1 / 6
    """Relaxation of both ends of the range at 1 bit, in [0, 0.5) (XQuant, Eq. 5)."""
    eta_2bit: float = 0.045
    """Relaxation of both ends of the range at 2 bits, in [0, 0.5)."""
    sink_tokens: int = 0
    """First tokens of every sequence kept in full precision for good (attention sinks)."""
    scale_dtype: torch.dtype = torch.float16
    """dtype of stored scales and zero points: float16, bfloat16 or float32."""

    def __post_init__(self) -> None:
        for name in ("k_bits", "v_bits"):
            value = getattr(self, name)
            if isinstance(value, list):
                object.__setattr__(self, name, tuple(value))
            self._check_bits(name)
        self._check_share("share_keys_from")
        self._check_share("share_values_from")
        self._check_lengths()
        self._check_rest()

    @classmethod
    def preset(cls, name: str) -> XQuantConfig:
        """Return the preset called ``name``; :data:`PRESETS` maps the names to their fields."""
        if name not in PRESETS:
            raise ConfigError(f"preset must be one of {sorted(PRESETS)}, got {name!r}")
        return cls(**PRESETS[name])

    def replace(self, **changes: Any) -> XQuantConfig:
        """Return a copy with ``changes`` applied and validated."""
        return dataclasses.replace(self, **changes)

    def to_json(self) -> str:
        """All fields as JSON; :meth:`from_json` reads it back."""
        return json.dumps(plain_fields(self))

    @classmethod
    def from_json(cls, text: str) -> XQuantConfig:
        """The config that :meth:`to_json` wrote."""
        fields = json.loads(text)
        return cls(**{**fields, "scale_dtype": getattr(torch, fields["scale_dtype"])})

    def bits(self, role: str, layer: int, num_layers: int) -> int:
        """Bits of ``role`` ("key" or "value") of quantized layer ``layer`` out of ``num_layers``."""
        value = self.k_bits if role == "key" else self.v_bits
        if isinstance(value, int):
            return value
        if len(value) != num_layers:
            field = "k_bits" if role == "key" else "v_bits"
            raise ConfigError(f"{field} must hold one number per layer: got {len(value)} for {num_layers} layers")
        return value[layer]

    def eta(self, bits: int) -> float:
        """Relaxation used at ``bits`` bits; 0 but for 1 and 2 bits."""
        return {1: self.eta_1bit, 2: self.eta_2bit}.get(bits, 0.0)

    def share_start(self, role: str, num_layers: int) -> int:
        """Number of the first layer whose pair shares; ``num_layers`` (none) where sharing is off."""
        value = self.share_keys_from if role == "key" else self.share_values_from
        if value is None:
            return num_layers
        return math.floor(value * num_layers) if isinstance(value, float) else value

    def _check_bits(self, name: str) -> None:
        value = getattr(self, name)
        for bits in value if isinstance(value, tuple) else (value,):
            if isinstance(bits, bool) or not isinstance(bits, int) or bits not in BITS:
                raise ConfigError(f"{name} must be one of {BITS} or one of them per layer, got {value!r}")
        if value == ():
            raise ConfigError(f"{name} must hold one number per layer, got ()")

    def _check_share(self, name: str) -> None:
        value = getattr(self, name)
        if value is None:
            return
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ConfigError(f"{name} must be a layer index, a fraction of the depth or None, got {value!r}")
        if isinstance(value, float) and not 0.0 <= value <= 1.0:
            raise ConfigError(f"{name} as a fraction must be in [0, 1], got {value!r}")
        if value < 0:
            raise ConfigError(f"{name} must not be negative, got {value!r}")

    def _check_lengths(self) -> None:
        for name, least in (("k_group_size", 1), ("v_group_size", 1), ("residual_length", 1), ("sink_tokens", 0)):
            value = getattr(self, name)
            if name == "v_group_size" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ConfigError(f"{name} must be an integer of at least {least}, got {value!r}")
        if self.residual_length % self.k_group_size:
            raise ConfigError(
                "residual_length must be a multiple of k_group_size, got "
                f"{self.residual_length} and {self.k_group_size}"
            )

    def _check_rest(self) -> None:
        for name in ("eta_1bit", "eta_2bit"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not 0 <= value < 0.5:
                raise ConfigError(f"{name} must be in [0, 0.5), got {value!r}")
        if self.shared_fit not in SHARED_FITS:
            raise ConfigError(f"shared_fit must be one of {SHARED_FITS}, got {self.shared_fit!r}")
        if self.scale_dtype not in SCALE_DTYPES:
            raise ConfigError(f"scale_dtype must be one of {SCALE_DTYPES}, got {self.scale_dtype!r}")
