"""What to quantize and how: :class:`XQuantConfig`; ``presets.py`` has its presets."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any, Literal

import torch

from xquant_fx.errors import ConfigError
from xquant_fx.kernels.layout import STEP_TOKENS
from xquant_fx.kernels.schemes import SCHEMES
from xquant_fx.plan.presets import PRESETS

SHARED_FITS = ("least_squares", "minmax")
#: Tokens or channels that a length may count at most: what lies above is a slip, and would be allocated.
LONGEST = 2**20
#: Least value of each length.
LENGTHS = {
    "k_group_size": 1, "v_group_size": 1, "residual_length": 1, "k_residual_length": 1, "v_residual_length": 1,
    "sink_tokens": 0, "rollback_tokens": STEP_TOKENS,
}  # fmt: skip
#: Those that may be left to others, or to the shape of the model.
MAY_BE_NONE = ("v_group_size", "residual_length", "k_residual_length", "v_residual_length")
#: Residual lengths of keys and values that nothing is said of,
EVEN_WINDOWS = {"key": 256, "value": 256}
#: and where :func:`xquant_fx.plan.plan.residual_lengths` finds that keys want more: as many bytes (docs/quality.md).
KEY_WINDOWS = {"key": 384, "value": 128}
#: Schemes of keys and values where none is named: of keys of 8 bits in some layer, and of less.
SCHEMES_OF_EIGHT, SCHEMES_OF_LESS = ("per_channel", "per_token"), ("per_channel_ranked", "per_token_rotated")

Bits = float | tuple[float, ...]
ShareFrom = int | float | None
Eta = float | Literal["auto"]


def plain_fields(settings: Any) -> dict[str, Any]:
    """The fields of a dataclass of settings as JSON can hold them: a dtype by its name."""
    fields = {field.name: getattr(settings, field.name) for field in dataclasses.fields(settings)}
    return {k: str(v).removeprefix("torch.") if isinstance(v, torch.dtype) else v for k, v in fields.items()}


def check_scale_dtype(dtype: Any, scheme: str, field: str) -> None:
    """Raise ConfigError unless ``scheme``, the value of ``field``, can store scales as ``dtype``."""
    allowed = SCHEMES[scheme].SCALE_DTYPES
    if dtype not in allowed:
        raise ConfigError(f"scale_dtype must be one of {allowed} ({field}={scheme!r}), got {dtype!r}")


def _plain(bits: Any) -> Any:
    """A whole number as an int, so that equal settings are written alike."""
    return int(bits) if isinstance(bits, float) and bits.is_integer() else bits


def _has_eight(bits: object) -> bool:
    return 8 in (bits if isinstance(bits, tuple | list) else (bits,))


@dataclasses.dataclass(frozen=True, kw_only=True)
class XQuantConfig:
    """Settings of a quantized KV cache. The defaults are the preset ``xquant-2.2``.

    Raises:
        ConfigError: a field breaks the rule stated beside it.
    """

    k_scheme: str = ""
    """How keys are quantized: "per_channel_ranked" (mixed widths by channel) or "per_channel" (XQuant, KIVI). If not
    given the first; but where a layer's keys have 8 bits, which have no ranks, the second, with values "per_token"."""
    v_scheme: str = ""
    """How values are quantized: "per_token_rotated" (Hadamard transform first; if not given, but for what ``k_scheme``
    says), "per_token" (XQuant, KIVI), or "per_token_folded": as the first, but the windows hold rotated values, and
    where a graph allows it the weights of the linear layers before and behind an attention rotate, in rotated copies
    that take their memory once more."""
    k_bits: Bits = 2
    """Bits of a stored key element, one number or one per layer: 1, 2, 3, 4 or 8; on average 1 to 4 in quarters
    where channels are ranked; 16: unquantized. The rotary part of keys beside a latent (DeepSeek) has 4 at least."""
    v_bits: Bits = 2
    """Bits of a stored value element, one number or one per layer: 1, 2, 3, 4 or 8; 16: unquantized."""
    k_token_norms: bool | None = None
    """Whether keys are divided by the norm of their token, over all KV heads of the layer, before they are quantized.
    Norms have 8 bits; only of "per_channel_ranked". None: where the scheme can."""
    share_keys_from: ShareFrom = None
    """First layer whose pair shares key codes: an index (int), a fraction of the depth (float), None. Only
    "per_channel" and "per_token" codes can be shared."""
    share_values_from: ShareFrom = None
    """First layer whose pair shares value codes, as ``share_keys_from``."""
    shared_fit: Literal["least_squares", "minmax"] = "least_squares"
    """How the upper layer of a pair gets its scales and zero points for the codes it borrows."""
    k_group_size: int = 128
    """Tokens that share one key scale (keys are quantized per channel)."""
    v_group_size: int | None = None
    """Channels that share one value scale (values are quantized per token); None: head_dim."""
    residual_length: int | None = None
    """Latest tokens kept in full precision, R of XQuant, of keys and values both. Of values these are the latest R; of
    keys the latest 0 to R - 1 ("per_channel": R are quantized at once) or R - ``k_group_size`` to R - 1
    ("per_channel_ranked"). None: 256; but where nothing is said of either side, channels are ranked and values,
    rotated, have as many bits as keys or more, 384 for keys and 128 for values."""
    k_residual_length: int | None = None
    """R of keys alone, a multiple of ``k_group_size``; None: ``residual_length``."""
    v_residual_length: int | None = None
    """R of values alone; None: ``residual_length``."""
    eta_1bit: Eta = 1 / 6
    """Relaxation of both ends of the range at 1 bit, in [0, 0.5) (XQuant, Eq. 5); "per_channel" and "per_token". Or
    "auto": what the size of the group asks for (kernels/relaxation.py), values without bias, keys as they spread."""
    eta_2bit: Eta = 0.045
    """The same at 2 bits."""
    sink_tokens: int = 4
    """First tokens of every sequence kept in full precision for good (attention sinks)."""
    rollback_tokens: int = 20
    """Latest tokens that can be taken back exactly (``crop``, assisted decoding, prompt lookup), at least 8: the
    windows hold as many tokens more than ``residual_length``."""
    sliding_windows: bool | Literal["auto"] = "auto"
    """Whether an ``XQuantCache`` quantizes sliding windows. True: those longer than ``residual_length`` and
    ``rollback_tokens`` together. "auto": those of 4 residual lengths and more, which get less than half as large."""
    scale_dtype: torch.dtype | None = None
    """dtype of scales and zero points: of "per_channel" and "per_token" float16, bfloat16 or float32, of the other
    schemes uint8 (8-bit floats, kernels/small_floats.py) or float16. None: the one named first."""

    def __post_init__(self) -> None:
        for name in ("k_bits", "v_bits"):
            value = getattr(self, name)
            if isinstance(value, list):
                value = tuple(value)
            object.__setattr__(self, name, tuple(map(_plain, value)) if isinstance(value, tuple) else _plain(value))
        self._choose_schemes()
        self._check_bits("k_bits", "k_scheme")
        self._check_bits("v_bits", "v_scheme")
        self._check_share("share_keys_from")
        self._check_share("share_values_from")
        self._check_lengths()
        self._check_rest()

    @classmethod
    def preset(cls, name: str) -> XQuantConfig:
        """Return the preset called ``name``; :data:`PRESETS` maps the names to their fields."""
        if isinstance(name, str) and name == "auto":
            raise ConfigError(
                'preset "auto" is chosen on a model and has no fields of its own: use xquant_fx.auto_plan(model, '
                "bits=...), which returns a Plan, in the place of a config"
            )
        if not isinstance(name, str) or name not in PRESETS:
            raise ConfigError(f"preset must be one of {sorted(PRESETS)}, got {name!r}")
        return cls(**PRESETS[name])

    def replace(self, **changes: Any) -> XQuantConfig:
        """Return a copy with ``changes`` applied and validated."""
        _check_names(changes)
        as_if_not_named = (self.k_scheme, self.v_scheme) == SCHEMES_OF_LESS and "k_scheme" not in changes
        if as_if_not_named and _has_eight(changes.get("k_bits")):
            changes = {"k_scheme": "", "v_scheme": "", **changes}
        return dataclasses.replace(self, **changes)

    def to_json(self) -> str:
        """All fields as JSON; :meth:`from_json` reads it back."""
        return json.dumps(plain_fields(self))

    @classmethod
    def from_json(cls, text: str) -> XQuantConfig:
        """The config that :meth:`to_json` wrote; fields that it lacks are the defaults.

        Raises:
            ConfigError: the text is no config, or a field of it is unknown or breaks its rule.
        """
        try:
            fields = json.loads(text)
        except (json.JSONDecodeError, TypeError) as error:
            raise ConfigError(f"this is no config as XQuantConfig.to_json writes it: {error!r}") from error
        if not isinstance(fields, dict):
            raise ConfigError(f"a config is a JSON object of fields, got {type(fields).__name__}")
        _check_names(fields)
        if fields.get("scale_dtype") is not None:
            fields["scale_dtype"] = getattr(torch, str(fields["scale_dtype"]), fields["scale_dtype"])
        return cls(**fields)

    def _choose_schemes(self) -> None:
        """Fill in the schemes that are not given: of pairs that one kernel reads."""
        keys, values = SCHEMES_OF_EIGHT if _has_eight(self.k_bits) else SCHEMES_OF_LESS
        object.__setattr__(self, "k_scheme", keys if self.k_scheme == "" else self.k_scheme)
        object.__setattr__(self, "v_scheme", values if self.v_scheme == "" else self.v_scheme)

    def scheme(self, role: str) -> str:
        """Scheme of ``role`` ("key" or "value")."""
        return self.k_scheme if role == "key" else self.v_scheme

    def scales_of(self, role: str) -> torch.dtype:
        """dtype of the scales of ``role`` ("key" or "value")."""
        return self.scale_dtype or SCHEMES[self.scheme(role)].SCALE_DTYPES[0]

    def token_norms(self, role: str) -> bool:
        """Whether tokens of ``role`` ("key" or "value") are divided by their norms."""
        return role == "key" and self.k_token_norms is not False and SCHEMES[self.k_scheme].TOKEN_NORMS

    def given_residual(self, role: str) -> int | None:
        """Residual length of ``role`` ("key" or "value"), its own, else that of both; None: nothing is said of it."""
        own = self.k_residual_length if role == "key" else self.v_residual_length
        return self.residual_length if own is None else own

    def bits(self, role: str, layer: int, num_layers: int) -> float:
        """Bits of ``role`` ("key" or "value") of quantized layer ``layer`` out of ``num_layers``."""
        value = self.k_bits if role == "key" else self.v_bits
        if not isinstance(value, tuple):
            return value
        if len(value) != num_layers:
            field = "k_bits" if role == "key" else "v_bits"
            raise ConfigError(f"{field} must hold one number per layer: got {len(value)} for {num_layers} layers")
        return value[layer]

    def eta(self, scheme: str, bits: float) -> Eta:
        """Relaxation used by ``scheme`` at ``bits`` bits; 0 but for 1 and 2 bits. "auto": the group's size decides."""
        if not SCHEMES[scheme].RANGE_CODES:
            return 0.0
        return {1.0: self.eta_1bit, 2.0: self.eta_2bit}.get(bits, 0.0)

    def share_start(self, role: str, num_layers: int) -> int:
        """Number of the first layer whose pair shares; ``num_layers`` (none) where sharing is off."""
        value = self.share_keys_from if role == "key" else self.share_values_from
        if value is None:
            return num_layers
        return math.floor(value * num_layers) if isinstance(value, float) else value

    def _check_bits(self, name: str, scheme: str) -> None:
        value, chosen = getattr(self, name), getattr(self, scheme)
        if not isinstance(chosen, str) or chosen not in SCHEMES:
            raise ConfigError(f"{scheme} must be one of {sorted(SCHEMES)}, got {chosen!r}")
        allowed = (*SCHEMES[chosen].BITS, 16)
        for bits in value if isinstance(value, tuple) else (value,):
            if isinstance(bits, bool) or not isinstance(bits, int | float) or bits not in allowed:
                raise ConfigError(
                    f"{name} must be one of {allowed} ({scheme}={chosen!r}) or one of them per layer, got {value!r}"
                )
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
        if value > LONGEST:
            raise ConfigError(f"{name} must be a layer of the model, got {value!r}")

    def _check_lengths(self) -> None:
        for name, least in LENGTHS.items():
            value = getattr(self, name)
            if value is None and name in MAY_BE_NONE:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ConfigError(f"{name} must be an integer of at least {least}, got {value!r}")
            if value > LONGEST:
                raise ConfigError(f"{name} must be at most {LONGEST}, got {value!r}")
        of_keys = self.given_residual("key") or EVEN_WINDOWS["key"]
        if of_keys % self.k_group_size:
            name = "residual_length" if self.k_residual_length is None else "k_residual_length"
            raise ConfigError(f"{name} must be a multiple of k_group_size, got {of_keys} and {self.k_group_size}")

    def _check_rest(self) -> None:
        for name in ("eta_1bit", "eta_2bit"):
            value = getattr(self, name)
            known = isinstance(value, str) and value == "auto"
            if not known and (isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 0.5):
                raise ConfigError(f'{name} must be in [0, 0.5) or "auto", got {value!r}')
        if not isinstance(self.sliding_windows, bool) and self.sliding_windows != "auto":
            raise ConfigError(f'sliding_windows must be True, False or "auto", got {self.sliding_windows!r}')
        if not isinstance(self.shared_fit, str) or self.shared_fit not in SHARED_FITS:
            raise ConfigError(f"shared_fit must be one of {SHARED_FITS}, got {self.shared_fit!r}")
        if self.k_token_norms is not None and not isinstance(self.k_token_norms, bool):
            raise ConfigError(f"k_token_norms must be True, False or None, got {self.k_token_norms!r}")
        if self.k_token_norms and not SCHEMES[self.k_scheme].TOKEN_NORMS:
            able = sorted(name for name, scheme in SCHEMES.items() if scheme.TOKEN_NORMS)
            raise ConfigError(f"k_token_norms=True needs k_scheme to be one of {able}, got {self.k_scheme!r}")
        if self.scale_dtype is not None:
            for name in ("k_scheme", "v_scheme"):
                check_scale_dtype(self.scale_dtype, getattr(self, name), name)


def _check_names(fields: Any) -> None:
    names = {field.name for field in dataclasses.fields(XQuantConfig)}
    if unknown := sorted(map(repr, set(fields) - names)):
        raise ConfigError(f"a config has no fields {', '.join(unknown)}; it has {sorted(names)}")
