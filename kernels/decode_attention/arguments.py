"""What ``xquant::decode_attention`` takes, and which stored keys and values it reads."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Annotated, Any

from torch import Tensor

from xquant_fx.kernels.arguments import Arguments, Elements

#: The pairs of schemes that the kernels read keys and values in.
FUSED_SCHEMES = (
    ("per_channel", "per_token"),
    ("per_channel_ranked", "per_token_rotated"),
    ("per_channel_ranked", "per_token_folded"),
)
#: Stored tensors that the op takes twice: as ``k_codes`` of the keys, as ``v_codes`` of the values, ...
OF_SIDE = ("codes", "scale", "zero", "ring", "sink")
#: Those of keys alone.
OF_KEYS = ("order", "center", "norm")


@dataclasses.dataclass(frozen=True, eq=False)
class DecodeArguments(Arguments):
    """Arguments of the op; see ``KVSpec`` for the shapes of stored tensors."""

    q: Annotated[Tensor, Elements("T")]
    """[B, heads, q, D]."""
    k_codes: Annotated[Tensor, Elements("int32_t")]
    k_scale: Annotated[Tensor, Elements("S")]
    k_zero: Annotated[Tensor, Elements("S")]
    k_order: Annotated[Tensor | None, Elements("int32_t")]
    k_center: Annotated[Tensor | None, Elements("float")]
    k_norm: Annotated[Tensor | None, Elements("uint8_t")]
    k_ring: Annotated[Tensor, Elements("T")]
    k_sink: Annotated[Tensor | None, Elements("T")]
    v_codes: Annotated[Tensor, Elements("int32_t")]
    v_scale: Annotated[Tensor, Elements("S")]
    v_zero: Annotated[Tensor | None, Elements("S")]
    v_ring: Annotated[Tensor, Elements("T")]
    v_sink: Annotated[Tensor | None, Elements("T")]
    start: Annotated[Tensor, Elements("int64_t")]
    """int64 [B], first token of each sequence that is not padding."""
    past: Annotated[Tensor, Elements("int64_t")]
    """int64 [1], tokens stored before the step; [B] where each row has its own number."""
    mask: Annotated[Tensor | None, Elements("MASK")]
    """bool (True attends) or float (added to the logits), [B or 1, heads or 1, q or 1, max_len]."""
    sink_logits: Annotated[Tensor | None, Elements("SINK")]
    """[heads], a logit per head that joins the softmax without a value."""
    new_tokens: int
    max_len: int
    """Tokens of the buffer that this reads for, of which those not written yet count as zeros; 0: as many as are
    written, where no codes start over and there is no mask."""
    k_scheme: str
    k_bits: float
    k_group: int
    k_residual: int
    v_scheme: str
    v_bits: float
    v_group: int
    v_residual: int
    scale: float
    softcap: float
    """0.0: none."""
    window: int
    """Tokens that a query sees, its own included; 0: all."""
    k_new: Annotated[Tensor | None, Elements("T")] = None
    """The step's own keys [B, KV heads, q, D], where they are too many for the ring."""
    v_new: Annotated[Tensor | None, Elements("T")] = None


def of_sides(key: Callable[[str], Any], value: Callable[[str], Any]) -> dict[str, Any]:
    """The arguments of both sides: ``key`` and ``value`` give a side's stored tensor by its name."""
    of_keys = {f"k_{name}": key(name) for name in OF_KEYS}
    return of_keys | {f"{side}_{name}": of(name) for side, of in (("k", key), ("v", value)) for name in OF_SIDE}


def why_not_fused(k_scheme: str, k_bits: float, v_scheme: str, v_bits: float) -> str:
    """Why no kernel attends to keys and values that are stored so, in words; "" if one does."""
    if 16 in (k_bits, v_bits):
        return "16-bit storage"
    if (k_scheme, v_scheme) not in FUSED_SCHEMES:
        keys, values = (scheme.replace("_", " ") for scheme in (k_scheme, v_scheme))
        return f"its keys are stored {keys} and its values {values}"
    return ""
