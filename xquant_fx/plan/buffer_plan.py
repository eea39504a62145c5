"""What the keys, or the values, of one layer are stored as: an entry of a plan."""

from __future__ import annotations

import dataclasses
from typing import Any, get_args

import torch

from xquant_fx.errors import ConfigError
from xquant_fx.kernels.layout import STEP_TOKENS
from xquant_fx.kernels.relaxation import spread_eta, unbiased_eta
from xquant_fx.kernels.schemes import SCHEMES
from xquant_fx.plan.config import SHARED_FITS, Eta, XQuantConfig, check_scale_dtype, plain_fields
from xquant_fx.plan.spec import STORABLE, KVSpec, Role

SHARED = "reads the codes of the layer below"
#: Least bits of rotary keys that all heads share beside a latent: a ninth of what is stored, and most of the error
#: (docs/quality.md).
ROTARY_BITS = 4
#: Reasons for codes of one's own that are no news: sharing was not asked for there.
ORDINARY = ("lower layer of its pair", "the last layer has no partner", "sharing is off", "starts sharing at layer")


@dataclasses.dataclass(frozen=True, kw_only=True)
class BufferPlan:
    """What the keys, or the values, of one layer are stored as."""

    role: Role
    scheme: str
    """How groups lie and when they are quantized: a name of ``kernels.schemes.SCHEMES``."""
    bits: float
    """Bits per stored element, an average where widths are mixed; 16: unquantized."""
    group_size: int | None
    """Tokens (keys) or channels (values) per scale and zero point; None: all channels of the head."""
    residual_length: int
    """Latest tokens kept in full precision, R of the role; of layers that share codes the same."""
    eta: Eta
    """Relaxation of both ends of the range (XQuant, Eq. 5); "auto": that of the group's size (``eta_of``)."""
    sink_tokens: int
    """First tokens of a sequence kept in full precision."""
    scale_dtype: torch.dtype
    """dtype of scales and zero points; uint8: 8-bit floats."""
    fit: str
    """How scales are fitted to borrowed codes."""
    rollback_tokens: int = STEP_TOKENS
    """Latest tokens that can be taken back exactly."""
    token_norms: bool = False
    """Whether a token is divided by its norm over all heads before it is quantized."""
    partner: int | None = None
    """Layer whose codes this one reads; None: its own."""
    reason: str = ""
    """Why it reads its own codes, or that it does not."""

    def bind(
        self,
        layer: int,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        lower: KVSpec | None,
        rotary: bool = False,
        window: int = 0,
    ) -> KVSpec:
        """The spec of a buffer [B, H, N, D] of ``layer``; ``lower`` is that of the same role of the partner.

        A pair whose shapes turn out to differ does not share, nor does one with a sliding ``window`` (0: none); the
        spec's ``reason`` says so. ``rotary``: it holds the rotary part of keys that are computed from latents, which
        gets ``ROTARY_BITS`` at least.

        Raises:
            ConfigError: ``group_size`` does not divide head_dim, or tokens of ``dtype`` cannot be quantized.
        """
        if rotary and self.bits < ROTARY_BITS:
            return dataclasses.replace(self, bits=ROTARY_BITS, eta=0.0).bind(layer, shape, dtype, lower, window=window)
        batch, heads, tokens, dim = shape
        group = self._group_size(dim, layer)
        spec = KVSpec(
            role=self.role, scheme=self.scheme, layer=layer, shape=(batch, heads, tokens, dim), dtype=dtype,
            bits=self.bits, group_size=group, residual_length=self.residual_length, eta=self.eta_of(group),
            sink_tokens=self.sink_tokens, rollback_tokens=self.rollback_tokens, scale_dtype=self.scale_dtype,
            token_norms=self.token_norms, partner=self.partner, fit=self.fit, window=window, reason=self.reason,
        )  # fmt: skip
        if spec.quantized and dtype not in STORABLE:
            raise ConfigError(
                f"layer {layer}: {self.role}s are quantized from float32, bfloat16 or float16, got {dtype}: convert "
                'the model, or keep them as they are (XQuantConfig.preset("full"))'
            )
        refusal = "" if self.partner is None else _why_not_geometry(spec, lower, self.partner)
        return dataclasses.replace(spec, partner=None, reason=refusal) if refusal else spec

    def eta_of(self, group: int) -> float:
        """The relaxation of groups of ``group`` elements: values without bias, keys as they spread."""
        if not isinstance(self.eta, str):
            return self.eta
        return (spread_eta if self.role == "key" else unbiased_eta)(group, int(self.bits))

    @property
    def eta_text(self) -> str:
        """The relaxation for people: "-" where there is none, "auto" where head_dim decides."""
        is_fitted = self.partner is not None and self.fit == "least_squares"
        if not SCHEMES[self.scheme].RANGE_CODES or self.bits == 16 or is_fitted:
            return "-"
        if not isinstance(self.eta, str):
            return f"{self.eta:.3f}"
        return "auto" if self.group_size is None else f"{self.eta_of(self.group_size):.3f} (auto)"

    def _group_size(self, dim: int, layer: int) -> int:
        group = self.group_size or dim
        if self.role == "value" and dim % group:
            raise ConfigError(
                f"layer {layer}: v_group_size must divide head_dim, got v_group_size={group} and head_dim={dim}"
            )
        return group

    def to_dict(self) -> dict[str, Any]:
        """The fields, as JSON can hold them; :meth:`from_dict` reads them back."""
        return plain_fields(self)

    @classmethod
    def from_dict(cls, fields: Any, where: str) -> BufferPlan:
        """The entry that :meth:`to_dict` wrote; ``where`` stands in front of errors.

        Raises:
            ConfigError: a field is missing, unknown or breaks its rule.
        """
        names = {f.name for f in dataclasses.fields(cls)}
        if isinstance(fields, dict):  # plans that were written before there was this field
            fields = {"rollback_tokens": STEP_TOKENS, "token_norms": False, **fields}
        if not isinstance(fields, dict) or set(fields) != names:
            found = sorted(fields) if isinstance(fields, dict) else fields
            raise ConfigError(f"{where}: an entry of a plan must have the fields {sorted(names)}, got {found}")
        entry = cls(**{**fields, "scale_dtype": getattr(torch, str(fields["scale_dtype"]), None)})
        _check(entry, where)
        return entry


def is_denied(partner: int | None, reason: str) -> bool:
    """Whether sharing was asked for and could not be had, by what a plan or a spec says."""
    return partner is None and bool(reason) and not any(ordinary in reason for ordinary in ORDINARY)


def _why_not_geometry(spec: KVSpec, lower: KVSpec | None, partner: int) -> str:
    if lower is None:
        return f"layer {partner} is not in reach"
    if spec.window or lower.window:
        return f"layers {partner} and {spec.layer} have a sliding window, which overwrites codes"
    ours, theirs = ((s.shape, s.dtype, s.group_size) for s in (spec, lower))
    if ours != theirs:
        return f"layers {partner} and {spec.layer} differ in geometry: {theirs} and {ours}"
    return ""


def _check(entry: BufferPlan, where: str) -> None:
    """The rules of a config's fields, for an entry that was read from a file."""
    if entry.role not in get_args(Role):
        raise ConfigError(f"{where}: role must be one of {get_args(Role)}, got {entry.role!r}")
    if not isinstance(entry.scheme, str) or entry.scheme not in SCHEMES:
        raise ConfigError(f"{where}: scheme must be one of {sorted(SCHEMES)}, got {entry.scheme!r}")
    if entry.fit not in SHARED_FITS:
        raise ConfigError(f"{where}: fit must be one of {SHARED_FITS}, got {entry.fit!r}")
    if isinstance(entry.bits, list | tuple):
        raise ConfigError(f"{where}: bits of one layer are a number, got {entry.bits!r}")
    if isinstance(entry.partner, bool) or not isinstance(entry.partner, int | None):
        raise ConfigError(f"{where}: partner must be the number of a layer or None, got {entry.partner!r}")
    if not isinstance(entry.reason, str):
        raise ConfigError(f"{where}: reason must be text, got {entry.reason!r}")
    of_keys: Any = entry.group_size if entry.role == "key" else 1
    of_values = entry.group_size if entry.role == "value" else None
    if not isinstance(entry.token_norms, bool) or (entry.token_norms and not SCHEMES[entry.scheme].TOKEN_NORMS):
        raise ConfigError(
            f"{where}: token_norms must be true or false, and true only of keys whose channels are ranked, got "
            f"{entry.token_norms!r} with scheme {entry.scheme!r}"
        )
    own: Any = {f"{entry.role[0]}_bits": entry.bits, f"{entry.role[0]}_scheme": entry.scheme}
    try:
        XQuantConfig(
            residual_length=entry.residual_length, sink_tokens=entry.sink_tokens,
            rollback_tokens=entry.rollback_tokens, eta_1bit=entry.eta, k_group_size=of_keys, v_group_size=of_values,
            **own,
        )  # fmt: skip
        check_scale_dtype(entry.scale_dtype, entry.scheme, "scheme")
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error
